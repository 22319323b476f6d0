"""Runs that are extended: what they keep, what a kill leaves, and that resuming and repeating hold across sessions."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.numpy import load_file
from sklearn.linear_model import Ridge

import remap
from remap.data.sources import open_data
from remap.data.views import ViewSource
from remap.distributed.launch import ProcessLost
from remap.errors import BackboneError, DataError, Interrupted, MissingData, RecipeError, RunError, TrainingError
from remap.network import Runner, tuned
from remap.pipeline.choose_memory import choose_memory
from remap.pipeline.evaluate_run import evaluate_run
from remap.pipeline.extend import extend, extension_recipe
from remap.pipeline.fit_at_once import PENALTIES, best_penalty
from remap.pipeline.rebalancing import align_classifier, fit_bias
from remap.pipeline.repeat import repeat
from remap.pipeline.run import resume, start
from remap.pipeline.session_advice import require_new_names, situation
from remap.pipeline.sessions import sessions_of
from remap.progress import Silent
from remap.recipe.schema import DataSpec, MethodSpec, ModelSpec
from remap.remapping.knowledge.logits.distillation import CrossEntropy, KnowledgeDistillation
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.remapping.signals import Needs, Signals
from remap.runs.class_statistics import ClassStatistics
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task, open_backbone
from remap.tasks.sessions import verify_sessions
from remap.tuning.base import Sample

Extended = Callable[[str], dict[str, Any]]
# Random features that are few.
SMALL = {"ranpac": ["method.ranpac.dim=40"], "prototypes": [], "lwf": []}


@pytest.fixture(scope="module")
def first(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows two of the three colours."""
    path = tmp_path_factory.mktemp("sessions") / "first"
    start(tiny.recipe("data.only=blue,green", method="lora", teacher=None, losses="ce"), path)
    return path


@pytest.fixture(scope="module")
def red(tiny: Any) -> DataSpec:
    return DataSpec(source=tiny.data, only=("red",))


@pytest.fixture(scope="module")
def extended(first: Path, red: DataSpec) -> Callable[[str], dict[str, Any]]:
    """A function from a way to the summary of the first run extended by it; each is run once."""

    @cache
    def make(how: Any) -> dict[str, Any]:
        return dict(extend(first, red, how=how, settings=SMALL[how], output=first.parent / how).summary)

    return make


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("how", ["ranpac", "prototypes", "lwf"])
def test_a_new_class_is_learned_and_the_old_run_stays(first: Path, extended: Extended, how: str) -> None:
    before = digests(first)
    found, path = extended(how)["sessions"], first.parent / how
    assert digests(first) == before
    assert remap.load_student(path, "cpu").classes == ("blue", "green", "red")
    assert [one["classes"] for one in found["sessions"]] == [["blue", "green"], ["red"]]
    assert evaluate_run(path, None, False, Silent())["accuracy"] == found["accuracy"][1][1]
    files = [*path.glob("task/task.*"), *path.glob("statistics.*")]
    assert found["sessions"][1]["bytes"] == sum(file.stat().st_size for file in files)
    if how != "lwf":  # colours are told apart by any features
        assert found["last"] == found["overall"] == 1.0 and found["forgetting"] == 0.0


