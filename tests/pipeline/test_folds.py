"""``teacher.folds``: each labelled image is answered by a teacher that was prepared without it (cross-fitting)."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from remap.cache.cache_folders import cache_root
from remap.cache.cache_listing import list_caches
from remap.cache.teacher_cache import InMemory
from remap.data.splits import ImageData, Split
from remap.data.stratify import folds
from remap.engine.teacher import Teacher
from remap.errors import DataError, RecipeError, RunError
from remap.network import Network, Runner
from remap.pipeline.build_cache import build_cache, prepared_components
from remap.pipeline.compare import compare
from remap.pipeline.components import RunComponents
from remap.pipeline.dry_run import estimate
from remap.pipeline.logistic import STRENGTHS, fit_each_class, fit_logistic
from remap.pipeline.probe import pooled_features
from remap.pipeline.repeat import repeat
from remap.pipeline.run import resume, run, start
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import teachers_in_training
from remap.pipeline.teacher_tuning import require_folds, teacher_recipe
from remap.progress import Silent
from remap.recipe import Recipe
from remap.remapping.targets import LOGITS
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task

TRAIN, VAL, TEACHER = 24, 9, 24
FOLDS = ("teacher.folds=3", "teacher.allow_weak=true", "train.epochs=1", "train.precision=fp32")
TUNED = (*FOLDS, "teacher.prepare=bitfit", "teacher.epochs=1", "teacher.lr=0.01")

FOLDERS = ["teacher", "teacher-fold-1", "teacher-fold-2", "teacher-fold-3"]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_each_image_is_in_one_fold_and_classes_are_in_proportion(count: int) -> None:
    draws = np.random.default_rng(0)
    labels = draws.choice(5, 103, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    fold_N = folds(labels, count)
    assert fold_N.shape == (103,) and set(fold_N.tolist()) == set(range(count))
    assert np.ptp(np.bincount(fold_N)) <= 1
    for label in range(5):
        assert np.ptp(np.bincount(fold_N[labels == label], minlength=count)) <= 1
    assert np.array_equal(fold_N, folds(labels, count))
    assert not np.array_equal(fold_N, np.arange(103) % count), "drawn, not dealt out in the order of the listing"


def test_images_of_several_labels_are_divided_by_each_of_them() -> None:
    labels_NC = (np.random.default_rng(0).random((120, 3)) < (0.5, 0.25, 0.1)).astype(np.int8)
    fold_N = folds(labels_NC, 4)
    assert np.bincount(fold_N).tolist() == [30] * 4
    counts = np.array([labels_NC[fold_N == fold].sum(0) for fold in range(4)])
    assert (np.ptp(counts, axis=0) <= 3).all()


def in_training(recipe: Recipe, shared: SharedResources | None = None) -> tuple[RunComponents, Teacher]:
    """The teacher as a run has it, with its outputs cached."""
    recipe, shared = recipe.written_out(), shared or SharedResources()
    with prepared_components(recipe, Silent(), shared) as components:
        (teacher,) = teachers_in_training(components, shared, Silent())
    return components, teacher


def rows(teacher: Teacher, count: int = TRAIN, view: int = 0) -> torch.Tensor:
    assert teacher.cached is not None
    return teacher.cached.rows(np.random.default_rng(1).permutation(count), view)[LOGITS].double()[
        np.argsort(np.random.default_rng(1).permutation(count))
    ]


def logits_of(network: Network, components: RunComponents) -> torch.Tensor:
    images, _ = components.views.train.batch(np.arange(TRAIN))
    network.model.eval()
    with torch.no_grad():
        return Runner(network)(images).logits_BC.double()


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_answers_are_those_of_a_regression_on_the_other_folds(tiny: Any, cache: str) -> None:
    """Source: scikit-learn's regression on the standardised features of the complement, evaluated in float64."""
    recipe = tiny.recipe(*FOLDS, f"teacher.cache={cache}", losses="ce,kd,feature")
    components, teacher = in_training(recipe)
    train = components.views.train
    features_ND, labels_N = pooled_features(teacher.network, train, 8, Silent(), "features")
    found, fold_N = rows(teacher), folds(labels_N, 3)
    for fold in range(3):
        others, own = fold_N != fold, fold_N == fold
        mean_D, std_D = features_ND[others].mean(0), features_ND[others].std(0) + 1e-6
        strength = fit_logistic(features_ND[others], labels_N[others]).strength
        assert strength in STRENGTHS
        standard_ND = (features_ND - mean_D) / std_D
        model = LogisticRegression(C=strength, max_iter=5000).fit(standard_ND[others], labels_N[others])
        expected = torch.from_numpy(model.predict_log_proba(standard_ND[own]))
        assert torch.allclose(found[own].log_softmax(1), expected, atol=2e-3)
        of_all = logits_of(teacher.network, components)[own].log_softmax(1)
        assert not torch.allclose(of_all, expected, atol=2e-3), "the teacher of all labels answers otherwise"


