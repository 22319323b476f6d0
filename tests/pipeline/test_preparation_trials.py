"""``teacher.prepare: auto``: ways to prepare a teacher are judged by held-out training images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from remap.data.splits import ImageData, Split
from remap.data.views import View
from remap.errors import RecipeError, RemapError
from remap.io import atomic_write
from remap.pipeline import preparation_trials
from remap.pipeline.compare import compare
from remap.pipeline.components import build_components
from remap.pipeline.preparation_trials import FASTER, FEW, FOLDS, HELD_OUT, best_way, judged_parts, ways_to_prepare
from remap.pipeline.run import start, validate_inputs
from remap.pipeline.run_cost import preparation_cost
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_tuning import teacher_recipe
from remap.progress import Progress, Silent
from remap.recipe import Recipe, resolve
from remap.recipe.resolution import dump, validate
from remap.recipe.schema import BASE_WIDTH
from remap.runs.task import load_task

AUTO = ("teacher.prepare=auto", "teacher.epochs=2", "train.epochs=1")


def _tuning(recipe: Recipe) -> Recipe:
    return teacher_recipe(recipe, recipe.teachers[0])


def _data(images: int, classes: int = 3) -> ImageData:
    """So many labelled images of so many classes in turn."""
    labels = np.arange(images) % classes
    train = Split(tuple(map(str, range(images))), labels, lambda _: b"")
    return ImageData("own", tuple(map(str, range(classes))), train, Split.empty())


def _choose(
    recipe: Recipe, folder: Path, accuracies: dict[str, float], images: int = FEW, trials: list[Recipe] | None = None
) -> tuple[Recipe, list[str]]:
    """Drive the trials as a run does, with accuracies that are given; return the choice and what was run."""
    ways, ran = best_way(_tuning(recipe), _data(images), folder, "the teacher", Silent()), []
    try:
        while True:
            title, run_dir, trial, is_trial = next(ways)
            assert is_trial
            name = title.rpartition(", ")[2]
            assert run_dir.path == folder.with_name(f"teacher-trial-{name}")
            fold = trial.data.fold
            assert (fold is None, trial.data.held_out) == ((True, HELD_OUT) if images == FEW else (False, None))
            assert fold is None or name.endswith(f"-{fold.number}")
            assert trial.train.eval_every == trial.train.epochs
            for weights in (run_dir.task, run_dir.checkpoint):
                weights.mkdir()
            atomic_write.write_json(
                run_dir.path / "summary.json", {"student": {"accuracy": accuracies[name]}, "seconds": 1.0}
            )
            atomic_write.write_json(run_dir.path / "status.json", {"status": "done"})
            assert list(folder.parent.glob("*/task")) == [run_dir.task]  # those before are gone
            ran.append(name)
            if trials is not None:
                trials.append(trial)
    except StopIteration as ended:
        return ended.value, ran


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ({"probe": 0.5, "full": 0.7, "full-fast": 0.6}, "full"),
        ({"probe": 0.5, "full": 0.7, "full-fast": 0.8}, "full-fast"),
        ({"probe": 0.7, "full": 0.7, "full-fast": 0.7}, "probe"),  # of equal ones the cheapest
    ],
)
def test_the_best_on_held_out_images_is_taken(
    tiny: Any, tmp_path: Path, accuracies: dict[str, float], best: str
) -> None:
    recipe, folder = tiny.recipe(*AUTO, losses="ce,kd"), tmp_path / "teacher"
    chosen, ran = _choose(recipe, folder, accuracies)
    assert ran == ["probe", "full", "full-fast"]
    rate = _tuning(recipe).learning_rate(BASE_WIDTH)
    wanted = {"probe": ("linear", None), "full": ("full", None), "full-fast": ("full", FASTER * rate)}[best]
    assert (chosen.method.name, chosen.train.base_lr) == wanted
    assert chosen.data.held_out is None  # by all labelled images
    assert (chosen.train.fit, chosen.train.epochs) == (("logistic", 1) if best == "probe" else ("gradient", 2))
    # What has ended is not run again.
    assert _choose(recipe, folder, accuracies) == (chosen, [])


def test_few_labels_are_judged_by_each_of_them(tiny: Any, tmp_path: Path) -> None:
    """The mean over folds decides, where one fold alone would decide otherwise; weights of trials go as they end."""
    recipe, folder = tiny.recipe(*AUTO, losses="ce,kd"), tmp_path / "teacher"
    of_way = {"probe": (0.9, 0.1, 0.1, 0.1, 0.1), "full": (0.5,) * 5, "full-fast": (0.4,) * 5}
    accuracies = {f"{way}-{fold}": found[fold - 1] for way, found in of_way.items() for fold in range(1, FOLDS + 1)}
    trials: list[Recipe] = []
    chosen, ran = _choose(recipe, folder, accuracies, FEW - 1, trials)
    assert ran == list(accuracies) and chosen.data.fold is None
    assert (chosen.method.name, chosen.train.base_lr) == ("full", None)
    assert not [*tmp_path.glob("*/task"), *tmp_path.glob("*/checkpoint")]
    assert len(list(tmp_path.glob("*/summary.json"))) == len(ran)
    # Each training image judges once what was learned from those of the other folds; no evaluation image judges.
    labeled, judging = SharedResources().index(_tuning(recipe).data).train.names, list[str]()
    for trial in trials[:FOLDS]:
        views = SharedResources().open(trial.data, View(32, 1.0, "bicubic"), Silent())
        assert sorted(views.train.split.names + views.val.split.names) == sorted(labeled)
        judging += views.val.split.names
    assert sorted(judging) == sorted(labeled)


@pytest.mark.parametrize(("images", "parts"), [(FOLDS - 1, 1), (FOLDS, FOLDS), (FEW - 1, FOLDS), (FEW, 1)])
def test_many_labels_are_judged_by_a_share_of_them(tiny: Any, images: int, parts: int) -> None:
    tuning = _tuning(tiny.recipe(*AUTO, losses="ce,kd"))
    assert judged_parts(tuning, _data(images)) == parts
    held_out = tuning.data.model_copy(update={"held_out": 0.5})  # a trial of a run that is judged by these
    assert judged_parts(tuning.model_copy(update={"data": held_out}), _data(images)) == 1


@pytest.mark.parametrize(("images", "classes"), [(1, 1), (2, 1), (20, 20), (24, 20)])
def test_where_a_class_would_be_left_without_images_nothing_is_tried(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], images: int, classes: int
) -> None:
    tuning, data, spoken = _tuning(tiny.recipe(*AUTO, losses="ce,kd")), _data(images, classes), watch(lambda done: None)
    assert judged_parts(tuning, data) == 0
    with pytest.raises(StopIteration) as ended:  # no trial
        next(best_way(tuning, data, tmp_path / "teacher", "the teacher", spoken))
    assert (ended.value.value.method.name, ended.value.value.train.fit) == ("linear", "logistic")
    (said,) = spoken.said
    assert said.startswith("the teacher is prepared by probe: ") and said.endswith("are too few to judge by")


def test_a_run_with_one_label_a_class_fits_a_head(tiny: Any, tmp_path: Path) -> None:
    summary = start(tiny.recipe(*AUTO, "data.labels=3", "teacher.allow_weak=true", losses="ce,kd"), tmp_path / "run")
    assert summary.summary["teacher"]["head"] == "linear"


@pytest.mark.parametrize(
    ("words", "settings", "prepare"),
    [
        ({}, (), "auto"),
        ({"teacher": "vit_mini_conv_patch4_32.cifar10"}, (), "auto"),
        ({"teacher": "mini_student,mini_teacher"}, (), "auto"),
        ({"data": "digits"}, (), "probe"),
        ({"teacher": "self"}, (), "probe"),
        ({"teacher": "vit_small"}, (), "probe"),
        ({}, ("teacher.prepare=probe",), "probe"),
        ({}, ("teacher.weights=none",), "probe"),
        ({}, ("teacher.calibrate=true",), "probe"),
        ({}, ("teacher.folds=3",), "probe"),
        ({}, ("data.held_out=0.3",), "probe"),
    ],
)
def test_embedded_models_are_prepared_by_the_best_way_on_images_of_ones_own(
    tiny: Any, words: dict[str, str], settings: tuple[str, ...], prepare: str
) -> None:
    """A saved recipe says it, so that a run of an earlier version is resumed as it was."""
    given = {"data": tiny.data, "teacher": "mini_teacher", "student": "mini_student", **words}
    recipe = resolve(words=given, settings=settings)
    assert {spec.prepare for spec in recipe.teachers} == {prepare}
    assert validate(yaml.safe_load(dump(recipe)), "saved").teachers == recipe.teachers


def test_a_named_rate_is_the_only_one(tiny: Any) -> None:
    ways = ways_to_prepare(_tuning(tiny.recipe(*AUTO, "teacher.lr=1e-3", losses="ce,kd")))
    assert {name: way.train.lr for name, way in ways.items()} == {"probe": None, "full": 1e-3}


def test_the_teacher_is_the_one_that_its_way_gives(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    """Bit for bit that of the way by name; the trials, as large as the teacher, are removed."""
    spoken = watch(lambda done: None)
    run = tmp_path / "auto"
    summary = start(tiny.recipe(*AUTO, losses="ce,kd"), run, spoken).summary
    (said,) = [line for line in spoken.said if "is prepared by" in line]
    best = said.partition("is prepared by ")[2].partition(" (")[0]
    accuracies = {
        name: float(share.rstrip("%)"))
        for name, share in (pair.rsplit(" ", 1) for pair in said.partition(": ")[2].split(", "))
    }
    assert best == max(accuracies, key=lambda name: accuracies[name])
    assert not list(run.glob("teacher-trial-*"))
    way = ways_to_prepare(_tuning(tiny.recipe(*AUTO, losses="ce,kd")))[best]
    assert summary["teacher"]["head"] == way.method.name
    by_hand = tmp_path / "by-hand"
    start(way, by_hand)
    ours, theirs = (load_task(folder)[0].model.state_dict() for folder in (run / "teacher", by_hand))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_comparison_chooses_once(
    tiny: Any, tmp_path: Path, watch: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation_trials, "FEW", 0)
    spoken: Any = watch(lambda done: None)
    table = compare(tiny.recipe(*AUTO, losses="ce,kd"), ["linear", "bitfit"], 2, tmp_path / "cmp", spoken)
    assert len([line for line in spoken.said if "is prepared by" in line]) == 1
    assert table["teacher"]["head"] in ("linear", "full")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("teacher.calibrate=true", "teacher.calibrate: holds images out, as teacher.prepare=auto does"),
        ("teacher.folds=2", "teacher.folds: holds images out, as teacher.prepare=auto does"),
        ("data.held_out=0.5", "data.held_out: teacher.prepare: auto cannot hold out training images besides"),
    ],
)
def test_images_are_held_out_once(tiny: Any, setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate_inputs(tiny.recipe(*AUTO, setting, losses="ce,kd"), SharedResources())
    assert message in str(caught.value)


@pytest.mark.parametrize(("few", "parts"), [(0, 1), (10_000, FOLDS)])
def test_the_dry_run_counts_the_trials(tiny: Any, monkeypatch: pytest.MonkeyPatch, few: int, parts: int) -> None:
    """Two of the three ways tune all weights, on 80 % of the images; the disk holds one teacher at a time."""
    monkeypatch.setattr(preparation_trials, "FEW", few)
    costs = {}
    for way in ("auto", "full"):
        recipe, shared = tiny.recipe(*AUTO, f"teacher.prepare={way}", losses="ce,kd"), SharedResources()
        components = build_components(recipe, None, Silent(), shared)
        costs[way] = preparation_cost(components, 0, 1.0, None, Silent(), shared)
    assert costs["auto"][0] == pytest.approx((1 + 2 * (1 - HELD_OUT) * parts) * costs["full"][0])
    assert costs["auto"][1] == costs["full"][1]


def test_an_unknown_way_is_refused(tiny: Any) -> None:
    with pytest.raises(RemapError, match=r"teacher\.prepare: unknown word 'automatic'"):
        tiny.recipe("teacher.prepare=automatic", losses="ce,kd")
