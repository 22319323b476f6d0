"""A weak teacher is found before anything is trained or cached, by whatever command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remap.cache.cache_folders import cache_root
from remap.cache.cache_listing import list_caches
from remap.errors import TrainingError
from remap.pipeline.build_cache import build_cache
from remap.pipeline.compare import compare
from remap.pipeline.comparison_plan import Plan
from remap.pipeline.run import start
from remap.progress import Progress
from remap.recipe import Recipe


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images that say nothing about their class: a head that is fitted on them guesses."""
    root, draws = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for split, each in (("train", 8), ("val", 4)):
        for name in ("blue", "green", "red"):
            (root / split / name).mkdir(parents=True)
            for index in range(each):
                pixels = draws.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return str(root)


def _compare(recipe: Recipe, folder: Path, progress: Progress) -> None:
    compare(recipe, ["bitfit", "linear"], 1, folder, progress)


def _search(recipe: Recipe, folder: Path, progress: Progress) -> None:
    compare(recipe, ["bitfit", "linear"], 1, folder, progress, Plan(search="random:1"))


def _cache(recipe: Recipe, folder: Path, progress: Progress) -> None:
    build_cache(recipe, progress)


def _auto(recipe: Recipe, folder: Path, progress: Progress) -> None:
    start(recipe.model_copy(update={"choose_losses": True}), folder, progress)


@pytest.mark.parametrize("command", [_compare, _search, _cache, _auto, start])
@pytest.mark.usefixtures("two_passes")
def test_a_weak_teacher_is_found_before_anything_is_trained(
    tiny: Any, noise: str, tmp_path: Path, watch: Callable[..., Any], command: Callable[..., None]
) -> None:
    """Twelve images: the message says that they are few, and gives the interval.

    The head that was fitted may be cached; no outputs are, and nothing is trained.
    """
    progress = watch(lambda done: None)
    with pytest.raises(
        TrainingError, match=r"on 12 evaluation images is \d+\.\d% \(.*not clearly above chance"
    ) as caught:
        command(tiny.recipe(data=noise, method="bitfit", losses="ce,kd"), tmp_path / "out", progress)
    assert "judge it by more images (--val-data)" in (caught.value.do or "")
    assert progress.steps == 0 and not list(tmp_path.rglob("metrics.jsonl"))
    assert not any("teacher outputs" in what for what in progress.waited)
    assert not [one for one in list_caches(cache_root()) if one.outputs]


def test_another_recipe_does_not_learn_from_the_teacher_that_was_refused(
    tiny: Any, noise: str, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    """The advice is followed in the same folder: the head that was fitted there is not taken for a tuned teacher."""
    out, options = tmp_path / "out", {"data": noise, "method": "bitfit", "losses": "ce,kd"}
    with pytest.raises(TrainingError, match="not clearly above chance"):
        _search(tiny.recipe(**options), out, watch(lambda done: None))
    assert (out / "teacher" / "task" / "task.json").is_file()
    progress = watch(lambda done: None)
    with pytest.raises(TrainingError, match="not clearly above chance"):
        _search(tiny.recipe("teacher.prepare=full", "teacher.epochs=1", **options), out, progress)
    assert any("tuning it (full)" in line for line in progress.said)


def test_a_head_that_was_refused_is_kept_and_refused_at_once(
    tiny: Any, noise: str, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    """It is what fitting gives on these images. What costs is not paid twice, and for the student not at all."""
    recipe, waited = tiny.recipe(data=noise, method="linear", losses="ce,kd"), list[set[str]]()
    for name in ("first", "second"):
        progress = watch(lambda done: None)
        with pytest.raises(TrainingError, match="not clearly above chance"):
            start(recipe, tmp_path / name, progress)
        waited.append({what for what in progress.waited if what.startswith(("teacher", "fitting", "frozen", "eval"))})
    assert waited[0] == {"teacher outputs", "fitting the classifier", "evaluating the teacher"}
    assert waited[1] == {"evaluating the teacher"}
