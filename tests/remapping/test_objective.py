"""The default objective leaves attention out where a model has none over the whole image; a chosen one stays."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

from remap.backbones.anatomy import anatomy_of
from remap.backbones.families import FAMILIES
from remap.backbones.lookup import family_of_name
from remap.backbones.names import SHORT_NAMES
from remap.errors import BackboneError
from remap.pipeline import dry_run, run
from remap.pipeline.compare import compare
from remap.pipeline.labels_only import labels_only
from remap.pipeline.objective import without_idle_losses
from remap.pipeline.run import start
from remap.progress import Silent
from remap.recipe import load, resolve
from remap.recipe.in_words import losses_in_words
from remap.recipe.named import LossSpec, with_defaults
from remap.remapping import LOSSES
from remap.runs.run_dir import RunDir

SEQUENCES = {row.name for row in FAMILIES if "sequence" in row.parts}


def names(recipe: Any) -> list[str]:
    return [loss.name for loss in recipe.losses]


def test_the_name_tells_the_family_that_building_finds(other_family: tuple[str, str]) -> None:
    family, model = other_family
    assert family_of_name(model) == family == anatomy_of(timm.create_model(model, pretrained=False)).family


def test_every_short_name_tells_its_family_and_a_stranger_none(tmp_path: Path) -> None:
    assert all(family_of_name(name) == family_of_name(tag) != None for name, tag in SHORT_NAMES.items())  # noqa: E711
    found = {name: family_of_name(name) for name in ("vit_small", "dinov3_small", "swin_tiny", "hf-hub:timm/resnet50")}
    assert list(found.values()) == ["vit", "eva", "swin", "resnet"]
    assert family_of_name("mobilenetv3_small_050") == "generic"
    for word in ("no_such", f"local-dir:{tmp_path}", "hf-hub:a/b"):
        assert family_of_name(word) is None


def test_attention_leaves_the_default_objective_alone(
    tiny: Any, other_family: tuple[str, str], watch: Callable[..., Any]
) -> None:
    family, model = other_family
    for role in ("student", "teacher"):
        remarks = watch(lambda done: None)
        found = without_idle_losses(tiny.recipe(method="linear", **{role: model}), remarks)
        assert names(found) == ["ce", "kd"] and not remarks.said, "linear cannot follow attention anyway"
        found = without_idle_losses(tiny.recipe(method="full", **{role: model}), remarks)
        assert names(found) == (["ce", "kd", "attention"] if family in SEQUENCES else ["ce", "kd"])
        assert [role in line and model in line for line in remarks.said] == [True] * (family not in SEQUENCES)


@pytest.fixture
def swin(other_family: tuple[str, str]) -> str:
    return other_family[1]


# One family is enough for whole runs.
only_swin = pytest.mark.parametrize("other_family", ["swin"], indirect=True)


@only_swin
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((), {"losses": "ce,kd,attention"}),
        (("losses=[ce, kd, attention]",), {}),
        (("losses.attention.weight=2",), {}),
    ],
)
def test_a_chosen_attention_is_refused(tiny: Any, tmp_path: Path, swin: str, settings: tuple, words: dict) -> None:
    with pytest.raises(BackboneError, match="no attention over the whole image"):
        start(tiny.recipe(*settings, student=swin, method="full", **words), tmp_path / "run")


@only_swin
def test_a_run_lists_its_losses_and_goes_on_with_them(tiny: Any, tmp_path: Path, swin: str) -> None:
    recipe = tiny.recipe("losses.kd.weight=2", "train.epochs=1", student=swin, method="full")
    result = start(recipe, tmp_path / "run")
    assert result.summary["losses"] == {"ce": 1.0, "kd": 2.0}
    assert names(load(tmp_path / "run" / "recipe.yaml")) == ["ce", "kd"]
    (tmp_path / "run" / "summary.json").unlink()
    assert run.resume(tmp_path / "run").summary["losses"] == result.summary["losses"]
    again = tiny.recipe("train.epochs=1", student=str(tmp_path / "run"), method="full")
    assert names(without_idle_losses(again, Silent())) == ["ce", "kd"], "the run's backbone is a swin"
    found = dry_run.estimate(again, Silent())
    assert [loss["name"] for loss in found["recipe"]["losses"]] == ["ce", "kd"]


@only_swin
def test_a_comparison_of_such_students_works(tiny: Any, tmp_path: Path, swin: str) -> None:
    recipe = tiny.recipe("train.epochs=1", student=swin, method="full")
    table = compare(recipe, ["linear", "full"], 1, tmp_path / "cmp", Silent())
    assert table["losses"] == {"ce": 1.0, "kd": 1.0} and [one["name"] for one in table["objective"]] == ["ce", "kd"]
    assert compare(recipe, ["linear", "full"], 1, tmp_path / "cmp", Silent()) == table


def test_who_chose_the_losses_survives_no_file(tmp_path: Path) -> None:
    recipe = resolve(words={"teacher": "a"})
    assert recipe.has_default_losses and resolve(words={"teacher": "a"}, settings=["losses=null"]).has_default_losses
    assert not recipe.written_out().has_default_losses
    run = RunDir.create(tmp_path / "r", recipe)
    assert not run.recipe().has_default_losses and json.loads((run.path / "status.json").read_text())


@pytest.mark.parametrize("data", [{"source": "d", "labels": 8}, {"source": "d", "unlabeled": "u"}])
def test_with_images_without_labels_the_teacher_counts_more(data: dict[str, Any]) -> None:
    """By default only, however a recipe comes to its losses, and under teachers that were prepared on the labels."""
    few = [("ce", 0.1, {}), ("kd", 1.0, {"temperature": 2.0}), ("attention", 1.0, {})]
    whole = [("ce", 1.0, {}), ("kd", 1.0, {}), ("attention", 1.0, {})]

    def losses(*settings: str, **words: Any) -> list[tuple[str, float, dict[str, Any]]]:
        recipe = resolve(None, {"teacher": "a", "data": data, **words}, settings)
        return [(loss.name, loss.weight, loss.options) for loss in recipe.losses]

    assert losses() == few
    assert losses("losses.attention.weight=0.5") == [*few[:2], ("attention", 0.5, {})]
    assert losses(teacher=["a", "b"]) == few and losses(method="linear") == few[:2]
    # Each has a classifier of its own, and the share of their mixture is for equal weights (arXiv 2505.07675).
    assert losses(method="lora+dual_head") == [whole[0], *few[1:]] and losses(method="dual_head") == [whole[0], few[1]]
    assert losses(losses="ce,kd,attention") == losses(teacher="ema") == whole
    by_words = losses(teacher="clip:ViT-B-32.openai")
    assert by_words == losses(teacher={"model": "a", "prepare": "none"}) == whole, "whose answers hold no labels"
    assert losses("losses.attention.weight=1", teacher="ema") == whole


def test_labels_alone_count_in_full() -> None:
    words: dict[str, Any] = {"teacher": "a", "data": {"source": "d", "labels": 8}}
    recipe = resolve(words=words)
    assert [(loss.name, loss.weight) for loss in labels_only(recipe).losses] == [("ce", 1.0)]
    assert labels_only(recipe).losses == resolve(words={**words, "teacher": None}).losses


def test_losses_are_named_with_what_is_not_their_default() -> None:
    few = resolve(words={"teacher": "a", "data": {"source": "d", "labels": 8}})
    assert losses_in_words(few.losses) == "ce x 0.1, kd x 1 (temperature 2), attention x 1"
    settings = ("losses.kd.temperature=4", "losses.kd.weight_schedule={warmup_epochs: 20}")
    one = resolve(words={"teacher": "a", "losses": "kd:0.5"}, settings=settings)
    assert losses_in_words(one.losses, "×") == "kd × 0.5 (weight_schedule {warmup_epochs 20})"
    for row in LOSSES:  # as a saved recipe has them
        spec = LossSpec(name=row.name)
        whole = LossSpec(name=row.name, weight=spec.weight, **with_defaults(row.load().Config, spec))
        assert losses_in_words([whole]) == f"{row.name} x {spec.weight:g}"
