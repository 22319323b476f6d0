"""Students that start from the teacher's weights: in recipes, on the command line, and in whole runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from remap.errors import BackboneError, RecipeError
from remap.pipeline.comparison_cells import comparison_cells
from remap.pipeline.init_student import init_from_teacher
from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import Recipe, dump, load, resolve
from remap.runs.task import load_task, open_backbone

RANDOM = "student.weights=none"


def refused(*settings: str, **words: object) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(words={"teacher": "mini_teacher", **words}, settings=settings)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_a_word_of_the_command_line(tmp_path: Path) -> None:
    """--init layers --set student.init.which=last, written and read back."""
    words = {"teacher": "mini_teacher", "init": "layers"}
    recipe = resolve(words=words, settings=[RANDOM, "student.init.which=last"])
    assert recipe.student.init.options == {"which": "last"}
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert load(tmp_path / "recipe.yaml") == recipe
    plain, first = (resolve(words=words, settings=[RANDOM, *more]) for more in ([], ["student.init.which=uniform"]))
    assert plain.written_out() == first.written_out() and plain.digest() == first.digest() != recipe.digest()
    assert recipe.digest() != resolve(words={"teacher": "mini_teacher"}, settings=[RANDOM]).digest()


def test_pretrained_weights_are_never_lost_silently(tmp_path: Path) -> None:
    assert "overwrite the pre-trained weights of mini_student" in (said := refused(init="net2net"))
    assert "student.weights=none" in said and "--force-init" in said
    said = refused("student.weights=some.safetensors", init="net2net")
    assert "overwrite the weights in some.safetensors" in said
    run = tmp_path / "run"
    (run / "task").mkdir(parents=True)
    (run / "task" / "task.json").write_text("{}")
    said = refused(init="net2net", student=str(run))
    assert f"overwrite the weights in {run}" in said and "student.weights=none" not in said
    forced = resolve(words={"teacher": "mini_teacher", "init": "net2net", "force_init": True})
    assert forced.student.force_init


def test_mistakes_in_a_recipe() -> None:
    assert "unknown initialisation 'subclon'; did you mean 'subclone'?" in refused(init="subclon")
    assert "student.init.which: 'firs' is not one of" in refused(RANDOM, "student.init.which=firs", init="layers")
    assert "student.init.wich: unknown key; did you mean 'which'?" in refused(
        RANDOM, "student.init.wich=first", init="layers"
    )
    assert "student.init: layers needs a teacher" in refused(RANDOM, init="layers", teacher=None)
    assert "has the student's own weights" in refused(RANDOM, init="layers", teacher="self")
    assert "nothing to force" in refused(force_init=True)


def test_the_cells_without_a_teacher_start_from_their_own_weights() -> None:
    recipe = resolve(words={"teacher": "mini_teacher", "init": "subclone"}, settings=[RANDOM])
    inits = {cell.with_teacher: cell.recipe.student.init for cell in comparison_cells(recipe, ["bitfit"], 1)}
    assert inits[False] is None and inits[True].name == "subclone"


@pytest.mark.parametrize("method", ["vpt_deep", "lora", "full"])
@pytest.mark.parametrize("forced", [False, True], ids=["random", "forced"])
def test_a_run_saves_what_it_started_from(
    tiny: Any, tmp_path: Path, watch: type, method: str, forced: bool, largest_difference: Callable[..., float]
) -> None:
    """Loaded anew: the same tensors and logits. Nothing but the task holds this backbone."""
    settings = ("train.epochs=1", "train.lr=0.001", "student.force_init=true" if forced else RANDOM)
    recipe = tiny.recipe(*settings, method=method, init="weight_selection")
    said = watch(lambda step: None)
    result = start(recipe, tmp_path / "run", said)
    network, _ = load_task(tmp_path / "run")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network.model.eval()(images), result.student.model.eval()(images))
    whole = [dict(model.named_parameters()) for model in (network.model, result.student.model)]
    assert largest_difference(*whole) == 0.0
    assert network.identity == result.student.identity and network.identity.weights == "none"
    summary = result.summary["student"]["init"]
    assert list(summary["blocks"]) == [0, 1] and summary["init"] == "weight_selection"
    assert any("width 16 of 24" in line for line in said.said)


@pytest.mark.parametrize(("init", "blocks"), [("weight_selection", [0, 1]), ("subclone", [0, 2])])
def test_the_backbone_starts_from_the_teacher(tiny: Any, init: str, blocks: list[int]) -> None:
    """Source: rows of the teacher's own file. Both choose among its 24 channels, and learn from the same images."""
    found = []
    for _ in range(2):
        recipe = tiny.recipe(RANDOM, init=init)
        student, teacher = open_backbone(recipe.student, 3), open_backbone(recipe.teacher, 3)
        head = student.model.head.weight.detach().clone()
        inherited = init_from_teacher(student, recipe, SharedResources(), Silent())
        assert list(inherited.report.blocks) == blocks
        assert torch.equal(student.model.head.weight, head)
        mine, its = (side.model.norm.weight.tolist() for side in (student, teacher))
        channels = [its.index(value) for value in mine]
        assert channels == sorted(set(channels)) and len(channels) == 16
        for block, source in enumerate(blocks):
            own, other = student.model.blocks[block].norm1.bias, teacher.model.blocks[source].norm1.bias
            assert torch.equal(own, other[channels])
        found.append(student.identity.sha256)
    assert found[0] == found[1] != open_backbone(recipe.student, 3).identity.sha256


