"""A teacher is frozen for good, gets a head that an independent solver agrees with, and must know something."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from remap.data.splits import Split
from remap.data.stratify import stratified
from remap.data.views import View, ViewSource
from remap.engine.optim import learning_rate
from remap.errors import DataError, TrainingError
from remap.network import Network, Runner
from remap.pipeline import probe, teacher_tuning, weak_teachers
from remap.pipeline.components import build_components
from remap.pipeline.dry_run import estimate
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.pipeline.run import Result, resume, start
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_tuning import teacher_recipe
from remap.pipeline.weak_teachers import require_useful
from remap.progress import Silent
from remap.recipe import resolve_distill
from remap.recipe.schema import TeacherSpec
from remap.recipe.teacher_checks import idle_options
from remap.runs.interval import Measured, share_of
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("prepare", ["probe", "full"])
def test_the_teacher_is_the_same_to_the_last_bit_after_training(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any], cache: str, prepare: str
) -> None:
    kept: list[tuple[Network, dict]] = []
    keep = weak_teachers.require_useful

    def note(teacher: PreparedTeacher, *rest: Any) -> None:
        kept.append((teacher.network, copy.deepcopy(teacher.network.model.state_dict())))
        keep(teacher, *rest)

    modes: list[bool] = []

    def look(done: int) -> None:
        if kept:
            modes.append(any(module.training for module in kept[0][0].model.modules()))

    monkeypatch.setattr(weak_teachers, "require_useful", note)
    settings = (f"teacher.cache={cache}", f"teacher.prepare={prepare}", "teacher.lr=0.01", "data.augment=shift")
    start(tiny.recipe(*settings, method="full", losses="ce,kd,attention,feature"), tmp_path / "run", watch(look))
    teacher, before = kept[0]
    after = teacher.model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert len(modes) == 6 and not any(modes), "the teacher was in training mode during a step"
    assert all(not p.requires_grad and p.grad is None for p in teacher.model.parameters())
    teacher.model.train()
    assert not any(module.training for module in teacher.model.modules())


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_the_probe_equals_scikit_learn_on_standardised_features(tiny: Any, classes: int) -> None:
    """Expected: the same penalised problem solved by Newton's method, with features standardised by hand."""
    network, source = _network(tiny, classes), _Noise(30, classes)
    strength = probe.fit_probe(network, source, 7, Silent())
    assert strength in probe.STRENGTHS
    features, labels = _features(network, source), source.split.labels
    mean, std = features.mean(0), features.std(0)
    solver = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10, max_iter=10_000)
    expected = solver.fit((features - mean) / std, labels)
    with torch.no_grad():
        logits = network.model.head(torch.from_numpy(features).float()).double().softmax(-1).numpy()
    # L-BFGS stops at a gradient of 1e-4.
    assert np.abs(logits - expected.predict_proba((features - mean) / std)).max() < 2e-3


def test_the_penalty_is_chosen_without_the_evaluation_images(tiny: Any) -> None:
    """Expected: the best score on the held-out fifth, by hand, first one of equals."""
    network, source = _network(tiny, 3), _Noise(60, 3)
    found = probe.fit_probe(network, source, 16, Silent())
    features, labels = _features(network, source), source.split.labels
    standard = (features - features.mean(0)) / features.std(0)
    fit, check = stratified(labels, 48)
    assert not set(fit) & set(check)
    models = [LogisticRegression(C=c, max_iter=2000).fit(standard[fit], labels[fit]) for c in probe.STRENGTHS]
    scores = [model.score(standard[check], labels[check]) for model in models]
    assert found == probe.STRENGTHS[int(np.argmax(scores))]


def test_a_class_without_readable_images_never_wins(tiny: Any) -> None:
    network, source = _network(tiny, 3), _Noise(30, 3, missing=1)
    probe.fit_probe(network, source, 8, Silent())
    images, good = source.batch(range(30))
    with torch.no_grad():
        said = Runner(network)(images).logits_BC.argmax(-1)
    assert set(said.tolist()) <= {0, 2}
    assert (said.numpy() == source.split.labels[good]).mean() > 0.9


def test_very_few_images_still_give_a_head(tiny: Any) -> None:
    """One image a class: the held-out fifth is empty or holds no class that was fitted."""
    for classes in (2, 3):
        network, source = _network(tiny, classes), _Noise(classes, classes)
        probe.fit_probe(network, source, 8, Silent())
        images, _ = source.batch(range(classes))
        with torch.no_grad():
            assert Runner(network)(images).logits_BC.argmax(-1).tolist() == list(range(classes))


