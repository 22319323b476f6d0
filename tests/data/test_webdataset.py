"""Shards written by the package webdataset, and tars of the same form, compared with what that package reads."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from remap.data.sources import open_data, open_unlabeled, read_all
from remap.errors import DataError

webdataset = pytest.importorskip("webdataset")


@pytest.fixture
def shards(tmp_path: Path, tree: Callable[..., Path]) -> Path:
    """Three shards of train and one of val, 4 samples each; the grey of image i is 10 i."""
    root = tree({f"{i}.png": 10 * i for i in range(16)})
    (tmp_path / "shards").mkdir()
    for split, indices in (("train", range(12)), ("val", range(12, 16))):
        pattern = f"{tmp_path}/shards/{split}-%03d.tar"
        with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
            for i in indices:
                image = (root / f"{i}.png").read_bytes()
                writer.write({"__key__": f"{i:05d}", "png": image, "cls": i % 3, "json": {"label": f"c{i % 3}"}})
    return tmp_path / "shards"


def test_images_and_labels_are_those_that_webdataset_reads(shards: Path, seen: Callable[..., list]) -> None:
    data = open_data(f"webdataset:{shards}/train-{{000..002}}.tar", f"webdataset:{shards}/val-000.tar", 0.2)
    urls = [str(path) for path in sorted(shards.glob("train-*"))]
    expected = [(one["png"], one["cls"].decode()) for one in webdataset.WebDataset(urls, shardshuffle=False)]
    found = [(data.train.read(i), data.classes[label]) for i, label in enumerate(data.train.labels)]
    assert len(expected) == 12 and sorted(found) == sorted(expected)
    assert seen(data.classes, data.val) == [(10 * i, str(i % 3)) for i in range(12, 16)]
    data = open_data(f"webdataset:{shards},label=label", None, 0.2)  # of the JSON; splits by the names
    assert data.classes == ("c0", "c1", "c2") and (len(data.train), len(data.val)) == (12, 4)
    assert data.train.names[0] == "train-000.tar/00000.png"
    assert (
        len(read_all(f"webdataset:{shards}", ("0", "1", "2"))[0])
        == len(open_unlabeled(f"webdataset:{shards}")[0])
        == 16
    )


@pytest.mark.parametrize("labeled", ["", "/*.tar"])
def test_shards_to_evaluate_on_are_not_learned_from(shards: Path, labeled: str) -> None:
    """However both are named: a folder, a pattern or one shard."""
    source = f"webdataset:{shards}{labeled}"
    for name in ("val-000.tar", "val-*.tar", "*.tar"):
        with pytest.raises(DataError, match="holds images to evaluate on"):
            open_data(source, None, 0.2, f"webdataset:{shards}/{name}")
    for name in ("train-*.tar", "train-000.tar", "{train-000,train-001}.tar"):
        assert len(open_data(source, None, 0.2, f"webdataset:{shards}/{name}").unlabeled) in (4, 8, 12)


def pack(path: Path, files: Mapping[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return f"webdataset:{path}"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_samples_are_grouped_up_to_the_first_dot(shards: Path, tmp_path: Path, mode: str) -> None:
    """In folders, with several files a sample, text labels, capitals, and files of systems between them."""
    with tarfile.open(shards / "train-000.tar") as archive:
        png = archive.extractfile("00001.png").read()  # type: ignore[union-attr]
    files = {"a/._1.png": png, ".DS_Store": b"", "README": b"text", "lonely.cls": b"1"}
    for i in range(4):
        files |= {
            f"a/{i}.JPG": png,
            f"a/{i}.cls": b" bee\n" if i % 2 else b"ant",
            f"a/{i}.seg.png": b"",
            f"a/{i}.npy": b"",
        }
    files |= {"b/0.gif": b"GIF", "b/0.cls": b"ant", "b/1.png": png, "b/1.txt": b"a caption"}
    word = pack(tmp_path / f"x.{mode.replace(':', '.')}.tar", files, mode)
    data = open_data(word, None, 0.5)
    assert data.classes == ("ant", "bee") and len(data.train) == len(data.val) == 2
    assert sorted(data.skipped) == [
        ("x.w.tar/b/0.gif".replace("x.w", f"x.{mode.replace(':', '.')}"), ".gif files are not read"),
        ("x.w.tar/b/1.png".replace("x.w", f"x.{mode.replace(':', '.')}"), "without a label"),
    ]
    assert data.train.read(0) == png


REFUSED = {
    "two images": ({"1.jpg": b"", "1.png": b"", "1.cls": b"1"}, "a sample has several images"),
    "bad json": ({"1.jpg": b"", "1.json": b"{"}, "a label cannot be read"),
    "a list": ({"1.jpg": b"", "1.json": b"[1]"}, "there are no labelled images"),
    "several labels": (
        {"1.jpg": b"", "1.json": json.dumps({"labels": [1, 2]}).encode()},
        "an image has several labels",
    ),
    "a pickle": ({"1.jpg": b"", "1.pyd": b"cos\nsystem\n"}, "there are no labelled images"),
    "long": ({"1.jpg": b"", "1.cls": b"x" * 2**21}, "larger than 1,048,576 bytes"),
}


@pytest.mark.parametrize(("files", "expected"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_refused(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        open_data(pack(tmp_path / "x.tar", files), None, 0.5)


def test_one_of_several_images_may_be_named(shards: Path, tmp_path: Path) -> None:
    files = {f"{i}.{kind}": kind.encode() for i in range(4) for kind in ("jpg", "png", "cls")}
    word = pack(tmp_path / "x.tar", files | {"0.cls": b"a", "2.cls": b"a"})
    data = open_data(f"{word},image=png", None, 0.5)
    assert {data.train.read(i) for i in range(2)} == {b"png"} and data.classes == ("a", "cls")


@pytest.mark.parametrize(("kind", "text"), [("cls", "b"), ("json", '{"label": "b"}')])
def test_a_label_may_begin_with_a_byte_order_mark(tmp_path: Path, kind: str, text: str) -> None:
    files = {f"{i}.jpg": b"image %d" % i for i in range(4)} | {f"{i}.cls": b"a" for i in range(2)}
    files |= {f"2.{kind}": text.encode(), f"3.{kind}": text.encode("utf-8-sig")}
    data = open_data(pack(tmp_path / "x.tar", files), None, 0.5)
    assert data.classes == ("a", "b") and sorted(data.count(data.train)) == [1, 1]


def test_the_name_of_a_label_may_have_capitals(tmp_path: Path) -> None:
    files = {f"{i}.{kind}": f"{kind}{i % 2}".encode() for i in range(4) for kind in ("jpg", "Name")}
    data = open_data(f"{pack(tmp_path / 'x.tar', files)},label=Name", None, 0.5)
    assert data.classes == ("Name0", "Name1")


def test_labels_of_a_compressed_shard_are_read_under_any_name(tmp_path: Path, tree: Callable[..., Path]) -> None:
    root = tree({f"{i}.png": 10 * i for i in range(4)})
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for i in range(4):
            for name, content in ((f"{i}.png", (root / f"{i}.png").read_bytes()), (f"{i}.LABEL", b"ab"[i % 2 :][:1])):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    data = open_data(f"webdataset:{tmp_path}/x.tar.gz", None, 0.5)
    assert data.classes == ("a", "b") and len(data.train) + len(data.val) == 4


def test_a_split_alone_can_be_taken_as_everything(tmp_path: Path) -> None:
    files = {f"{i}.{kind}": f"{kind}{i % 2}".encode() for i in range(4) for kind in ("jpg", "cls")}
    word = pack(tmp_path / "val-0.tar", files)
    with pytest.raises(
        DataError, match="no labelled images to learn from\n.*\n.*images are those of val;.*,split=NAME"
    ):
        open_data(word, None, 0.5)
    assert len(open_data(f"{word},split=val", None, 0.5).train) == 2