@pytest.fixture(scope="module")
def of_sets(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """30 images of noise in which any of three channels are raised."""
    root, draws = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    lines = ["file,labels"]
    for number in range(30):
        has = draws.random(3) < 0.5
        pixels = draws.integers(0, 120, (16, 16, 3)) + 110 * has
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
        lines.append(f"{number}.png,{'|'.join(np.array(['red', 'green', 'blue'])[has])}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")

    def make(*settings: str) -> Recipe:
        return tiny.recipe("task=multilabel", *settings, losses="ce,kd", data=f"csv:{root}/labels.csv,separator=|")

    return make


@pytest.mark.parametrize("prepare", ["probe", "bitfit"])
def test_answers_of_several_labels_are_those_of_the_other_folds(
    of_sets: Callable[..., Recipe], tmp_path: Path, prepare: str
) -> None:
    """Source: scikit-learn's regression of each class on the complement, or a teacher tuned on it by hand."""
    recipe = of_sets(*(FOLDS if prepare == "probe" else TUNED), "teacher.folds=2").written_out()
    components, teacher = in_training(recipe)
    train = components.views.train
    found, labels_NC = rows(teacher, len(train.split)), train.split.labels
    features_ND, _ = pooled_features(teacher.network, train, 8, Silent(), "features")
    for fold in (0, 1):
        others, own = folds(labels_NC, 2) != fold, np.flatnonzero(folds(labels_NC, 2) == fold)
        if prepare == "probe":
            mean_D, std_D = features_ND[others].mean(0), features_ND[others].std(0) + 1e-6
            standard_ND, strength = (
                (features_ND - mean_D) / std_D,
                fit_each_class(features_ND[others], labels_NC[others]),
            )
            models = [
                LogisticRegression(C=strength.strength, max_iter=5000).fit(
                    standard_ND[others], labels_NC[others, label]
                )
                for label in range(3)
            ]
            expected = torch.from_numpy(np.stack([one.decision_function(standard_ND[own]) for one in models], 1))
        else:
            by_hand = teacher_recipe(recipe, recipe.teachers[0], fold + 1)
            run(
                by_hand, RunDir.create(tmp_path / f"{fold}", by_hand), shared=SharedResources(use_stored_teachers=False)
            )
            expected = logits_of_images(load_task(tmp_path / f"{fold}")[0], components, own)
        assert torch.allclose(found[own], expected, atol=2e-3)


@pytest.mark.parametrize("settings", [(), ("teacher.calibrate=true", "teacher.balance=0.5"), ("train.keep=best",)])
def test_answers_are_those_of_teachers_that_are_tuned_by_hand(
    tiny: Any, tmp_path: Path, watch: Any, settings: tuple[str, ...]
) -> None:
    """Each by its own recipe in a run of its own, and where nothing changes its logits, asked directly."""
    recipe = tiny.recipe(*TUNED, *settings, losses="ce,kd").written_out()
    components, teacher = in_training(recipe)
    count = len(components.views.train.split)
    assert teacher.cached is not None
    found = teacher.cached.rows(np.arange(count), 0)[LOGITS].double()
    fold_N = folds(components.views.train.split.labels, 3)
    for fold in (1, 2, 3):
        by_hand = teacher_recipe(recipe, recipe.teachers[0], fold)
        shared = SharedResources(use_stored_teachers=False)
        run(by_hand, RunDir.create(tmp_path / f"{fold}", by_hand), shared=shared)
        learned = set(shared.index(by_hand.data).train.names)
        own = np.flatnonzero(fold_N == fold - 1)
        names = components.views.train.split.names
        assert not learned & {names[index] for index in own}
        network, _ = load_task(tmp_path / f"{fold}")
        expected = logits_of_images(network, components, own)
        if "teacher.calibrate=true" in settings:  # a temperature and a shift: the order of two images stays
            assert not torch.allclose(found[own], expected, atol=1e-3)
            difference = found[own] - found[own][:1], expected - expected[:1]
            factor = difference[0][1:] / difference[1][1:]
            assert torch.allclose(factor, factor[0, 0].expand_as(factor), rtol=1e-2)
            assert len(learned) == round(0.8 * 16)
        else:
            assert torch.allclose(found[own], expected, atol=1e-5)
            assert len(learned) == count - len(own)


def test_a_fitted_head_is_changed_by_images_outside_of_its_fold(tiny: Any, tmp_path: Path, watch: Any) -> None:
    """A fifth of the 16 images of two folds; the network's weights are rounded for training only afterwards."""
    said = watch(lambda done: None)
    settings = (*FOLDS[:-1], "train.precision=bf16", "teacher.calibrate=true", "teacher.balance=0.5")
    start(tiny.recipe(*settings, losses="ce,kd"), tmp_path / "run", said)
    for fold in (1, 2, 3):
        title = f"the teacher without fold {fold} of 3"
        assert [line for line in said.said if line.startswith(f"{title} is calibrated on 3 training images")]
        assert [line for line in said.said if line.startswith(f"{title} is balanced on 13 images")]


def logits_of_images(network: Network, components: RunComponents, indices: np.ndarray) -> torch.Tensor:
    images, _ = components.views.train.batch(indices)
    network.model.eval()
    with torch.no_grad():
        return Runner(network)(images).logits_BC.double()


def test_images_without_labels_are_answered_by_the_teacher_of_all_labels(tiny: Any) -> None:
    """12 labelled images come first, then the 12 others."""
    for cache in ("memory", "disk"):
        components, teacher = in_training(
            tiny.recipe(*FOLDS, "data.labels=12", f"teacher.cache={cache}", losses="ce,kd")
        )
        found = rows(teacher)
        source = components.training_source
        images, _ = source.batch(np.arange(TRAIN))
        with torch.no_grad():
            of_all = Runner(teacher.network)(images).logits_BC.double()
        assert torch.allclose(found[12:], of_all[12:], atol=1e-5)
        assert not torch.isclose(found[:12], of_all[:12], atol=1e-3).all(1).any()


def test_one_pass_serves_the_heads_of_all_folds_and_their_answers(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest_difference: Any
) -> None:
    counts: Counter = Counter()
    forward = Runner.forward

    def count(self: Runner, images: Any, kept: Any = None) -> Any:
        if images.numel() and images.any():
            counts[self.model.embed_dim] += len(images)
        return forward(self, images, kept)

    monkeypatch.setattr(Runner, "forward", count)
    monkeypatch.setattr("remap.pipeline.run.write_evidence", lambda *_: None)
    first = start(tiny.recipe(*FOLDS, losses="ce,kd,feature"), tmp_path / "first")
    assert counts[TEACHER] == TRAIN + VAL
    stored = [cache for cache in list_caches(cache_root()) if not cache.outputs]
    assert len(stored) == 4 and {one.key["method"] for one in stored} == {"probe"}
    counts.clear()
    second = start(tiny.recipe(*FOLDS, losses="ce,kd,feature"), tmp_path / "second")
    assert counts[TEACHER] == TRAIN + VAL, "three batches, each of one fold's images; the heads were stored"
    assert largest_difference(second.student.trained, first.student.trained) == 0.0
    assert first.summary["teacher"]["folds"] == 3
    plain = start(tiny.recipe(*FOLDS[1:], losses="ce,kd,feature"), tmp_path / "plain")
    assert plain.summary["teacher"]["accuracy"] == first.summary["teacher"]["accuracy"]
    assert largest_difference(plain.student.trained, first.student.trained) > 0.0


def test_views_and_storage_change_nothing(tiny: Any, tmp_path: Path, largest_difference: Any) -> None:
    """Outputs in memory, on disk, from a build beforehand, and of a repeat; the listing shows a store for each fold."""
    settings = (*FOLDS, "data.augment=shift", "data.views=2", "train.epochs=2")
    in_memory = start(tiny.recipe(*settings, losses="ce,kd"), tmp_path / "memory")
    built = build_cache(tiny.recipe(*settings, losses="ce,kd"))
    assert [(one["fold"], one["images"], one["computed"]) for one in built] == [(1, 16, 16), (2, 16, 16), (3, 16, 16)]
    on_disk = start(tiny.recipe(*settings, losses="ce,kd"), tmp_path / "disk")
    assert on_disk.summary["teacher"]["outputs"] == "disk", "auto takes what was built"
    assert largest_difference(on_disk.student.trained, in_memory.student.trained) == 0.0
    assert sorted(one.images for one in list_caches(cache_root()) if one.outputs) == [16, 16, 16]
    assert repeat(tmp_path / "memory", tmp_path / "again")["equal"]


def test_tuned_teachers_of_folds_are_stored_and_resumed(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], largest_difference: Any
) -> None:
    recipe = tiny.recipe(*TUNED, losses="ce,kd")
    said = watch(lambda done: None)
    first = start(recipe, tmp_path / "first", said)
    assert [line for line in said.said if "without fold 2 of 3 has no head" in line]
    assert sorted(path.name for path in (tmp_path / "first").glob("teacher*")) == FOLDERS
    again = watch(lambda done: None)
    second = start(recipe, tmp_path / "second", again)
    assert sum("was tuned on these images before" in line for line in again.said) == 4
    assert largest_difference(second.student.trained, first.student.trained) == 0.0

    class Stop(Exception):
        pass

    def stop(text: str) -> None:
        if "without fold 3 of 3" in text and "tuning" in text:
            raise Stop

    stopping = watch(lambda done: None)
    say = stopping.say
    stopping.say = lambda text: (say(text), stop(text))
    own = tiny.recipe(*TUNED, "seed=7", losses="ce,kd")
    with pytest.raises(Stop):
        start(own, tmp_path / "cut", stopping)
    progress = watch(lambda done: None)
    resumed = resume(tmp_path / "cut", progress)
    assert not any("without fold 2 of 3" in line and "tuning" in line for line in progress.said)
    complete = start(own, tmp_path / "complete")
    assert largest_difference(resumed.student.trained, complete.student.trained) == 0.0


