"""Which images words name, in which order, and that they are taken one after the other."""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from remap.data import webdataset
from remap.errors import DataError
from remap.prediction.inputs import Inputs

FILES = ("a.png", "b/c.png", "b/d.jpg", "b/notes.txt", ".hidden.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in FILES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "photos"


def paths(inputs: Inputs, root: Path) -> list[str]:
    return [item.path.removeprefix(f"{root}/") for item in inputs]


def test_folders_patterns_and_lists_name_the_same_files(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ["a.png", "b/c.png", "b/d.jpg"]
    inputs = Inputs([photos])
    assert paths(inputs, photos) == paths(inputs, photos) == expected  # a second time too
    assert dict(inputs.left_out) == {".txt files are not read": 1, "hidden or made by the system": 1}
    assert paths(Inputs([photos / "**" / "*.[pj][np]g"]), photos) == expected
    assert paths(Inputs([photos / "**"]), photos) == expected  # a folder and what is in it are one
    assert paths(Inputs([photos / "a.png", photos / "b"]), photos) == expected
    (photos.parent / "list.txt").write_text(f"{photos}/a.png\n\n{photos}/b\r\n")
    assert paths(Inputs([], [photos.parent / "list.txt"]), photos) == expected
    # As Notepad saves it.
    (photos.parent / "list.txt").write_text(f"{photos}/a.png\r\n{photos}/b\r\n", "utf-8-sig", newline="")
    assert paths(Inputs([], [photos.parent / "list.txt"]), photos) == expected
    lines = io.TextIOWrapper(io.BytesIO(f"{photos}\n".encode()))
    monkeypatch.setattr(sys, "stdin", lines)
    assert paths(Inputs(["-"]), photos) == expected


def test_a_saved_data_set_is_recognised_by_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = [{"bytes": str(number).encode(), "path": None} for number in range(3)]
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "set")
    assert [item.read() for item in Inputs([tmp_path / "set"])] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".zip"])
def test_archives_are_read_where_they_lie(photos: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"photos{kind}"
    if kind == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in FILES:
                archive.write(photos / name, name)
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as tar:
            tar.add(photos, ".")
    found = {item.path.removeprefix(f"{path}/"): item.read() for item in Inputs([path])}
    assert found == {name: name.encode() for name in FILES[:3]}


def test_sources_give_their_images_whatever_the_labels(photos: Path) -> None:
    (photos / "rows.csv").write_text("file,label\na.png,x\nb/d.jpg,\nb/notes.txt,y\na.png,x\n")
    for word in (f"csv:{photos}/rows.csv", f"csv:{photos}/rows.csv,label=label", f"{photos}/rows.csv"):
        inputs = Inputs([word])
        found = {item.path.removeprefix(f"{photos}/"): item.read() for item in inputs}
        assert found == {"a.png": b"a.png", "b/d.jpg": b"b/d.jpg"} and all(item.judged for item in inputs)
        assert dict(inputs.left_out) == {".txt files are not read": 1}
    beside = [item.path for item in Inputs([f"{photos}/*.*"])]
    assert beside == [f"{photos}/a.png", f"{photos}/rows.csv"]  # whose row says that it is not read


def test_words_that_name_nothing_are_refused(photos: Path, tmp_path: Path) -> None:
    for words, what in ((["absent.png"], "no such file or folder"), ([], "no images are named")):
        with pytest.raises(DataError, match=what):
            Inputs(words)
    (tmp_path / "empty").mkdir()
    for words in ([tmp_path / "empty"], [str(photos / "*.gif")]):
        with pytest.raises(DataError, match="no images there"):
            list(Inputs(words))
    with pytest.raises(DataError, match=r"cannot read .*list.txt: No such file"):
        list(Inputs([], [tmp_path / "list.txt"]))
    assert [item.path for item in Inputs([photos / "a.png", "absent.png"])][1] == "absent.png"


@pytest.mark.parametrize("processes", [1, 2, 5, 6])
def test_a_shard_is_listed_and_read_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Five shards, the first and the last one without images. Six processes are too many: they share single images."""
    counts = (0, 3, 1, 2, 0)
    expected = [f"{tmp_path}/{number}.tar/{i}.png" for number, count in enumerate(counts) for i in range(count)]
    for number, count in enumerate(counts):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name in (*(f"{i}.png" for i in range(count)), "other.gif"):
                tar.addfile(tarfile.TarInfo(name))
    opened, list_tar = list[str](), webdataset.list_tar
    monkeypatch.setattr(webdataset, "list_tar", lambda path, *more: opened.append(path.name) or list_tar(path, *more))
    inputs = [Inputs([f"webdataset:{tmp_path}"]) for _ in range(processes)]
    shares = [list(one.share(rank, processes)) for rank, one in enumerate(inputs)]
    by_turn = sorted((turn, rank, item.path) for rank, share in enumerate(shares) for turn, item in share)
    assert [path for _, _, path in by_turn] == expected
    assert {one.left_out.total() for one in inputs} == {1: {5}, 2: {3, 2}, 5: {1}, 6: {5}}[processes]
    if processes < 6:
        assert sorted(opened) == [f"{number}.tar" for number in range(5)]
        assert sum(one.left_out_here.total() for one in inputs) == 5
