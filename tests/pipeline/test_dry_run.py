"""A dry run looks at a few images, needs no weights, and says what takes seconds."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.data.views import ViewSource
from remap.errors import DataError, UnknownName, WeightsError
from remap.pipeline import dry_run
from remap.pipeline.components import build_components
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import resolve_distill
from remap_cli import estimates


def test_a_few_images_are_decoded(tiny: Any, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any]) -> None:
    read, seen = ViewSource._read, set[int]()

    def noted(source: ViewSource, index: int) -> Any:
        seen.add(index)
        return read(source, index)

    monkeypatch.setattr(ViewSource, "load", None)
    monkeypatch.setattr(ViewSource, "_read", noted)
    found = dry_run.estimate(tiny.recipe("train.batch_size=4"), watch(lambda step: None))
    assert found["estimate"]["seconds"] > 0.0 and len(seen) <= 4 < found["data"]["train_images"]


def test_weights_that_are_not_here_are_random_ones(monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any]) -> None:
    def away(model: str, *_: Any) -> None:
        if model == "vit_larg":
            raise UnknownName("unknown model")
        raise WeightsError("out of reach")

    monkeypatch.setattr(dry_run, "require_at_hand", away)
    progress = watch(lambda step: None)
    recipe = resolve_distill(None, {"teacher": "vit_large", "student": "vit_small"})
    found = dry_run._at_hand(recipe, progress)
    assert [spec.weights for spec in (*found.teachers, found.student)] == ["none", "none"]
    assert [text.partition(":")[0] for text in progress.said] == ["vit_small", "vit_large"]
    own = recipe.student.model_copy(update={"weights": "mine.safetensors"})
    assert dry_run._at_hand(recipe.model_copy(update={"student": own}), progress).student == own
    with pytest.raises(UnknownName):
        dry_run._at_hand(resolve_distill(None, {"teacher": "vit_larg"}), progress)


def test_a_pass_that_serves_head_and_outputs_is_counted_once(tiny: Any, watch: Callable[..., Any]) -> None:
    """As in ``test_nothing_twice``: two passes where outputs are not cached, or another head of the teacher is read."""

    def preparing(*settings: str) -> float:
        recipe = tiny.recipe(*settings, losses="ce,kd")
        return dry_run.estimate(recipe, watch(lambda step: None))["estimate"]["preparing_seconds"]

    assert preparing() == 0.0 == preparing("teacher.cache=disk")
    assert preparing("teacher.cache=off") > 0.0 < preparing("data.augment=light", "data.views=2")


def test_a_student_without_steps_costs_none(
    tiny: Any, watch: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches of 8. By hand, three checkpoints with two moments of AdamW, and the task, are ten times the task."""
    disk = {}
    for fit, method in (("ridge", "ranpac"), ("prototypes", "linear"), ("gradient", "linear")):
        recipe = tiny.recipe(f"train.fit={fit}", "train.batch_size=8", method=method, teacher=None, losses="ce")
        found = dry_run.estimate(recipe, watch(lambda step: None))
        guess, by_steps = found["estimate"], fit == "gradient"
        disk[fit] = guess["run_bytes"]
        assert guess["steps"] == (found["data"]["train_images"] // 8 * recipe.train.epochs if by_steps else 0)
        assert (guess["step_seconds"] > 0, guess["activation_bytes"] > 0) == (by_steps, by_steps)
        assert guess["seconds"] > 0 < guess["memory_bytes"]
        assert (SharedResources().training_steps(recipe) > 0) == by_steps
        estimates.show(found)
        printed = capsys.readouterr().out
        assert [word in printed for word in ("no training steps", "learning rate", "checkpoints")] == [
            *(not by_steps, by_steps, by_steps)
        ]
    assert disk["gradient"] == 10 * disk["prototypes"]


def test_images_that_cannot_be_read_are_an_error(tmp_path: Path, tiny: Any, watch: Callable[..., Any]) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    for path in (tmp_path / "data" / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the training images can be read"):
        dry_run.estimate(tiny.recipe(data=str(tmp_path / "data")), watch(lambda step: None))


def test_a_teacher_that_would_be_tuned_is_counted_by_its_shapes(tiny: Any) -> None:
    recipe = tiny.recipe("student.weights=none", method="lora", losses="ce")
    real, shapes = (
        build_components(recipe, None, Silent(), SharedResources(shapes_only=one)).student for one in (False, True)
    )
    assert {p.device.type for p in shapes.model.parameters()} == {"meta"}
    assert (shapes.num_trainable, shapes.num_parameters) == (real.num_trainable, real.num_parameters)
    assert {k: v.shape for k, v in shapes.trained.items()} == {k: v.shape for k, v in real.trained.items()}
