"""A task of VTAB-1k, laid out as its usual release: lists of paths and numbers beside a folder of images."""

from collections.abc import Callable
from pathlib import Path

import pytest

from remap.data.sources import open_data, read_all

LISTS = {"train800": range(4), "val200": range(4, 6), "train800val200": range(6), "test": range(6, 12)}


@pytest.fixture
def task(tree: Callable[..., Path]) -> Path:
    root = tree({f"images/{i}.jpg": 20 * i for i in range(12)})
    for name, indices in LISTS.items():
        (root / f"{name}.txt").write_text("".join(f"images/{i}.jpg {i % 3}\n" for i in indices))
    return root


@pytest.mark.parametrize("prefix", ["", "vtab:"])
def test_the_folder_is_learned_from_all_1000_and_evaluated_on_the_test_list(
    task: Path, prefix: str, seen: Callable[..., list]
) -> None:
    data = open_data(f"{prefix}{task}", None, 0.2)
    assert data.classes == ("0", "1", "2") and data.test is None
    assert seen(data.classes, data.train) == [(20 * i, str(i % 3)) for i in range(6)]
    assert seen(data.classes, data.val) == [(20 * i, str(i % 3)) for i in range(6, 12)]
    assert len(read_all(f"{prefix}{task}", data.classes)[0]) == 12


def test_settings_are_chosen_on_the_lists_of_800_and_200(task: Path, seen: Callable[..., list]) -> None:
    data = open_data(f"{task}/train800.txt", f"{task}/val200.txt", 0.2)
    assert [grey for grey, _ in seen(data.classes, data.train)] == [0, 20, 40, 60]
    assert seen(data.classes, data.val) == [(80, "1"), (100, "2")]