def test_bytes_of_a_session_are_counted_once_after_a_kill_before_the_summary(
    first: Path, red: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task was written by then. Source: the sizes of the files."""

    class Killed(BaseException): ...

    def kill(*_: Any) -> None:
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDir, "write_summary", kill)
        extend(first, red, how="prototypes", output=run)
    assert (run / "task" / "task.json").is_file() and not (run / "summary.json").exists()
    found = resume(run).summary["sessions"]["sessions"]
    files = [*run.glob("task/task.*"), *run.glob("statistics.*")]
    assert len(files) == 3 and found[1]["bytes"] == sum(file.stat().st_size for file in files)


def test_at_once_means_the_features_of_the_old_run_to_the_bit(first: Path, extended: Extended) -> None:
    extended("prototypes")
    old, new = (load_task(path)[0] for path in (first, first.parent / "prototypes"))
    for name, tensor in old.tensors.items():
        if not old.anatomy.is_head(name):
            assert torch.equal(tensor, new.tensors[name])


def test_statistics_of_sessions_are_those_of_all_images(tiny: Any, first: Path, tmp_path: Path) -> None:
    """One after the other, without the images of the sessions before, and all at once."""
    recipe = tiny.recipe(
        "data.only=blue,green", "train.fit=ridge", "method.dim=40", method="ranpac", teacher=None, losses="ce"
    )
    start(recipe, tmp_path / "one")
    extend(tmp_path / "one", DataSpec(source=tiny.data, only=("red",)), output=tmp_path / "two")
    start(
        tiny.recipe("train.fit=ridge", "method.dim=40", method="ranpac", teacher=None, losses="ce"), tmp_path / "joint"
    )
    added, joint = (load_file(tmp_path / name / "statistics.safetensors") for name in ("two", "joint"))
    for name in ("gram", "sums", "counts"):
        assert np.allclose(added[name], joint[name], rtol=1e-5, atol=1e-6), name  # batches of other images
    assert (tmp_path / "two" / "recipe.yaml").read_text().count("ranpac") == 1  # the projection is not added twice


def test_the_penalty_is_that_of_the_least_squared_error() -> None:
    """By scikit-learn's ridge regression; images that all penalties put into the right class still tell them apart."""
    draws, labels = np.random.default_rng(0), np.arange(60) % 3
    features = draws.normal(size=(60, 30)) + 9.0 * np.eye(3, 30)[labels]
    found, one_hot = ClassStatistics.of(features[:40], labels[:40], 3), np.eye(3)[labels]
    errors = {}
    for penalty in (share * found.scale for share in PENALTIES):
        answers = Ridge(alpha=penalty, fit_intercept=False).fit(features[:40], one_hot[:40]).predict(features[40:])
        assert (answers.argmax(1) == labels[40:]).all()
        errors[penalty] = np.square(answers - one_hot[40:]).mean()
    assert best_penalty(found, features[40:], labels[40:]) == min(errors, key=errors.__getitem__) != min(errors)


def test_a_kill_leaves_the_old_run_and_resuming_gives_the_same_student(
    first: Path,
    red: DataSpec,
    tmp_path: Path,
    extended: Extended,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped when all is computed and nothing written; of steps the tests of resuming speak."""
    before = digests(first)
    with monkeypatch.context() as patch:

        def stop(*_args: Any) -> None:
            raise Interrupted("stopped by a test")

        patch.setattr(ClassStatistics, "save", stop)
        with pytest.raises(Interrupted):
            extend(first, red, how="ranpac", settings=SMALL["ranpac"], output=tmp_path / "killed")
    assert digests(first) == before and not (tmp_path / "killed" / "task").exists()
    extended("ranpac")
    expected, _ = load_task(first.parent / "ranpac")
    for name, tensor in resume(tmp_path / "killed").student.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name
    assert digests(first) == before


@pytest.mark.parametrize("how", ["ranpac", "lwf"])
def test_a_repeat_is_equal(first: Path, tmp_path: Path, extended: Extended, how: str) -> None:
    extended(how)
    assert repeat(first.parent / how, tmp_path / "again")["equal"]


def test_ways_follow_from_what_is_at_hand(first: Path, red: DataSpec, tiny: Any, tmp_path: Path) -> None:
    found = situation(first, red)
    assert found.added == ("red",) and found.images == 8 and found.old_images and not found.has_statistics
    assert found.advice()[0].way == "ranpac"
    same = situation(first, DataSpec(source=tiny.data, only=("blue", "green")))
    assert same.added == () and same.advice()[0].way == "lwf"
    moved = RunDir(first).recipe()
    moved = moved.model_copy(update={"data": moved.data.model_copy(update={"source": str(tmp_path / "gone")})})
    kept = (first / "recipe.yaml").read_bytes()
    RunDir(first).settle(moved)
    try:
        alone = situation(first, red)
        assert not alone.old_images and [one.way for one in alone.advice() if one.fits] == ["lwf"]
        with pytest.raises(MissingData, match="not at hand"):
            extend(first, red, how="ranpac", output=tmp_path / "impossible")
    finally:
        (first / "recipe.yaml").write_bytes(kept)


def test_no_way_that_fits_says_why(first: Path, red: DataSpec, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, same = situation(first, red), DataSpec(source=tiny.data, only=("blue", "green"))

    def tuned_by(name: str, **options: Any) -> None:
        meta = SimpleNamespace(method=MethodSpec(name=name, **options))
        monkeypatch.setattr("remap.pipeline.session_advice.read_meta", lambda _folder: meta)

    # Of the way of a method alone: no new class, and new classes.
    for name, images, why in (("ease", same, "there are none"), ("domains", red, "there are new classes")):
        tuned_by(name)
        with pytest.raises(RecipeError, match=f"no way fits this run .*{why}"):
            extend(first, images)
    for name, options in (("taskres", {}), ("tip_adapter", {}), ("coop", {"per_class": True})):
        tuned_by(name, **options)
        assert not any(one.fits for one in found.advice())
        for how in (None, "lwf", "finetune", "prototypes"):
            with pytest.raises(RecipeError, match=f"{name} holds tensors of each class"):
                extend(first, red, how=how)
    tuned_by("coop")
    assert any(one.fits for one in found.advice())


@pytest.mark.parametrize(
    "error", [DataError("one image cannot be read"), ProcessLost("another process cannot read it")]
)
def test_a_session_that_cannot_be_measured_costs_its_figures_alone(
    first: Path, red: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Of several processes one says which image it is, and the others that it was another."""

    def unreadable(*_args: Any) -> Any:
        raise error

    monkeypatch.setattr("remap.pipeline.sessions.evaluate_as", unreadable)
    found = extend(first, red, how="prototypes", output=tmp_path / "second").summary["sessions"]
    assert [one["images"] for one in found["sessions"]][0] is None and RunDir(tmp_path / "second").is_done
    assert found["accuracy"][-1][0] is None and found["accuracy"][-1][1] is not None


def test_mistakes_are_named(first: Path, red: DataSpec, tiny: Any) -> None:
    with pytest.raises(RecipeError, match="ranpac, prototypes, lwf"):
        extension_recipe(situation(first, red), "magic")
    with pytest.raises(RecipeError, match="takes no steps"):
        extension_recipe(situation(first, red), "ranpac", epochs=3)
    with pytest.raises(RecipeError, match="--memory: prototypes"):
        extend(first, red, how="prototypes", memory=2)
    with pytest.raises(RecipeError, match="--choose"):
        extend(first, red, how="lwf", choose="random")
    for way in ("ease", "domains", "coda_prompt"):
        with pytest.raises(RecipeError, match=f"tuned by {way} from the first session"):
            extension_recipe(situation(first, red), way)
    with pytest.raises(RecipeError, match="lwf learns by kd too"):
        extension_recipe(situation(first, red), "lwf", ["losses=ce,feature"])
    with pytest.raises(RecipeError, match=r"train\.align: bias"):
        extension_recipe(situation(first, red), "lwf", ["train.align=bias"])
    with pytest.raises(DataError, match="no such classes"):
        situation(first, DataSpec(source=tiny.data, only=("pink",)))
    with pytest.raises(RunError, match="knows 2 of the 3 classes"):
        extend(first, red, how="lwf", settings=["teacher.calibrate=true"], output=first.parent / "judged")
    assert not (first.parent / "judged").exists()
    selecting = ["train.keep=best", "data.selection=0.25"]
    with pytest.raises(RecipeError, match=r"train\.keep, train\.patience: train\.align changes the classifier after"):
        extension_recipe(situation(first, red), "lwf", ["train.align=true", *selecting])
    with pytest.raises(RecipeError, match=r"train\.keep, train\.patience: method ease changes"):
        tiny.recipe(*selecting, method="ease", teacher=None, losses="ce")
    with pytest.raises(RecipeError, match=r"train\.fit"):
        tiny.recipe("train.fit=ridge")  # with a teacher
    for method in ("cocoop", "promptkd", "coop", "tip_adapter", "clip_lora", "taskres"):
        with pytest.raises(
            RecipeError, match=rf"train\.fit: ridge fits a classifier, and {method} does not answer by it"
        ):
            tiny.recipe("train.fit=ridge", method=method, teacher=None, losses="ce")
    with pytest.raises(RecipeError, match=r"train\.align"):
        tiny.recipe("train.align=true")


def test_settings_of_the_images_count_before_the_classes_are_known(first: Path, tiny: Any, tmp_path: Path) -> None:
    """As `--only` and `--val-data` do: the new class is that of `data.only`, of folders as deep as `data.depth`."""
    settings = [*SMALL["ranpac"], "data.only=red"]
    run = extend(first, tiny.data, how="ranpac", settings=settings, output=tmp_path / "run").run_dir
    assert load_task(run)[0].classes == ("blue", "green", "red")
    for split in ("train", "val"):
        for image in (Path(tiny.data) / split / "red").iterdir():
            for group in ("ant", "bee"):
                deeper = tmp_path / "deep" / split / group / "inner" / image.name
                deeper.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, deeper)
    settings[-1] = "data.depth=2"
    run = extend(first, str(tmp_path / "deep"), how="ranpac", settings=settings, output=tmp_path / "deeper").run_dir
    assert load_task(run)[0].classes == ("blue", "green", "ant/inner", "bee/inner")
    with pytest.raises(RecipeError, match="dpth: unknown key; did you mean 'depth'"):
        extend(first, tiny.data, settings=["data.dpth=2"])


def test_a_new_look_of_the_same_classes_has_a_forward_transfer(first: Path, tiny: Any, tmp_path: Path) -> None:
    found = extend(first, DataSpec(source=tiny.data, only=("blue", "green")), output=tmp_path / "look").summary
    matrix = found["sessions"]["accuracy"]
    assert [len(row) for row in matrix] == [2, 2]
    assert found["sessions"]["forward_transfer"] == matrix[0][1] == found["student"]["initial_accuracy"]
    look = situation(first, DataSpec(source=tiny.data, only=("blue", "green")))
    with pytest.raises(RecipeError, match=r"train\.align: there is no new class"):
        extension_recipe(look, "lwf", ["train.align=true"])


def test_the_terms_of_learning_without_forgetting(tiny: Any) -> None:
    """Li and Hoiem 2016, equations 2 and 3, in float64: y'^(1/T) of the old classes, and new labels among new ones.

    Their distillation is a cross-entropy, ours T^2 times the divergence; the difference is the teacher's entropy.
    """
    draws, labels = torch.Generator().manual_seed(1), torch.tensor([3, 4, 4, 3])
    student, teacher = torch.randn(4, 5, generator=draws), torch.randn(4, 3, generator=draws)
    pair = Pair(open_backbone(ModelSpec(model=tiny.student), 5).anatomy, None, 5)
    kd = KnowledgeDistillation(pair, KnowledgeDistillation.Config(temperature=2.0))
    ce = CrossEntropy(pair, CrossEntropy.Config(first_class=3))
    given, answers = Signals(student), Signals(teacher)

    def root(x: np.ndarray) -> np.ndarray:
        exact = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        return exact**0.5 / (exact**0.5).sum(1, keepdims=True)

    old, new = root(teacher.double().numpy()), root(student.double().numpy()[:, :3])
    cross = -(old * np.log(new)).sum(1).mean() + (old * np.log(old)).sum(1).mean()
    assert float(kd(given, kd.target(answers), Labels(labels))) == pytest.approx(4 * cross, rel=1e-5)
    of_new = np.exp(student.double().numpy()[:, 3:])
    expected = -np.log(of_new / of_new.sum(1, keepdims=True))[np.arange(4), labels.numpy() - 3].mean()
    assert float(ce(given, {}, Labels(labels))) == pytest.approx(expected, rel=1e-5)
    # Images of a class before the new ones count 0: four of eight, so half of the mean.
    twice = Labels(torch.cat([labels, torch.tensor([0, 1, 2, 2])]))
    assert float(ce(Signals(torch.cat([student, student])), {}, twice)) == pytest.approx(expected / 2, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_of_a_mixed_image_only_the_share_of_a_new_class_counts(smoothing: float) -> None:
    """Cross-entropy is linear in the label: with 0.7 of a new class and an old one, 0.7 of the new one's."""
    ce = CrossEntropy(Pair(None, None, 5), CrossEntropy.Config(first_class=3, label_smoothing=smoothing))
    student = Signals(torch.randn(1, 5, generator=torch.Generator().manual_seed(1)))
    new, old = torch.tensor([4]), torch.tensor([1])
    alone = float(ce(student, {}, Labels(new)))
    assert float(ce(student, {}, Labels(old, new, torch.tensor([0.3])))) == pytest.approx(0.7 * alone, rel=1e-5)
    assert float(ce(student, {}, Labels(old, old, torch.tensor([0.3])))) == 0.0
    with pytest.raises(BackboneError, match="first_class leaves no class"):
        CrossEntropy(Pair(None, None, 5), CrossEntropy.Config(first_class=5))


def test_old_images_that_cannot_be_used_are_not_measured(first: Path, red: DataSpec, tmp_path: Path) -> None:
    old = shutil.copytree(first, tmp_path / "old")
    recipe = RunDir(old).recipe()
    RunDir(old).settle(
        recipe.model_copy(update={"data": recipe.data.model_copy(update={"only": ("pink",), "decode": "fast"})})
    )
    found = extend(old, red, how="lwf", settings=["train.epochs=1"], output=tmp_path / "new").summary["sessions"]
    assert found["accuracy"][1][0] is None and found["accuracy"][1][1] is not None
    assert RunDir(tmp_path / "new").recipe().data.decode == "fast"  # pixels are read as those of the old run


def test_weight_alignment_by_hand(first: Path) -> None:
    network, _ = load_task(first)
    layer = network.model.head
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0], layer.weight[1, :2] = 6.0, torch.tensor([3.0, 4.0])
        layer.bias.copy_(torch.tensor([1.0, 10.0]))
    assert align_classifier(network, 1) == pytest.approx(6 / 5)
    assert layer.weight[1, :2].tolist() == pytest.approx([3.6, 4.8]) and layer.bias.tolist() == pytest.approx([1, 12])


def test_a_pool_counts_its_sessions_on_and_leaves_those_before(tiny: Any, red: DataSpec, tmp_path: Path) -> None:
    small = ("method.sessions=2", "method.general_blocks=1", "method.length=2", "train.epochs=1")
    words = {"method": "dualprompt", "teacher": None, "losses": "ce"}
    first = start(tiny.recipe("data.only=blue,green", *small, **words), tmp_path / "first").student
    second = extend(tmp_path / "first", red, output=tmp_path / "second")
    assert RunDir(tmp_path / "second").recipe().method.options["session"] == 1
    for name in ("remap_pool.keys", "blocks.1.attn.remap_pool.prompts"):
        before, after = first.tensors[name], second.student.tensors[name]
        assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1]), name
    with pytest.raises(RecipeError, match="start with more sessions"):
        extend(tmp_path / "second", red, output=tmp_path / "third")


