"""Copies of one file on both sides of a split."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from remap.data.copies import copies_across
from remap.data.fingerprint import Contents
from remap.data.sources import open_data
from remap.pipeline.shared import SharedResources
from remap.pipeline.training_job import warn_before_training
from remap.progress import Silent
from remap.recipe import Recipe

Make = Callable[..., Path]


@pytest.mark.parametrize("kind", ["tree", "tar"])
def test_a_share_held_out_has_no_copy_of_a_training_image(request: pytest.FixtureRequest, kind: str) -> None:
    """40 files of 10 pictures in each of two classes: 2 of 10 pictures are held out with all of their copies."""
    files = {f"{name}/{i}-{copy}.png": 20 * i + (name == "b") for name in "ab" for i in range(10) for copy in range(4)}
    data = open_data(str(request.getfixturevalue(kind)(files)), None, 0.2)
    learned, held_out = (
        {(int(label), split.read(i)) for i, label in enumerate(split.labels)} for split in (data.train, data.val)
    )
    assert not learned & held_out and (len(learned), len(held_out)) == (16, 4)
    assert (len(data.train), len(data.val)) == (64, 16) and "60 copies are on the side" in data.split_rule
    assert np.bincount(data.val.labels).tolist() == [8, 8]


def test_without_copies_the_split_is_that_of_the_counts_alone(tree: Make) -> None:
    """Pictures of equal size in bytes, and the same pictures in another class, change nothing."""
    files = {f"{name}/{i}.png": 10 * i for name in "ab" for i in range(20)}
    other = {f"{name}/{i}.png": b"%d" % i * (i + 1) for name in "ab" for i in range(20)}
    one, two = (open_data(str(tree(made, where)), None, 0.2) for made, where in ((files, "x"), (other, "y")))
    assert one.val.names == two.val.names and one.train.names == two.train.names and "copies" not in one.split_rule


def test_a_class_of_copies_only_is_still_learned_and_checked(tree: Make) -> None:
    data = open_data(str(tree({f"{name}/{i}.png": 7 for name in "ab" for i in range(5)})), None, 0.2)
    assert np.bincount(data.train.labels).tolist() == [4, 4] and np.bincount(data.val.labels).tolist() == [1, 1]


def test_copies_across_a_split_of_the_user_are_counted_and_named(tree: Make) -> None:
    own = {"train/a/1.png": 1, "train/a/2.png": 2, "train/b/3.png": 3, "train/b/4.png": 4, "val/a/5.png": 5}
    clean = open_data(str(tree(own | {"val/b/6.png": 6}, "one")), None, 0.2)
    mixed = open_data(
        str(tree(own | {"val/a/x.png": 2, "val/b/y.png": 2, "test/a/z.png": 4, "test/b/8.png": 8}, "two")), None, 0.2
    )
    lines = []
    for data in (clean, mixed):
        splits = {"train": data.train, "val": data.val, "test": data.test}
        lines.append(copies_across({name: Contents(split) for name, split in splits.items() if split}, Silent()))
    assert lines[0] is None and lines[1] is not None
    assert lines[1].startswith("3 copies of training images among the images to evaluate on")
    assert lines[1].endswith(
        "val/a/x.png is train/a/2.png, val/b/y.png is train/a/2.png, test/a/z.png is train/b/4.png"
    )


def test_a_run_says_so_before_it_trains(tree: Make) -> None:
    said: list[str] = []
    data = open_data(
        str(tree({f"{part}/{name}/1.png": ord(name) for part in ("train", "val") for name in "ab"})), None, 0.2
    )
    recipe = Recipe.model_validate({"method": "lora", "losses": "ce"})
    views = SimpleNamespace(contents={"train": Contents(data.train), "val": Contents(data.val)}, data=data)
    progress = Silent()
    progress.say = said.append  # type: ignore[method-assign]
    components = SimpleNamespace(recipe=recipe, views=views, labeled_share=1.0)
    warn_before_training(components, SharedResources(), progress)  # type: ignore[arg-type]
    assert said[0].startswith("2 copies of training images among the images to evaluate on")
