"""Unreadable images: left out of training and counted, an error in evaluation, never replaced by another image."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from remap.data.views import View, require_readable
from remap.errors import DataError
from remap.pipeline.data_views import DataViews
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe.schema import DataSpec

Tree = Callable[..., Path]
GOOD: dict[str, int | bytes] = {
    f"{part}/{name}/{i}.png": 10 * i for part in ("train", "val", "test") for name in "ab" for i in range(10)
}


def opened(root: Path, bench: SharedResources | None = None, **options: object) -> DataViews:
    spec = DataSpec(source=str(root), workers=2, **options)
    return (bench or SharedResources()).open(spec, View(4, 1.0, "bicubic"), Silent())


def test_training_images_are_left_out_counted_and_named(tree: Tree) -> None:
    views = opened(tree(GOOD | {"train/a/3.png": b"", "train/b/9.png": b"text", "README": b""}))
    assert (len(views.data.train), len(views.train.split), len(views.val.split)) == (20, 18, 20)
    assert views.skipped == (
        ("README", "files without a suffix are not read"),
        ("train/a/3.png", "not an image"),
        ("train/b/9.png", "not an image"),
    )
    assert sorted(views.train.split.labels.tolist()) == [0] * 9 + [1] * 9
    pixels, good = views.train.batch(range(18))
    assert good.tolist() == list(range(18))
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(10) if (c, i) not in (("a", 3), ("b", 9))]
    assert list(views.train.split.names) == names
    assert pixels[:, 0, 0, 0].tolist() == [GOOD[name] for name in names]


@pytest.mark.parametrize(("bad", "allowed", "fits"), [(2, 0.1, True), (3, 0.1, False), (1, 0.0, False), (0, 0.0, True)])
def test_the_limit_is_a_share_of_the_training_images(tree: Tree, bad: int, allowed: float, fits: bool) -> None:
    root = tree(GOOD | {f"train/a/{i}.png": b"x" for i in range(bad)})
    if fits:
        assert len(opened(root, max_bad=allowed).train.split) == 20 - bad
        return
    with pytest.raises(DataError) as caught:
        opened(root, max_bad=allowed)
    text = str(caught.value)
    assert f"{bad} of 20 training images cannot be read" in text
    assert "train/a/0.png (not an image)" in text and f"(data.max_bad={allowed:g})" in text
    assert f"--set data.max_bad={bad / 20:g}" in text and "another --output" in text


def test_all_bad_images_are_counted_and_each_reason_is_in_plain_words(tree: Tree) -> None:
    """Seven of twenty: five by name, the others by number."""
    root, bench = tree(GOOD | {f"train/a/{i}.png": b"x" for i in range(5)}), SharedResources()
    bench.index(DataSpec(source=str(root)))
    (root / "train/a/7.png").unlink()
    (root / "train/a/0.png").unlink()
    os.mkfifo(root / "train/a/0.png")
    (root / "train/a/1.png").unlink()
    with pytest.raises(DataError) as caught:
        opened(root, bench)
    given = str(caught.value).splitlines()[1]
    assert given.startswith("  given:   train/a/0.png (it is a FIFO, not a file), train/a/1.png (no such file), ")
    assert given.endswith("train/a/4.png (not an image) and 1 more") and str(root) not in given


def test_another_limit_is_another_answer(tree: Tree) -> None:
    root, bench = tree(GOOD | {"train/a/0.png": b"x"}), SharedResources()
    assert opened(root, bench) is opened(root, bench)
    with pytest.raises(DataError, match="1 of 20 training images"):
        opened(root, bench, max_bad=0.0)


@pytest.mark.parametrize("part", ["val", "test"])
def test_evaluation_stops_and_names_the_file_unless_told_to_skip(tree: Tree, part: str) -> None:
    root = tree(GOOD | {f"{part}/b/5.png": b"x"})
    with pytest.raises(DataError) as caught:
        opened(root)
    text = str(caught.value)
    assert f"1 of 20 {part} images cannot be read" in text
    assert f"{part}/b/5.png (not an image)" in text and "--skip-bad" in text
    views = opened(root, skip_bad=True)
    assert views.skipped == ((f"{part}/b/5.png", "not an image"),)
    source = {"val": views.val, "test": views.test}[part]
    assert len(source.split) == 19 and len(views.train.split) == 20


def test_out_of_memory_images_are_found_when_they_are_read(tree: Tree) -> None:
    views = opened(tree(GOOD | {"train/a/0.png": b"x", "val/a/0.png": b"x"}), memory_gib=0.0)
    assert views.skipped == () and len(views.train.split) == 20
    assert views.train.batch([0, 1])[1].tolist() == [1]
    assert views.train.bad_names() == [("train/a/0.png", "not an image")]
    views.val.batch([0])
    with pytest.raises(DataError, match="1 of 20 val images cannot be read"):
        require_readable(views.val, "val", skip=False)
    require_readable(views.val, "val", skip=True)


def test_memory_is_one_budget_for_all_splits(tree: Tree) -> None:
    """20 images of 3 x 4 x 4 bytes are 960; room for one and a half splits keeps the training images only."""
    views = opened(tree(GOOD), memory_gib=1.5 * 960 / 2**30)
    assert (views.train.cached_bytes, views.val.cached_bytes, views.test.cached_bytes) == (960, 0, 0)


def test_a_file_that_vanishes_is_unreadable_not_a_crash(tree: Tree) -> None:
    root, bench = tree(GOOD), SharedResources()
    bench.index(DataSpec(source=str(root)))
    (root / "train/a/0.png").unlink()
    views = opened(root, bench)
    (name, reason), *rest = views.skipped
    assert name == "train/a/0.png" and reason == "no such file" and not rest
