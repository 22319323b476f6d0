"""What the loop does for methods besides stepping: their rate, penalty, look at images, and combination."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from remap.errors import TrainingError
from remap.network import Runner
from remap.pipeline.run import start
from remap.runs.task import load_task
from remap.tuning import METHODS


@pytest.mark.parametrize(
    ("settings", "expected"), [((), 8.0), (("train.lr=null", "train.base_lr=0.5"), 4.0), (("train.lr=0.3",), 0.3)]
)
def test_the_default_rate_is_scaled_to_the_students_width(
    tiny: Any, tmp_path: Path, settings: tuple[str, ...], expected: float
) -> None:
    """128 / 16 = 8 times the table's rate for a student of width 16 (arXiv 2203.03466, table 3: Adam, 1 / fan in)."""
    recipe = tiny.recipe("train.epochs=1", *settings, method="linear", losses="ce", teacher=None)
    if "train.lr=0.3" not in settings:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": None})})
    rate = start(recipe, tmp_path / "run").summary["learning_rate"]
    assert rate == pytest.approx(expected * (METHODS.row("linear").lr if not settings else 1.0))


def test_a_rate_that_would_rise_to_its_end_is_refused(tiny: Any, tmp_path: Path) -> None:
    """The peak follows from the method and the student's width; the table's rate of linear is below 1 / 8."""
    with pytest.raises(TrainingError, match="above the peak learning rate"):
        start(
            tiny.recipe("train.lr=null", "train.min_lr=1.0", method="linear", losses="ce", teacher=None),
            tmp_path / "run",
        )


def test_a_penalty_is_part_of_the_loss_and_is_recorded(tiny: Any, tmp_path: Path) -> None:
    run = start(tiny.recipe(method="adalora", losses="ce", teacher=None), tmp_path / "run").run_dir
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["penalty"] > 0.0
        assert record["loss"] == pytest.approx(record["ce"] + record["penalty"], rel=1e-5)


def test_a_method_that_wants_images_gets_training_images_once(tiny: Any, tmp_path: Path) -> None:
    """Places chosen by gradient differ from the first ones, which an untouched method has."""
    result = start(tiny.recipe(method="gps", losses="ce", teacher=None), tmp_path / "run")
    chosen = [t for name, t in result.student.tensors.items() if "remap_gps" in name and not t.is_floating_point()]
    assert chosen and any(t.max() > 0 for t in chosen)


def test_a_combination_is_trained_saved_and_reloaded(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe("method.lora.rank=2", method="vpt_deep+adaptformer+lora", losses="ce,kd,attention")
    result = start(recipe, tmp_path / "run")
    network, _ = load_task(result.run_dir)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    result.student.model.eval()
    network.model.eval()
    assert torch.equal(Runner(network)(images).logits_BC, Runner(result.student)(images).logits_BC)
    assert {name.split(".")[0] for name in network.attached.trainable} >= {"remap_prompts", "blocks"}
    meta = json.loads((result.run_dir / "task" / "task.json").read_text())
    assert meta["method"]["name"] == "vpt_deep+adaptformer+lora" and meta["method"]["lora"]["rank"] == 2
