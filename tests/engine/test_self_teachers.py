"""Teachers made of the student, and several teachers at once."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remap.backbones.anatomy import set_fused_attention
from remap.engine.average import average_pairs, move_average
from remap.engine.self_teachers import averaged_copy
from remap.errors import RecipeError
from remap.network import Runner
from remap.pipeline.compare import compare
from remap.pipeline.components import build_components, build_objective, pairs_of
from remap.pipeline.run import resume, start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe.schema import TeacherSpec
from remap.remapping.labels import Labels
from remap.runs.run_dir import RunDir
from remap.runs.task import open_backbone

METHODS = ("vpt_deep", "adaptformer", "lora", "bitfit", "ssf", "full", "dora")


def parts_of(tiny: Any, folder: Path, *settings: str, **words: object) -> Any:
    recipe = tiny.recipe("teacher.allow_weak=true", *settings, **words)
    return build_components(recipe, RunDir.create(folder, recipe), Silent(), SharedResources())


@pytest.mark.parametrize("method", METHODS)
def test_self_is_the_backbone_without_its_tuning(tiny: Any, tmp_path: Path, method: str) -> None:
    """Source: the same backbone built by itself; features are compared after the student's weights were moved."""
    parts = parts_of(tiny, tmp_path / "run", teacher="self", method=method, losses="ce,kd")
    twin, student = parts.teachers[0].network, parts.student
    with torch.no_grad():
        for parameter in student.trained.values():
            parameter.add_(torch.randn_like(parameter))
    plain = open_backbone(parts.recipe.student, 3).model.eval()
    set_fused_attention(plain, student.anatomy, enabled=False)  # as the run chooses it on a CPU
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(twin.model.forward_features(images), plain.forward_features(images))
    assert not torch.equal(student.model.eval().forward_features(images), plain.forward_features(images))


@pytest.mark.parametrize("method", METHODS)
def test_self_shares_every_frozen_weight(tiny: Any, tmp_path: Path, method: str) -> None:
    parts = parts_of(tiny, tmp_path / "run", teacher="self", method=method, losses="ce,kd")
    twin, student = dict(parts.teachers[0].network.model.named_parameters()), parts.student
    for name, parameter in student.model.named_parameters():
        if name in twin:
            assert (twin[name] is parameter) == (name not in student.trained), name
    assert all(p.requires_grad for p in student.trained.values())
    assert not any(p.requires_grad for p in twin.values())


