"""A single folder around everything, as archives often have one, is stepped into."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from remap.data.sources import open_data
from remap.errors import DataError


def _fill(root: Path, folders: tuple[str, ...]) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(root / folder / f"{index}.png")
    return root


@pytest.mark.parametrize("wrap", ["", "photos/"])
def test_classes_are_found_inside_one_wrapping_folder(tmp_path: Path, wrap: str) -> None:
    found = open_data(str(_fill(tmp_path, (f"{wrap}cat", f"{wrap}dog"))), None, 0.25)
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.val)) == (6, 2)
    assert np.array_equal(np.bincount(found.val.labels), [1, 1])


def test_splits_are_found_inside_one_wrapping_folder(tmp_path: Path) -> None:
    found = open_data(str(_fill(tmp_path, ("x/train/a", "x/train/b", "x/val/a", "x/val/b"))), None, 0.2)
    assert (found.classes, len(found.train), len(found.val)) == (("a", "b"), 8, 8)


def test_a_lone_train_folder_is_a_split_not_a_wrapping(tmp_path: Path) -> None:
    found = open_data(str(_fill(tmp_path, ("train/a", "train/b"))), None, 0.25)
    assert (found.classes, len(found.train), len(found.val)) == (("a", "b"), 6, 2)


def test_one_class_stays_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least two classes"):
        open_data(str(_fill(tmp_path, ("only",))), None, 0.2)