def test_named_losses_keep_the_options_of_the_way(first: Path, tiny: Any) -> None:
    two = situation(first, DataSpec(source=tiny.data, only=("red",)))
    two = replace(two, added=("pink", "red"))  # as if there were another
    losses = {loss.name: loss for loss in extension_recipe(two, "lwf", ["losses=ce,kd:2,feature"]).losses}
    assert losses["ce"].options["first_class"] == 2 and losses["kd"].options["temperature"] == 2.0
    assert losses["kd"].weight == 2.0 and "feature" in losses
    asked = extension_recipe(two, "lwf", ["losses=[{name: ce, first_class: 0}, kd]"]).losses
    assert asked[0].options.get("first_class", 0) == 0


def test_a_thousand_classes_are_extended_by_a_thousand(first: Path, red: DataSpec, tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(2_000))
    many = replace(situation(first, red), known=names[:1_000], added=names[1_000:])
    recipe = extension_recipe(many, "lwf")
    assert RunDir.create(tmp_path / "many", recipe).recipe().data.known_classes == names


@pytest.mark.parametrize(
    ("known", "name", "shown"),
    [("blue", "Blue", "Blue"), ("caf\u00e9", "cafe\u0301", r"'cafe\u0301'"), ("caf\u00e9", "CAFE\u0301", "CAFE\u0301")],
)
def test_a_class_that_reads_like_a_known_one_is_refused(known: str, name: str, shown: str) -> None:
    """Capitals, and a letter that is composed of two characters; what looks the same is shown by its code points."""
    with pytest.raises(DataError, match="case or Unicode form") as refused:
        require_new_names("old", (known, "green"), ("red", name))
    assert refused.value.given == f"{shown}, known: {ascii(known) if shown.startswith(chr(39)) else known}"
    require_new_names("old", (known, "green"), ("red", "blue2"))