def test_a_run_teaches_with_its_method_folded_in(tiny: Any, tmp_path: Path) -> None:
    """The teacher is a run of lora at another weight: its merged tensors arrive, its normalisation too."""
    teacher = start(resolve_alone(tiny, method="lora"), tmp_path / "teacher")
    recipe = resolve(
        words={"data": tiny.data, "teacher": str(tmp_path / "teacher"), "student": tiny.teacher, "init": "layers"},
        settings=[RANDOM],
    )
    student = open_backbone(recipe.student, 3)
    init_from_teacher(student, recipe, SharedResources(), Silent())
    teacher.student.attached.merge()
    wanted = dict(teacher.student.model.named_parameters())
    for name, parameter in student.model.named_parameters():
        if not student.anatomy.is_head(name):
            assert torch.equal(parameter, wanted[name]), name


def test_prompts_cannot_be_inherited(tiny: Any, tmp_path: Path) -> None:
    start(resolve_alone(tiny, method="vpt_deep"), tmp_path / "teacher")
    recipe = resolve(
        words={"data": tiny.data, "teacher": str(tmp_path / "teacher"), "student": tiny.teacher, "init": "layers"},
        settings=[RANDOM],
    )
    with pytest.raises(BackboneError, match="cannot be folded into the backbone.s weights"):
        init_from_teacher(open_backbone(recipe.student, 3), recipe, SharedResources(), Silent())


def resolve_alone(tiny: Any, method: str) -> Recipe:
    """The teacher's architecture, tuned by itself for an epoch."""
    settings = (*tiny.SETTINGS, "train.epochs=1")
    return resolve(words={"data": tiny.data, "student": tiny.teacher, "method": method}, settings=settings)


def test_the_method_draws_as_it_would_without(tiny: Any) -> None:
    """The same prompts and classifier, whatever the backbone starts from."""
    draws = []
    for init in (None, "weight_selection"):
        recipe = tiny.recipe(RANDOM, init=init)
        torch.manual_seed(0)
        student = open_backbone(recipe.student, 3)
        init_from_teacher(student, recipe, SharedResources(), Silent())
        draws.append((student.model.head.weight, torch.randn(3)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])


def test_pixels_are_normalised_as_for_the_teacher(tiny: Any) -> None:
    """The patch embedding was trained on pixels normalised so."""
    recipe = tiny.recipe(RANDOM, init="weight_selection")
    student = open_backbone(recipe.student, 3)
    student.preprocess = replace(student.preprocess, mean=(0.1, 0.2, 0.3))
    inherited = init_from_teacher(student, recipe, SharedResources(), Silent())
    assert student.preprocess.mean == (0.5, 0.5, 0.5) and "mean 0.5/0.5/0.5" in inherited.text
