"""Data sets of Hugging Face, written by the package and compared with what it reads. The hub is not asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remap.data.sources import open_data, open_unlabeled
from remap.errors import DataError

datasets = pytest.importorskip("datasets")
FEATURES = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["wasp", "ant"])})


@pytest.fixture(scope="module")
def whole() -> Any:
    images = [Image.new("L", (4, 4), 10 * i) for i in range(8)]
    return datasets.Dataset.from_dict({"img": images, "fine": [i % 2 for i in range(8)]}, features=FEATURES)


def read_by_datasets(dataset: Any) -> list[tuple[int, str]]:
    names = dataset.features["fine"].names
    return [(int(np.asarray(row["img"])[0, 0]), names[row["fine"]]) for row in dataset]


def test_a_saved_data_set_has_the_images_and_labels_that_datasets_reads(
    whole: Any, tmp_path: Path, seen: Callable[..., list]
) -> None:
    splits = datasets.DatasetDict({"train": whole.select([5, 1, 2, 3]), "validation": whole.select([6, 7])})
    splits.save_to_disk(tmp_path / "splits")
    loaded = datasets.load_from_disk(tmp_path / "splits")
    data = open_data(str(tmp_path / "splits"), None, 0.2)  # recognised without hf:
    assert seen(data.classes, data.train) == sorted(read_by_datasets(loaded["train"]))
    assert seen(data.classes, data.val) == read_by_datasets(loaded["validation"])
    assert data.classes == ("ant", "wasp") and sorted(data.val.names) == ["validation/0000000", "validation/0000001"]
    data = open_data(f"hf:{tmp_path / 'splits'},split=train", f"hf:{tmp_path / 'splits'},split=validation", 0.2)
    assert (len(data.train), len(data.val)) == (4, 2)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert open_data(f"hf:{tmp_path / 'one'},image=img,label=fine", None, 0.25).split_rule.startswith("25%")
    with pytest.raises(DataError, match="no such split"):
        open_data(f"hf:{tmp_path / 'one'},split=train", None, 0.25)
    more, _ = open_unlabeled(str(tmp_path / "one"))
    assert len(more) == 8


@pytest.mark.parametrize("part", ["train[:75%]", "train+test"])
def test_a_part_of_a_split_that_was_saved_is_everything(part: str, whole: Any, tmp_path: Path) -> None:
    """What ``load_dataset(..., split="train[:75%]")`` gives calls itself so (datasets/arrow_reader.py)."""
    some = datasets.Dataset(whole.data, info=whole.info, split=datasets.NamedSplit(part))
    some.save_to_disk(tmp_path / "some")
    assert str(datasets.load_from_disk(tmp_path / "some").split) == part
    for word in (str(tmp_path / "some"), f"hf:{tmp_path / 'some'},split={part}"):
        data = open_data(word, None, 0.25)
        assert (len(data.train), len(data.val), data.skipped) == (6, 2, ())


def test_unlabelled_images_may_be_another_split_and_not_that_to_evaluate_on(whole: Any, tmp_path: Path) -> None:
    parts = {"train": range(4), "test": range(4, 6), "unsupervised": range(6, 8)}
    datasets.DatasetDict({name: whole.select(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "set")
    word = f"hf:{tmp_path / 'set'}"
    data = open_data(word, None, 0.2, f"{word},split=unsupervised")
    assert data.unlabeled is not None
    assert data.unlabeled.names == ("set/unsupervised/0000000", "set/unsupervised/0000001")
    assert [reason for _, reason in data.skipped] == ["in no split"] * 2
    for unlabeled, expected in ((word, "holds the labelled ones"), (f"{word},split=test", "images to evaluate on")):
        with pytest.raises(DataError, match=expected):
            open_data(word, None, 0.2, unlabeled)


def test_parquet_of_datasets_and_names_of_the_hub(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Callable[..., list]
) -> None:
    """A folder of Parquet files goes through the cache of datasets; a name goes to its loader as it is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    whole.select(range(6)).to_parquet(str(tmp_path / "files/train-00000-of-00001.parquet"))
    whole.select([6, 7]).to_parquet(str(tmp_path / "files/test-00000-of-00001.parquet"))
    for word in (f"hf:{tmp_path / 'files'}", f"parquet:{tmp_path / 'files'}"):
        data = open_data(word, None, 0.2)
        assert seen(data.classes, data.train) == read_by_datasets(whole.select(range(6)))
        assert seen(data.classes, data.val) == read_by_datasets(whole.select([6, 7]))
    whole.select([0, 1]).to_parquet(str(tmp_path / "files/0001.parquet"))  # of no split, beside others that say theirs
    for word in (f"hf:{tmp_path / 'files'}", f"parquet:{tmp_path / 'files'}"):
        data = open_data(word, None, 0.2)
        assert (len(data.train), len(data.val)) == (6, 2)
        assert [reason for _, reason in data.skipped] == ["in no split"] * 2
    (tmp_path / "plain").mkdir()
    whole.to_parquet(str(tmp_path / "plain/0000.parquet"))
    data = open_data(f"hf:{tmp_path / 'plain'}", None, 0.25)
    assert seen(data.classes, data.train, data.val) == read_by_datasets(whole)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **more: asked.append((path, more)) or whole)
    assert len(open_data("hf:owner/name,config=small,split=train,revision=abc", None, 0.25).train) == 6
    assert asked == [("owner/name", {"name": "small", "split": "train", "revision": "abc"})]

    def fail(path: str, **more: Any) -> None:
        raise ValueError("none\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="cannot open the data set: none\n  given:   owner/name"):
        open_data("hf:owner/name", None, 0.25)


@pytest.mark.parametrize("name", ["imagefolder", "pandas", "a/b/c"])
def test_a_reader_of_the_current_folder_is_not_a_data_set(name: str) -> None:
    """``datasets`` knows "imagefolder" and others as readers of local files, one of which unpickled in its time."""
    with pytest.raises(DataError, match="not the name of a data set on the hub"):
        open_data(f"hf:{name}", None, 0.2)
