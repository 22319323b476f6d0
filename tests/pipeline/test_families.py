"""Whole runs on every family of backbones: distil, save, load, merge; by one method each that fits the family best."""

from pathlib import Path
from typing import Any

import pytest
import torch

from remap.backbones.families import FAMILIES, signals_of
from remap.errors import BackboneError
from remap.network import Runner
from remap.pipeline.run import start
from remap.pipeline.student_api import load_student
from remap.runs.task import load_task, open_backbone
from remap.tuning import METHODS

BEST = {
    "naflexvit": "lora",
    "eva": "vpt_deep",
    "beit": "ssf",
    "swin": "adaptformer",
    "swinv2": "bitfit",
    "convnext": "lora",
    "resnet": "residual_adapter",
    "generic": "conv_adapter",
    "tiny_vit": "residual_adapter",
}


@pytest.mark.parametrize("method", ["full", "partial", "linear", None])
def test_a_run_reloads_to_the_same_logits(
    tiny: Any, tmp_path: Path, other_family: tuple[str, str], method: str | None
) -> None:
    family, model = other_family
    recipe = tiny.recipe("train.epochs=1", student=model, method=method or BEST[family], losses="ce,kd")
    result = start(recipe, tmp_path / "run")
    network, _ = load_task(result.run_dir)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found, saved = (Runner(one)(images).logits_BC for one in (_in_eval(network), _in_eval(result.student)))
    assert torch.equal(found, saved)
    assert load_student(result.run_dir).classes == ("blue", "green", "red")


def test_a_merged_run_is_a_backbone(tiny: Any, tmp_path: Path, other_family: tuple[str, str]) -> None:
    family, model = other_family
    method = "lora" if METHODS.row("lora").fits(FAMILIES.row(family).parts) else "residual_adapter"
    result = start(tiny.recipe("train.epochs=1", student=model, method=method, losses="ce"), tmp_path / "run")
    backbone = open_backbone(tiny.recipe(student=str(result.run_dir)).student, 3)
    images = torch.randn(2, 3, 32, 32)
    tuned = _in_eval(result.student).model.forward_features(images)
    assert torch.allclose(backbone.model.eval().forward_features(images), tuned, rtol=1e-5, atol=1e-5)


def test_a_family_teaches_a_plain_student(tiny: Any, tmp_path: Path, other_family: tuple[str, str]) -> None:
    _, model = other_family
    recipe = tiny.recipe("train.epochs=1", "teacher.allow_weak=true", teacher=model, losses="ce,kd,feature")
    assert start(recipe, tmp_path / "run").summary["teacher"]["head"] == "probe"


def test_attention_of_the_whole_image_or_a_plain_refusal(
    tiny: Any, tmp_path: Path, other_family: tuple[str, str]
) -> None:
    family, model = other_family
    recipe = tiny.recipe("train.epochs=1", "teacher.allow_weak=true", teacher=model, losses="ce,kd,attention")
    if "attention" in signals_of(FAMILIES.row(family).parts):
        start(recipe, tmp_path / "run")
        return
    with pytest.raises(BackboneError, match="no attention over the whole image"):
        start(recipe, tmp_path / "run")


def _in_eval(network: Any) -> Any:
    network.model.eval()
    return network