def test_a_student_learns_from_itself(tiny: Any, tmp_path: Path) -> None:
    result = start(tiny.recipe("teacher.allow_weak=true", teacher="self", losses="ce,kd,feature"), tmp_path / "run")
    assert result.summary["teacher"]["model"].startswith("self")
    assert result.summary["teacher"]["head"] == "probe"
    assert result.summary["final_losses"]["kd"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_running_average_by_hand(tiny: Any, tmp_path: Path, method: str) -> None:
    """Source: d * a + (1 - d) * b in float64; the twin's answer is that of a student with those weights."""
    parts = parts_of(tiny, tmp_path / "run", teacher=None, method=method, losses="ce")
    student = parts.student
    twin = averaged_copy(student)
    before = {name: tensor.detach().clone().double() for name, tensor in student.tensors.items()}
    with torch.no_grad():
        for parameter in student.trained.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    move_average(average_pairs(twin, student), 0.9)
    wanted = {name: 0.9 * before[name] + 0.1 * tensor.double() for name, tensor in student.tensors.items()}
    for name, tensor in twin.tensors.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for name, tensor in student.tensors.items():
            tensor.copy_(wanted[name])
    images = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    student.model.eval(), twin.model.eval()
    torch.testing.assert_close(Runner(twin)(images).logits_BC, Runner(student)(images).logits_BC, rtol=0, atol=1e-5)


def test_the_running_average_follows_training(tiny: Any, tmp_path: Path) -> None:
    """Source: with a decay near 0 the average is the student of the step before, whose answers differ little."""
    settings = ("teacher.decay=0.5", "data.augment=shift", "train.epochs=3")
    result = start(tiny.recipe(*settings, teacher="ema", losses="ce,kd"), tmp_path / "run")
    assert 0 <= result.summary["teacher"]["accuracy"] <= 1
    assert 0 < result.summary["final_losses"]["kd"] < result.summary["final_losses"]["ce"]


def test_an_interrupted_average_goes_on(
    tiny: Any, tmp_path: Path, largest_difference: Callable[..., float], watch: Callable[..., Any]
) -> None:
    """Source: the run that was not interrupted. The average is in the checkpoint."""

    def crash(done: int) -> None:
        if done == 5:
            raise RuntimeError("power cut")

    recipe = tiny.recipe("train.checkpoint_seconds=0", "data.augment=shift", teacher="ema", losses="ce,kd")
    whole = start(recipe, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        start(recipe, tmp_path / "broken", watch(crash))
    again = resume(tmp_path / "broken")
    assert largest_difference(whole.student.trained, again.student.trained) == 0.0


def test_several_teachers_are_averaged_by_weight(tiny: Any, tmp_path: Path) -> None:
    """Source: the same loss with each teacher alone, weighted in Python floats."""
    teacher = copy.copy(tiny.teacher)
    words = {"losses": "kd,feature", "method": "adaptformer"}
    both = parts_of(tiny, tmp_path / "both", teacher=f"{teacher}:3,self", **words)
    assert [t.weight for t in both.recipe.teachers] == [3.0, 1.0]
    assert sorted(both.objective.terms) == ["feature@1", "feature@2", "kd@1", "kd@2"]
    images = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    labels = Labels(torch.zeros(4, dtype=torch.int64))
    student = Runner(both.student, both.objective.student_needs())(images)
    targets = [
        both.objective.targets(Runner(one.network, both.objective.teacher_needs(number))(images), number)
        for number, one in enumerate(both.teachers)
    ]
    total, parts = both.objective(student, targets, labels)
    by_hand = sum(
        weight * share * parts[f"{name}@{number}"].item()
        for name, weight in (("kd", 1.0), ("feature", 1.0))
        for number, share in ((1, 0.75), (2, 0.25))
    )
    assert total.item() == pytest.approx(by_hand, rel=1e-6)
    alone = build_objective(
        both.recipe.model_copy(update={"teachers": both.recipe.teachers[:1]}),
        pairs_of(both.student, [both.teachers[0].network]),
    )
    _, mine = alone(student, [alone.targets(Runner(both.teachers[0].network, alone.teacher_needs())(images))], labels)
    assert mine["kd"].item() == parts["kd@1"].item()


def test_several_teachers_train_a_student(tiny: Any, tmp_path: Path) -> None:
    settings = ("teacher.allow_weak=true",)
    result = start(tiny.recipe(*settings, teacher=f"{tiny.teacher},self,ema", losses="ce,kd"), tmp_path / "run")
    assert {"kd@1", "kd@2", "kd@3"} <= set(result.summary["final_losses"])
    assert [one["head"] for one in result.summary["more_teachers"]] == ["probe", "the student's"]


@pytest.mark.parametrize(
    ("settings", "words", "says"),
    [
        (["teacher.prepare=full"], {"teacher": "self"}, "cannot be prepared by 'full'"),
        (["teacher.epochs=3"], {"teacher": "ema"}, "epochs: the teacher 'ema' does not have this option"),
        (["teacher.top_k=2", "teacher.cache=memory"], {}, "are for outputs on disk"),
        (["teacher.top_k=2"], {"losses": "ce,affinity"}, "teacher.top_k: affinity compares logits of images"),
        ([], {"teacher": "self,vit_smal"}, "unknown"),
    ],
)
def test_mistakes_are_said(tiny: Any, settings: list[str], words: dict, says: str) -> None:
    with pytest.raises(Exception, match=says) as caught:
        recipe = tiny.recipe(*settings, **words)
        start(recipe)
    assert isinstance(caught.value, RecipeError) or "unknown" in says


def test_a_list_of_teachers_is_one_and_more() -> None:
    from remap.recipe.resolution import validate

    recipe = validate({"teacher": ["mini_teacher", {"model": "self", "weight": 0.5}]}, "test")
    assert recipe.teachers == (TeacherSpec(), TeacherSpec(model="self", weight=0.5))


def test_both_fields_of_teachers_go_together() -> None:
    from remap.recipe.resolution import validate

    lists = {"teacher": ["mini_teacher", "self"]}
    assert validate({**lists, "more_teachers": None}, "test") == validate(lists, "test")
    assert len(validate({**lists, "more_teachers": ["ema"]}, "test").teachers) == 3
    assert len(validate({**lists, "more_teachers": "ema"}, "test").teachers) == 3


def test_a_comparison_with_several_teachers(tiny: Any, tmp_path: Path) -> None:
    """With random weights every seed is another student, and "self" another teacher."""
    settings = ("teacher.allow_weak=true", "more_teachers=[{model: self, allow_weak: true}, ema]")
    recipe = tiny.recipe(*settings, "student.weights=none", "train.epochs=1", "train.warmup_epochs=0", losses="ce,kd")
    table = compare(recipe, ["linear"], 2, tmp_path / "cmp", Silent())
    assert compare(recipe, ["linear"], 2, tmp_path / "cmp", Silent()) == table, "finished cells are read again"
    summary = RunDir.open(tmp_path / "cmp" / "linear-teacher-s1").summary()
    assert [one["head"] for one in summary["more_teachers"]] == ["probe", "the student's"]
    alone = RunDir.open(tmp_path / "cmp" / "linear-alone-s1").recipe()
    assert alone.teachers == () and alone.teacher is None