def test_one_readable_class_is_too_few(tiny: Any) -> None:
    with pytest.raises(DataError, match="two classes at least"):
        probe.fit_probe(_network(tiny, 2), _Noise(10, 2, missing=1), 8, Silent())


def test_the_prepared_teacher_is_kept_and_found_again(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    result = start(tiny.recipe(), tmp_path / "run")
    network, _ = load_task(RunDir(tmp_path / "run").teacher)
    assert network.classes == ("blue", "green", "red")
    assert result.summary["teacher"]["head"] == "probe"
    assert result.summary["teacher"]["accuracy"] == 1.0, "colours are linear in the pixels"
    (tmp_path / "run" / "summary.json").unlink()
    remarks = watch(lambda done: None)
    again = resume(tmp_path / "run", remarks)
    assert not any("preparing" in line for line in remarks.said)
    assert again.summary["teacher"] == result.summary["teacher"]


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        (("teacher.prepare=probe", "teacher.epochs=2", "teacher.lr=0.1"), ["teacher.epochs", "teacher.lr"]),
        (("teacher.prepare=full", "teacher.epochs=2", "teacher.lr=0.1"), []),
        (("teacher.decay=0.9", "data.mix_probability=0.5"), ["teacher.decay", "data.mix_probability"]),
        (
            ("teacher.top_k=3", "teacher.cache_dtype=fp16", "data.augment=light"),
            ["teacher.top_k", "teacher.cache_dtype"],
        ),
        (("teacher.top_k=3", "teacher.cache_dtype=fp16", "data.augment=light", "data.views=4"), []),
        (("teacher.weight=0.5", "teacher.shard=on"), ["teacher.shard", "teacher.weight"]),
        (
            (
                "losses.kd.weight_schedule={warmup_epochs: 20}",
                "losses.ce.weight_schedule={warmup_epochs: 4}",
                "train.epochs=4",
            ),
            ["losses.kd.weight_schedule: the run of 4 epochs ends before it (warmup_epochs: 20)"],
        ),
        (("teacher=ema", "teacher.decay=0.9", "data.mix_probability=0.5", "data.mixup=1"), []),
    ],
)
def test_options_without_effect_are_named(settings: tuple[str, ...], idle: list[str]) -> None:
    teacher = {"teacher": "ema"} if settings[0] == "teacher=ema" else {}
    recipe = resolve_distill(None, teacher, settings[1:] if teacher else settings)
    assert [line.partition(" has no effect: ")[0] for line in idle_options(recipe, 1)] == idle
    assert not any(line.startswith("teacher.shard") for line in idle_options(recipe, 2))