def test_a_class_in_capitals_is_not_a_new_one(first: Path, tiny: Any, tmp_path: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(Path(tiny.data) / part / "blue", tmp_path / part / "Blue")
    with pytest.raises(DataError, match="exactly the known name"):
        extend(first, str(tmp_path), how="lwf")


def test_bias_correction_is_the_least_of_its_loss() -> None:
    """BiC, equation 5, by a grid in float64: on as many images of each class, whose new logits are too small."""
    draws = np.random.default_rng(3)
    labels = np.repeat(np.arange(4), [20, 20, 60, 60])
    logits = draws.normal(size=(160, 4)) + 2.0 * np.eye(4)[labels]
    logits[:, 2:] = 0.5 * logits[:, 2:] - 1.0
    scale, shift = fit_bias(logits, labels, 2, 4)
    rows = np.concatenate([np.flatnonzero(labels == label)[:20] for label in range(4)])

    def loss(a: float, b: float) -> float:
        z = logits[rows].copy()
        z[:, 2:] = a * z[:, 2:] + b
        return float(-np.log(np.exp(z)[np.arange(80), labels[rows]] / np.exp(z).sum(1)).mean())

    grid = {(a, b): loss(a, b) for a in np.linspace(0.5, 4, 15) for b in np.linspace(-1, 5, 25)}
    best = min(grid, key=grid.__getitem__)
    assert loss(scale, shift) <= grid[best] and abs(scale - best[0]) < 0.4 and abs(shift - best[1]) < 0.4
    with pytest.raises(DataError, match="larger --memory"):
        fit_bias(logits, labels, 2, 5)


def test_bias_is_fitted_on_images_that_steps_did_not_see(
    first: Path, red: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 8 old images a class and a quarter held out: 6 + 6 old and 6 new ones to learn from, 2 of each to fit on."""
    seen = []

    def noted(logits: np.ndarray, labels: np.ndarray, *rest: int) -> tuple[float, float]:
        seen.append(np.bincount(labels).tolist())
        return 2.0, 0.5

    monkeypatch.setattr("remap.pipeline.rebalancing.fit_bias", noted)
    settings = ["train.align=bias", "data.selection=0.25", "train.epochs=1"]
    found = extend(first, red, how="lwf", memory=8, settings=settings, output=tmp_path / "bias")
    assert found.summary["data"]["train_images"] == 18 and seen == [[2, 2, 2]]
    assert "choice" not in found.summary  # no epoch is chosen by them
    assert evaluate_run(tmp_path / "bias", None, False, Silent())["accuracy"] == found.summary["student"]["accuracy"]
    assert RunDir(tmp_path / "bias").metrics()[-1]["accuracy"] == found.summary["student"]["accuracy"]
    monkeypatch.setattr("remap.pipeline.run.train", None)  # too few are refused before any step
    with pytest.raises(DataError, match="larger --memory"):
        extend(first, red, how="lwf", memory=1, settings=["train.align=bias"], output=tmp_path / "few")


def test_a_larger_memory_says_what_stays_small(first: Path, red: DataSpec, tmp_path: Path, watch: Any) -> None:
    """The first session's classes have one image each in the memory of the second, which had no red one in it."""
    extend(first, red, how="lwf", memory=1, settings=["train.epochs=1"], output=tmp_path / "second")
    progress = watch(lambda step: None)
    memory = choose_memory(sessions_of(tmp_path / "second"), 3, "herding", progress)
    counts = Counter(image.label for part in memory.parts for image in part.images)
    assert counts == {"blue": 1, "green": 1, "red": 3}
    assert (
        f"the memory of {tmp_path / 'second'} has fewer images of 2 classes (blue, green): these stay as they are"
        in (progress.said)
    )


def test_a_look_has_parts_of_its_own_and_earlier_answers_stay(tiny: Any, tmp_path: Path) -> None:
    """Images that get the set of the first session have the same bits, and `tasks verify` finds all of it there."""
    small = ("method.parts=adapters", "method.centroids=2", "train.epochs=1", "data.only=blue,green")
    words = {"method": "domains", "teacher": None, "losses": "ce"}
    start(tiny.recipe(*small, **words), tmp_path / "one")
    for path in (Path(tiny.data)).glob("*/*/*"):  # another look: negatives
        if path.parent.name != "red":
            (target := tmp_path / "dark" / path.relative_to(tiny.data)).parent.mkdir(parents=True, exist_ok=True)
            ImageOps.invert(Image.open(path)).save(target)
    advice = situation(tmp_path / "one", DataSpec(source=str(tmp_path / "dark"))).advice()
    assert advice[0].way == "domains" and not any(one.fits for one in advice[1:])
    found = extend(tmp_path / "one", str(tmp_path / "dark"), output=tmp_path / "two").summary["sessions"]
    assert found["forward_transfer"] is not None and [len(row) for row in found["accuracy"]] == [2, 2]
    rows = verify_sessions(tmp_path / "two")
    assert [(row.same_answers, row.drop) for row in rows] == [(True, rows[0].then - rows[0].now), (True, 0.0)]
    (old, view), (new, _) = (load_task(tmp_path / name) for name in ("one", "two"))
    split = open_data(tiny.data, None, 0.2, only=("blue", "green")).val
    pixels, _ = ViewSource(split, view, memory_bytes=0.0).batch(np.arange(len(split)))
    before, after = (Runner(network)(pixels).logits_BC for network in (old, new))
    same = new.model.remap_domains.query.session_B == 0
    assert same.any() and torch.equal(before[same], after[same])
    assert not torch.equal(*(network.model.blocks[0].remap_domains.sets[-1].up.weight for network in (old, new)))
    with pytest.raises(RecipeError, match=r"method\.session: a later session learns beside"):
        tiny.recipe("method.session=1", **words)
    with pytest.raises(RecipeError, match="there are new classes"):
        extension_recipe(situation(tmp_path / "one", DataSpec(source=tiny.data, only=("red",))), "domains")
    with pytest.raises(RecipeError, match="extended by it alone"):
        extension_recipe(situation(tmp_path / "one", DataSpec(source=tiny.data, only=("red",))), "lwf")


def test_an_adapter_each_session_and_class_means_in_all_spaces(
    tiny: Any, red: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EASE by the formulas of sections 4.2 and 4.3 in float64, from features that other networks make.

    Features of the first session are those of its run, and those of the second that of AdaptFormer with its tensors.
    """
    small = ("method.bottleneck=3", "train.epochs=1", "data.only=blue,green")
    first = start(tiny.recipe(*small, method="ease", teacher=None, losses="ce"), tmp_path / "one").student
    with monkeypatch.context() as patch:  # killed when all steps are taken

        def stop(*_args: Any) -> None:
            raise Interrupted("stopped by a test")

        patch.setattr("remap.tuning.adapter.ease.Means.finish", stop)
        with pytest.raises(Interrupted):
            extend(tmp_path / "one", red, how="ease", settings=["train.epochs=1"], output=tmp_path / "two")
    student, (_, view) = resume(tmp_path / "two").student, load_task(tmp_path / "two")
    for name, tensor in first.tensors.items():
        if ".sets.0." in name:
            assert torch.equal(student.tensors[name], tensor)
    assert not student.tensors["blocks.0.remap_ease.sets.1.up.weight"].any()  # one class teaches nothing
    with torch.no_grad():  # as if it had taught
        for name, tensor in student.tensors.items():
            if ".sets.1.up" in name:
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    data = open_data(tiny.data, None, 0.2)

    def pixels(part: Any, label: int) -> Any:
        rows = np.flatnonzero(part.labels == label)
        return ViewSource(part, view, memory_bytes=0.0).batch(rows)[0]

    def features(session: int, images: Any) -> np.ndarray:
        plain = open_backbone(ModelSpec(model=tiny.student), 3)
        network = tuned(plain, "adaptformer", {"bottleneck": 3})
        with torch.no_grad():
            for index, block in enumerate(network.model.blocks):
                for key in ("down.weight", "down.bias", "up.weight", "up.bias"):
                    source = f"blocks.{index}.remap_ease.sets.{session}.{key}"
                    block.remap_adaptformer.get_parameter(key).copy_(student.tensors[source])
        network.model.eval()
        runner = Runner(network, Needs(pooled=True))
        return runner(images).pooled_BD.detach().double().numpy()

    hooks = student.attached.finishing[0]
    saved, _ = load_task(tmp_path / "two")  # the student is another now
    logits = Runner(saved)(pixels(data.val, 2)).logits_BC.detach().double()
    last = RunDir(tmp_path / "two").metrics()[-1]  # of the classifier that is saved
    assert last["val_ce"] == pytest.approx(float((logits.logsumexp(1) - logits[:, 2]).mean()), abs=1e-6)
    assert last["accuracy"] == float((logits.argmax(1) == 2).double().mean())
    means = student.model.head.remap_ease
    for name in ("session_C", "count_0", "count_1"):  # the class means of the second session are taken again
        getattr(means, name)[2] = -1 if name == "session_C" else 0
    preprocess = Runner(student).preprocess
    sample = Sample(lambda: iter([(preprocess(pixels(data.train, 2)), torch.full((8,), 2))]), 3)
    hooks.finish(sample)
    with pytest.raises(TrainingError, match="reads training images with labels"):
        hooks.finish(Sample(lambda: iter([(preprocess(pixels(data.train, 2)), torch.full((8,), -1))]), 3))

    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    own = np.stack([features(0, pixels(data.train, label)).mean(0) for label in (0, 1, 2)])
    new = features(1, pixels(data.train, 2)).mean(0)
    share = np.exp(unit(own[:2]) @ unit(own[2:]).T)
    later = np.concatenate([share / share.sum(1, keepdims=True) @ new[None], new[None]])
    images = pixels(data.val, 1)
    cosines = [unit(features(0, images)) @ unit(own).T, unit(features(1, images)) @ unit(later).T]
    expected = cosines[0] * [1, 1, 0.1] + cosines[1] * [0.1, 0.1, 1]
    got = Runner(student)(images).logits_BC.detach().numpy() / float(means.scale)
    assert np.allclose(got, expected, atol=1e-5)
    assert not student.tensors["head.weight"].any()
