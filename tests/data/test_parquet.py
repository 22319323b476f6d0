"""Parquet files with images, written by pyarrow and compared with what it reads."""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.data import parquet
from remap.data.fingerprint import Contents, fingerprint
from remap.data.shards import expand_braces
from remap.data.sources import open_data, open_unlabeled, read_all
from remap.errors import DataError, MissingData
from remap.progress import Silent

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
NAMES = {b"huggingface": json.dumps({"info": {"features": {"kind": {"names": ["wasp", "ant"]}}}}).encode()}


@pytest.fixture
def write(tmp_path: Path, tree: Callable[..., Path]) -> Callable[..., Path]:
    """Write images as a Parquet file; the grey of image i is 10 i."""
    root = tree({f"{i}.png": 10 * i for i in range(12)})

    def write(name: str, labels: Any, first: int = 0, paths: bool = True, **more: Any) -> Path:
        contents = [(root / f"{first + i}.png").read_bytes() for i in range(len(labels))]
        images = [{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(contents)] if paths else contents
        columns = {"image": images, "kind" if "metadata" in more else "label": labels}
        schema_metadata = more.pop("metadata", None)
        table = pa.table(columns | more).replace_schema_metadata(schema_metadata)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / name, row_group_size=3)
        return tmp_path / name

    return write


def test_images_and_labels_are_those_that_pyarrow_reads(write: Callable[..., Path], seen: Callable[..., list]) -> None:
    for paths in (True, False):
        path = write("photos.parquet", ["bee", "ant"] * 4, paths=paths)
        data = open_data(str(path), None, 0.25)
        both, table = data.train.joined(data.val), pq.read_table(path)
        expected = {(row["image"]["bytes"] if paths else row["image"], row["label"]) for row in table.to_pylist()}
        assert {(both.read(i), data.classes[both.labels[i]]) for i in range(8)} == expected
        assert len(data.val) == 2 and both.names[0].startswith("photos.parquet/000000")
        assert seen(data.classes, both) == [(10 * i, "ant" if i % 2 else "bee") for i in range(8)]
        # The key of cached outputs is what the file's bytes are, as if they lay in a folder.
        assert Contents(both).of([0]) == [hashlib.blake2b(both.read(0), digest_size=16).digest()]
        assert len(read_all(f"parquet:{path}", ("ant", "bee"))[0]) == len(open_unlabeled(str(path))[0]) == 8


def test_labels_are_texts_in_bytes_or_missing_as_nan(write: Callable[..., Path]) -> None:
    data = open_data(str(write("bytes.parquet", ["b\u00fc".encode(), b"ant"] * 2)), None, 0.5)
    assert data.classes == ("ant", "b\u00fc")
    data = open_data(str(write("nan.parquet", [1.0, 2.0, float("nan")] * 2)), None, 0.5)
    assert data.classes == ("1.0", "2.0") and [reason for _, reason in data.skipped] == ["without a label"] * 2
    with pytest.raises(DataError, match="a label is not text"):
        open_data(str(write("wrong.parquet", [b"\xff", b"ant"] * 2)), None, 0.5)


def test_shards_have_splits_by_their_names_and_class_names_by_their_metadata(
    write: Callable[..., Path], seen: Callable[..., list]
) -> None:
    for name, first in (("data/train-00000-of-00002", 0), ("data/train-00001-of-00002", 4), ("data/test-00000", 8)):
        path = write(f"{name}.parquet", [0, 1, -1, None], first, metadata=NAMES)
    data = open_data(f"parquet:{path.parent}", None, 0.2)
    before = fingerprint(data, Silent())
    assert fingerprint(open_data(f"parquet:{path.parent}/*", None, 0.2), Silent()) == before
    assert seen(data.classes, data.train) == [(0, "wasp"), (10, "ant"), (40, "wasp"), (50, "ant")]
    assert seen(data.classes, data.val) == [(80, "wasp"), (90, "ant")]
    assert [reason for _, reason in data.skipped] == ["without a label"] * 6
    write("data/test-00000.parquet", [0, 1, -1, None], 7, metadata=NAMES)  # other images of the same names
    assert fingerprint(open_data(f"parquet:{path.parent}", None, 0.2), Silent()) != before
    data = open_data(f"parquet:{path.parent}/*.parquet,split=train", None, 0.5)
    assert (len(data.train), len(data.val)) == (2, 2)
    assert expand_braces("a-{08..10}-{x,y}.tar")[:3] == ["a-08-x.tar", "a-08-y.tar", "a-09-x.tar"]
    for word in (f"parquet:{path.parent}/none", f"parquet:{path.parent}/x-{{0..2}}.parquet"):
        with pytest.raises(MissingData):
            open_data(word, None, 0.2)
    with pytest.raises(DataError, match="more than 100,000 files"):
        expand_braces("{0..999999999999}")


def test_a_split_without_labels_does_not_keep_others_from_being_taken(write: Callable[..., Path]) -> None:
    path = write("data/train-0.parquet", ["bee", "ant"] * 4)
    images = pq.read_table(path).select(["image"])
    pq.write_table(images, path.with_name("test-0.parquet"))
    with pytest.raises(DataError, match=r"column of the labels is not known\n(.*\n)*.*,split=NAME"):
        open_data(f"parquet:{path.parent}", None, 0.25)
    data = open_data(f"parquet:{path.parent},split=train", None, 0.25)
    assert (len(data.train), len(data.val)) == (6, 2)


def test_what_cannot_be_meant_is_refused(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, labels = b"x" * 2**20, ["a", "b"] * 2
    cases = {
        "two columns of images": (write("0.parquet", labels, img=[one] * 4), "the column of the images is not known"),
        "no class": (write("1.parquet", [0, 1, 2, 3], metadata=NAMES), "a label has no class name"),
        "several": (write("2.parquet", [["a", "b"]] * 4), "an image has several labels"),
    }
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": None, "path": "/etc/passwd.png"}] * 4, kind)
    pq.write_table(pa.table({"image": image, "label": labels}), tmp_path / "4.parquet")
    cases["paths"] = (tmp_path / "4.parquet", "a table holds the paths of images, not the images")
    (tmp_path / "5.parquet").write_bytes((tmp_path / "4.parquet").read_bytes()[:-20])
    cases["truncated"] = (tmp_path / "5.parquet", "as a Parquet file")
    for path, expected in cases.values():
        with pytest.raises(DataError, match=expected):
            open_data(str(path), None, 0.25)
    with pytest.raises(DataError, match=r"the column label holds no images\n  given:   label \(string\)"):
        open_data(f"parquet:{cases['two columns of images'][0]},image=label", None, 0.25)
    monkeypatch.setattr(parquet, "FREE_GROWTH", 2**21)
    bomb = tmp_path / "6.parquet"  # 64 MiB of one value in a few kB
    pq.write_table(pa.table({"image": [one] * 64, "label": ["a", "b"] * 32}), bomb, compression="zstd")
    with pytest.raises(DataError, match="grows out of bounds"):
        open_data(str(bomb), None, 0.25)


def test_the_copy_leaves_no_file(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "room").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "room"))
    data = open_data(str(write("photos.parquet", ["bee", "ant"] * 4)), None, 0.25)
    assert list((tmp_path / "room").iterdir()) == [] and data.train.read(0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(DataError, match="TMPDIR"):
        open_data(str(tmp_path / "photos.parquet"), None, 0.25)
