"""The table of data sources: what is a source, what is a path, and a source of another package."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from remap.data import DEFAULT_SOURCE, SOURCES, SourceEntry, is_source
from remap.data.class_folders import ClassFolders
from remap.data.sources import Source, find_source, open_data, open_unlabeled, read_all
from remap.data.splits import ImageData, Split
from remap.data.words import with_absolute_paths
from remap.errors import DataError, MissingData


class Greys(Source):
    """Two classes of one grey each; the word says which: greys:10 has 10 and 20."""

    def open(self, word: str, val_source: str | None, val_fraction: float) -> ImageData:
        first = int(word.partition(":")[2] or 0)

        def read(index: int) -> bytes:
            return Image.new("L", (4, 4), first * (index % 2 + 1)).tobytes()

        images = Split(tuple(f"{i}" for i in range(6)), np.arange(6) % 2, read)
        return ImageData(word, ("dark", "light"), images.take([0, 1, 2, 3]), images.take([4, 5]))


class Lists(Source):
    """A format that is recognised by what lies at the path."""

    def open(self, word: str, val_source: str | None, val_fraction: float) -> ImageData:
        raise DataError("read as a list")

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".list"


@pytest.fixture
def greys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table with two more rows, as another package adds them."""
    rows = {row.name: row for row in SOURCES}
    for name, target, by_path in (("greys", Greys, False), ("lists", Lists, True)):
        rows[name] = SourceEntry(name=name, target=f"{__name__}:{target.__name__}", summary="", by_path=by_path)
        monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[target.__module__])
    monkeypatch.setattr(SOURCES, "_rows", rows)
    yield


def test_names_are_sources_and_all_else_is_a_path(greys: None) -> None:
    assert [
        word
        for word in ("digits", "greys", "greys:10", "photos", "./digits", "folders", "", "csv", "csv:a.csv", "hf")
        if is_source(word)
    ] == ["digits", "greys", "greys:10", "csv:a.csv"]
    assert is_source(DEFAULT_SOURCE)


def test_a_source_of_another_package_is_opened_by_its_row(greys: None) -> None:
    """Labels and counts by hand: 6 images in turn, the last two to evaluate on."""
    data = open_data("greys:10", None, 0.2)
    assert (data.classes, len(data.train), data.val.labels.tolist()) == (("dark", "light"), 4, [0, 1])
    assert data.train.read(1) == bytes([20]) * 16
    assert len(open_data("greys:10", None, 0.2, labels=2).unlabeled) == 2
    assert open_unlabeled("greys:10")[0].read(1) == data.train.read(1)
    with pytest.raises(DataError, match="holds the labelled ones"):
        open_data("greys:10", None, 0.2, "greys:10")
    assert read_all("greys:10", ["dark", "light"])[0].labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert read_all("greys:10", ["light", "dark"])[0].labels.tolist() == [
        1,
        0,
        1,
        0,
        1,
        0,
    ]  # as a run that was extended
    with pytest.raises(DataError, match="classes the task does not know"):
        read_all("greys:10", ["light", "grey"])


def test_a_path_is_read_by_the_source_that_recognises_it(greys: None, tmp_path: Path) -> None:
    """A source of another package is tried before the built-in reader, which takes any path that is there."""
    (tmp_path / "a.list").write_text("")
    (tmp_path / "digits").mkdir()
    assert isinstance(find_source(str(tmp_path / "a.list")), Lists)
    assert isinstance(find_source(str(tmp_path / "digits")), ClassFolders)
    with pytest.raises(
        MissingData, match="digits, drawings, csv:, vtab:, parquet:, hf:, webdataset:, torchvision:, greys, a folder of"
    ):
        find_source(str(tmp_path / "nowhere"))


def test_the_digits_have_nothing_to_choose() -> None:
    with pytest.raises(DataError, match="nothing to choose"):
        open_data("digits:3", None, 0.2)


def test_listing_the_sources_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, remap.data\nprint([r.name for r in remap.data.SOURCES], {'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ["digits", "drawings", "folders", "csv", "vtab", "parquet", "hf", "webdataset", "torchvision"]
    assert done.stdout == f"{names} set()\n"


def test_paths_in_words_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("saved").mkdir()
    Path("odd,label=x").mkdir()
    for word, expected in {
        "digits": "digits",
        "photos": f"{tmp_path}/photos",
        "csv:a.csv,label=kind,folder=images": f"csv:{tmp_path}/a.csv,label=kind,folder={tmp_path}/images",
        "parquet:odd,label=x": f"parquet:{tmp_path}/odd,label=x",
        "webdataset:s-{00..09}.tar": f"webdataset:{tmp_path}/s-{{00..09}}.tar",
        "hf:saved,split=train": f"hf:{tmp_path}/saved,split=train",
        "hf:owner/name": "hf:owner/name",
        "torchvision:MNIST,root=.": f"torchvision:MNIST,root={tmp_path}",
        "csv:": "csv:",
    }.items():
        assert with_absolute_paths(word) == with_absolute_paths(with_absolute_paths(word)) == expected
    with pytest.raises(DataError, match="'csv:' is not followed by a path"):
        open_data("csv:", None, 0.2)
    with pytest.raises(MissingData):
        open_unlabeled("digits")  # a folder of that name