def test_a_run_says_which_options_have_no_effect(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    progress = watch(lambda done: None)
    start(tiny.recipe("teacher.epochs=2"), tmp_path / "run", progress)
    assert [line for line in progress.said if "no effect" in line] == [
        "note: teacher.epochs has no effect: teacher.prepare=probe tunes nothing"
    ]


def test_a_teacher_on_random_weights_reloads(tiny: Any, tmp_path: Path) -> None:
    """Its frozen weights exist nowhere else, so the prepared teacher must hold them."""
    recipe = tiny.recipe("teacher.weights=none", "student.weights=none", "teacher.allow_weak=true")
    assert start(recipe, tmp_path / "run").summary["teacher"]["head"] == "probe"


def test_a_teacher_at_chance_is_stopped_and_explained(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe("teacher.prepare=full", "teacher.lr=1e-9", "teacher.epochs=1")
    with pytest.raises(TrainingError, match="not clearly above chance") as caught:
        start(recipe, tmp_path / "run")
    assert "33.3%" in caught.value.what and "teacher.allow_weak=true" in (caught.value.do or "")
    assert RunDir(tmp_path / "run").status() == "failed"
    assert not RunDir(tmp_path / "run").checkpoint.exists(), "the student was trained all the same"


def test_allow_weak_goes_on(tiny: Any, tmp_path: Path) -> None:
    settings = ("teacher.prepare=full", "teacher.lr=1e-9", "teacher.epochs=1", "teacher.allow_weak=true")
    result: Result = start(tiny.recipe(*settings), tmp_path / "run")
    assert result.summary["teacher"]["accuracy"] < 0.7
    assert RunDir(tmp_path / "run").status() == "done"


@pytest.mark.parametrize(
    ("accuracy", "untrained", "says"),
    [
        (0.64, 0.2, "not clearly above chance"),  # 60 of 100: 0.6 + 1.96 * 0.049 = 0.696
        (0.59, 0.2, "not clearly above chance"),  # 50 of 100: 0.5 + 1.96 * 0.05 = 0.598
        (0.90, 0.99, "clearly below the untrained student's 99.0%"),  # the difference is at most -0.027
        (0.90, 0.95, None),  # or at least 0.026: they cannot be told apart
        (0.60, 0.2, None),
        (1.00, 0.2, None),
    ],
)
def test_the_interval_has_to_lie_above_chance(tiny: Any, accuracy: float, untrained: float, says: str | None) -> None:
    """By hand: 50 (or, for 0.64, 60) of 100 images in the largest class.

    Wilson's interval holds the p that a score test accepts, so it begins above p for accuracies above
    p + 1.96 sqrt(p (1 - p) / 100).
    """
    largest = 60 if accuracy == 0.64 else 50
    labels = np.asarray([0] * largest + [1] * (100 - largest))
    source = ViewSource(Split(("",) * 100, labels, lambda index: b""), View(16, 1.0, "bicubic"), memory_bytes=0)
    teacher = PreparedTeacher(_network(tiny, 2), TeacherSpec(), "key", "probe", share_of(accuracy, 100))
    student = share_of(untrained, 100)
    if says is None:
        require_useful(teacher, student, source)
        return
    with pytest.raises(TrainingError, match=says):
        require_useful(teacher, student, source)
    require_useful(replace(teacher, spec=TeacherSpec(allow_weak=True)), student, source)


@pytest.mark.parametrize("labels", [[0], [0, 1], [0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0]])
def test_a_teacher_that_is_right_on_few_images_may_teach(tiny: Any, labels: list[int]) -> None:
    """The interval of 3 of 3 begins at 44 %: nobody is clearly above 2 of 3. One mistake is too many then."""
    count = len(labels)
    source = ViewSource(
        Split(("",) * count, np.asarray(labels), lambda i: b""), View(16, 1.0, "bicubic"), memory_bytes=0
    )
    perfect, other = (
        PreparedTeacher(_network(tiny, 2), TeacherSpec(), "key", "probe", share_of(right / count, count))
        for right in (count, count - 1)
    )
    require_useful(perfect, None, source)
    with pytest.raises(TrainingError, match="not clearly above chance"):
        require_useful(other, None, source)


@pytest.mark.parametrize(
    ("teacher", "untrained", "says"),
    [
        ((0.7, 0.55, 0.8), None, r"mAP on 40 evaluation images is 70.0% \(55.0-80.0\): not clearly above chance"),
        ((0.7, 0.65, 0.8), (0.72, 0.6, 0.8), None),  # 0.02 less, which the intervals cannot tell from 0
        ((0.7, 0.65, 0.8), (0.95, 0.9, 1.0), r"clearly below the untrained student's 95.0% \(90.0-100.0\)"),
    ],
)
def test_a_map_is_judged_by_its_interval_too(
    tiny: Any, teacher: tuple[float, ...], untrained: tuple[float, ...] | None, says: str | None
) -> None:
    """By hand: 24 of 40 images have each class, so a ranking at random has 60 %."""
    labels = np.zeros((40, 2), np.int8)
    labels[:24] = 1
    source = ViewSource(Split(("",) * 40, labels, lambda index: b""), View(16, 1.0, "bicubic"), memory_bytes=0)
    prepared = PreparedTeacher(_network(tiny, 2), TeacherSpec(), "key", "probe", Measured(*teacher))
    student = None if untrained is None else Measured(*untrained)
    with nullcontext() if says is None else pytest.raises(TrainingError, match=says):
        require_useful(prepared, student, source)


@pytest.mark.parametrize(
    ("head", "advice", "done"),
    [
        ("probe", "teacher.prepare=full", "probe"),
        ("full", "teacher.epochs", "prepare"),
        ("lora", "teacher.epochs", "prepare"),
        ("its own", "teacher.prepare=probe", "teacher.epochs"),
    ],
)
def test_the_advice_is_nothing_that_was_done(tiny: Any, head: str, advice: str, done: str) -> None:
    source = ViewSource(Split(("",) * 2, np.asarray([0, 1]), lambda i: b""), View(16, 1.0, "bicubic"), memory_bytes=0)
    with pytest.raises(TrainingError) as caught:
        half = share_of(0.5, 2)
        require_useful(PreparedTeacher(_network(tiny, 2), TeacherSpec(), "key", head, half), None, source)
    assert advice in caught.value.do and done not in caught.value.do.replace(advice, "")


def test_a_teacher_is_tuned_with_its_own_readout(tiny: Any) -> None:
    recipe = tiny.recipe("teacher.preset=mae", "teacher.prepare=full", "teacher.weights=none")
    student = teacher_recipe(recipe, recipe.teacher).student
    assert (student.model, student.weights, student.preset) == (recipe.teacher.model, "none", "mae")


def test_whether_a_teacher_is_stored_is_what_the_main_process_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may look after the main one has copied it from the cache, and would then wait elsewhere."""
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.json").write_text("{}")
    assert teacher_tuning.is_prepared(tmp_path)
    other = SimpleNamespace(is_main_process=False, num_processes=1)
    monkeypatch.setattr(teacher_tuning, "accelerator", lambda: other)
    assert not teacher_tuning.is_prepared(tmp_path)


@pytest.mark.parametrize(("keep", "every"), [("last", 20), ("best", 5)])
def test_a_teacher_is_evaluated_as_many_times_as_its_student(tiny: Any, keep: str, every: int) -> None:
    """40 epochs beside 10 that are evaluated every 5; each evaluation counts where one of them is chosen."""
    settings = ("train.epochs=10", "train.eval_every=5", f"train.keep={keep}")
    recipe = tiny.recipe("teacher.prepare=full", "teacher.epochs=40", *settings)
    assert teacher_recipe(recipe, recipe.teacher).train.eval_every == every


def test_a_tuned_teacher_ends_at_a_rate_of_its_own(tiny: Any) -> None:
    """The student's last rate is a hundred times the teacher's first: the cosine would rise to it."""
    recipe = tiny.recipe("train.lr=0.1", "train.min_lr=1e-3", "teacher.prepare=full", "teacher.lr=1e-5")
    train = teacher_recipe(recipe, recipe.teacher).train
    rates = [learning_rate(train, 1e-5, step, 10) for step in range(10 * train.epochs)]
    assert max(rates) == pytest.approx(1e-5) and rates[-1] < 1e-6


def test_a_combination_prepares_a_teacher_and_the_dry_run_counts_it(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe("teacher.prepare=lora+bitfit", "teacher.allow_weak=true", "train.epochs=1")
    preparing = {"lora+bitfit": estimate(recipe, Silent())["estimate"]}
    assert start(recipe, tmp_path / "run").summary["teacher"]["head"] == "lora+bitfit"
    for prepare in ("probe", "none"):
        # Of a probed teacher with cached outputs, one pass serves both, and counts as caching.
        settings = (f"teacher.prepare={prepare}", "train.epochs=1", "teacher.cache=off")
        words = {"teacher": str(tmp_path / "run")} if prepare == "none" else {}
        preparing[prepare] = estimate(tiny.recipe(*settings, **words), Silent())["estimate"]
    seconds = {prepare: found["preparing_seconds"] for prepare, found in preparing.items()}
    assert seconds["lora+bitfit"] > 0.0 and seconds["probe"] > 0.0 and seconds["none"] == 0.0
    assert all(found["seconds"] > found["preparing_seconds"] for found in preparing.values())


def test_a_teacher_whose_logits_nobody_reads_gets_no_head(tiny: Any, tmp_path: Path) -> None:
    summary = start(tiny.recipe(losses="ce,attention,feature"), tmp_path / "run").summary
    assert summary["teacher"]["head"] == "none" and summary["teacher"]["accuracy"] is None
    assert not (tmp_path / "run" / "teacher").exists()


class _Noise:
    """Images of noise around a colour of their class; class ``missing`` cannot be read."""

    def __init__(self, count: int, classes: int, missing: int | None = None) -> None:
        draws = np.random.default_rng(0)
        labels = np.arange(count) % classes
        colours = draws.integers(60, 196, (classes, 3, 1, 1))
        pixels = colours[labels] + draws.integers(-60, 60, (count, 3, 16, 16))
        self.images = torch.from_numpy(pixels.astype(np.uint8))
        self.split = Split(("",) * count, labels, lambda index: b"")
        self.bad = {int(i): "gone" for i in np.flatnonzero(labels == missing)} if missing is not None else {}

    def batch(self, indices: Any) -> tuple[torch.Tensor, np.ndarray]:
        good = np.asarray([i for i in indices if i not in self.bad], dtype=np.int64)
        return self.images[torch.from_numpy(good)], good


def _network(tiny: Any, classes: int) -> Network:
    network = build_components(tiny.recipe(method="linear", losses="ce"), None, Silent(), SharedResources()).student
    network.model.reset_classifier(classes)
    network.classes = tuple("abcdef"[:classes])
    network.model.eval()
    return network


def _features(network: Network, source: _Noise) -> np.ndarray:
    """What enters the head, through timm's own calls."""
    pixels = (source.images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        tokens = network.model.forward_features(pixels)
        return network.model.forward_head(tokens, pre_logits=True).double().numpy()
