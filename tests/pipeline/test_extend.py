"""Runs that are extended: what they keep, what a kill leaves, and that resuming and repeating hold across sessions."""

import hashlib
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import remap
from remap.errors import DataError, Interrupted, MissingData, RecipeError
from remap.pipeline.evaluation import evaluate_run
from remap.pipeline.extend import extend, extension_recipe, situation
from remap.pipeline.repeat import repeat
from remap.pipeline.run import resume, start
from remap.pipeline.sessions import align_classifier
from remap.progress import Silent
from remap.recipe.schema import DataSpec, ModelSpec
from remap.remapping.knowledge.logits.distillation import CrossEntropy, KnowledgeDistillation
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.remapping.signals import Signals
from remap.runs.class_statistics import ClassStatistics
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task, open_backbone

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


def test_mistakes_are_named(first: Path, red: DataSpec, tiny: Any) -> None:
    with pytest.raises(RecipeError, match="ranpac, prototypes, lwf"):
        extension_recipe(situation(first, red), "magic")
    with pytest.raises(RecipeError, match="takes no steps"):
        extension_recipe(situation(first, red), "ranpac", epochs=3)
    with pytest.raises(RecipeError, match="--memory: masked"):
        extend(first, red, how="masked", memory=2)
    with pytest.raises(DataError, match="no such classes"):
        situation(first, DataSpec(source=tiny.data, only=("pink",)))
    with pytest.raises(RecipeError, match=r"train\.fit"):
        tiny.recipe("train.fit=ridge")  # with a teacher
    with pytest.raises(RecipeError, match=r"train\.align"):
        tiny.recipe("train.align=true")


def test_a_new_look_of_the_same_classes_has_a_forward_transfer(first: Path, tiny: Any, tmp_path: Path) -> None:
    found = extend(first, DataSpec(source=tiny.data, only=("blue", "green")), output=tmp_path / "look").summary
    matrix = found["sessions"]["accuracy"]
    assert [len(row) for row in matrix] == [2, 2]
    assert found["sessions"]["forward_transfer"] == matrix[0][1] == found["student"]["initial_accuracy"]


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