def test_a_comparison_shares_the_teachers_of_all_folds(tiny: Any, tmp_path: Path) -> None:
    """Folds are the same for every seed, so those of the second seed's images are those of the first's teachers."""
    recipes = [tiny.recipe(*TUNED, losses="ce,kd", seed=seed) for seed in (0, 1)]
    shared = SharedResources(teacher_folder=tmp_path / "teacher")
    found = []
    for recipe in recipes:
        _, teacher = in_training(recipe, shared)
        found.append(rows(teacher))
        shared.targets.clear()
    assert torch.equal(*found)
    assert sorted(path.name for path in tmp_path.glob("teacher*")) == FOLDERS


@pytest.mark.parametrize(
    ("settings", "words", "line"),
    [
        (("teacher.prepare=none",), {}, "teacher.folds: prepare=none learns from no labelled image"),
        ((), {"losses": "ce,feature"}, "teacher.folds: no loss reads logits"),
        (("data.labels=12", "data.unlabeled_only=true"), {"losses": "kd"}, "teacher.folds: the student learns from no"),
        (("data.augment=light",), {}, "teacher.folds: each image's own teacher answers before training, but views are"),
        (("data.mixup=0.5",), {}, "teacher.folds: each image's own teacher answers before training, but mixed images"),
        (("teacher.cache=off",), {}, "teacher.folds: each image's own teacher answers before training, and cache=off"),
        (
            ("teacher.joint=true",),
            {"method": "slad"},
            "teacher.folds: a teacher that is trained along with it",
        ),
        ((), {"teacher": "self"}, "teacher.folds: a teacher that is made of the student has no folds"),
        (("teacher.prepare=lora",), {"losses": "auto"}, "teacher.folds: losses: auto would tune 3 more teachers"),
        (("data.fold={number: 1, of: 3}",), {}, "data.fold: teacher.folds sets it for its teachers"),
        (("teacher.folds=1",), {}, "teacher.folds: "),
    ],
)
def test_what_does_not_fit_is_refused(tiny: Any, settings: tuple[str, ...], words: dict[str, str], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny.recipe("teacher.folds=3", *settings, **{"losses": "ce,kd", **words})
    assert [found for found in caught.value.problems if found.startswith(line)], caught.value.problems


def test_too_few_images_and_teachers_that_bring_a_head_are_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer labelled images than folds"):
        start(tiny.recipe("teacher.folds=25", losses="ce,kd"), tmp_path / "run")
    with pytest.raises(DataError, match="a class of one labelled image"):
        start(tiny.recipe("teacher.folds=2", "data.labels=3", losses="ce,kd"), tmp_path / "run")
    start(tiny.recipe(losses="ce", method="linear"), tmp_path / "tuned")
    with pytest.raises(RunError, match="brings its head"):
        start(tiny.recipe("teacher.folds=2", teacher=str(tmp_path / "tuned"), losses="ce,kd"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_with_one_readable_image_is_refused(tiny: Any, tmp_path: Path) -> None:
    """It has two; the teacher that answers the sound one would have learned from no image of the class."""
    shutil.copytree(tiny.data, tmp_path / "data")
    bad, _, *others = sorted((tmp_path / "data" / "train" / "red").iterdir())
    bad.write_bytes(b"not an image")
    for path in others:
        path.unlink()
    recipe = tiny.recipe("teacher.folds=2", losses="ce,kd")
    data = recipe.data.model_copy(update={"source": str(tmp_path / "data")})
    with pytest.raises(DataError, match="all in one fold, as far as they can be read") as caught:
        start(recipe.model_copy(update={"data": data}), tmp_path / "run")
    assert caught.value.given == "red"


def test_a_comparison_refuses_them_before_its_folder_is_made(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a class of one labelled image"):
        compare(
            tiny.recipe("teacher.folds=2", "data.labels=3", losses="ce,kd"), ["linear"], 1, tmp_path / "c", Silent()
        )
    assert not (tmp_path / "c").exists()


def test_a_class_whose_images_are_all_in_one_fold_is_refused(of_sets: Callable[..., Recipe]) -> None:
    """The four images of the third class follow rarer classes into one fold; found by trying random labels."""
    rows = ["11111", "00011", "01101", "01000", "01100", "00011", "00100", "11011", "10000"]
    labels_NC = np.array([list(map(int, row)) for row in rows], np.int8)
    fold_N = folds(labels_NC, 2)
    assert labels_NC[:, 2].sum() == 4 and len(set(fold_N[labels_NC[:, 2] == 1])) == 1
    train = Split(tuple("abcdefghi"), labels_NC, lambda _index: b"")
    data: Any = ImageData("set", tuple("vwxyz"), train, train)
    shared: Any = SimpleNamespace(index=lambda _spec: data)
    with pytest.raises(DataError, match="a class whose labelled images are all in one fold") as caught:
        require_folds(of_sets("teacher.folds=2"), shared)
    assert caught.value.given == "x"


def test_a_dry_run_counts_the_teachers_of_all_folds(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # All passes take the same time, on a busy machine too.
    clock = nullcontext(SimpleNamespace(seconds=0.01))
    monkeypatch.setattr("remap.pipeline.profile_step.Timer", lambda _device: clock)
    alone, with_folds = (
        estimate(tiny.recipe(*TUNED[1:], *more, losses="ce,kd"), Silent())["estimate"] for more in ((), TUNED[:1])
    )
    more = with_folds["disk_bytes"] - alone["disk_bytes"]
    teacher = alone["disk_bytes"] - alone["run_bytes"] - alone["disk_cache_bytes"]
    assert more == 3 * teacher > 0
    assert with_folds["preparing_seconds"] > alone["preparing_seconds"]


def test_an_unreadable_image_moves_no_other_to_another_fold(tiny: Any, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny.data, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "train").glob("*/*.png"))[5]
    broken.write_bytes(b"no image")
    recipe = tiny.recipe(*FOLDS, "data.max_bad=0.5", losses="ce,kd", data=str(tmp_path / "data"))
    components, teacher = in_training(recipe)
    (prepared,) = components.teachers
    assert prepared.folds is not None and len(components.views.train.split) == TRAIN - 1
    whole = folds(components.views.data.train.labels, 3) + 1
    assert np.array_equal(prepared.folds.fold_of_N, np.delete(whole, 5))
    assert isinstance(teacher.cached, InMemory) and len(teacher.cached.readable()) == TRAIN - 1


def test_older_digests_stay(tiny: Any) -> None:
    recipe = tiny.recipe()
    values = json.loads(recipe.model_dump_json())
    assert values["teacher"]["folds"] is None and values["data"]["fold"] is None
    assert tiny.recipe("teacher.folds=2").digest() != recipe.digest()
