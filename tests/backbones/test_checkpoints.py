"""Checkpoints of training scripts: wrappers, prefixes, pickles, and what else people name as weights."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from remap.backbones.build import build
from remap.errors import WeightsError

NAME = "vit_mini_student_patch4_32"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model(NAME, num_classes=5)


def _is(built: Any, model: nn.Module) -> bool:
    found, expected = built.model.state_dict(), model.state_dict()
    return all(torch.equal(found[key], expected[key]) for key in expected if not key.startswith("head"))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pth.tar", "x.pt", "x.bin", "x.ckpt"])
def test_every_kind_of_file(name: str, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / name
    save_file(model.state_dict(), path) if name.endswith(".safetensors") else torch.save(model.state_dict(), path)
    assert _is(build(NAME, str(path), 3), model)
    kept = build(NAME, str(path), 3, keep_head=True)
    assert torch.equal(kept.model.head.weight, model.head.weight)


def _other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("wrap", "taken"),
    [
        (lambda good, bad: {"state_dict": good}, None),
        (lambda good, bad: {"epoch": 3, "model": good, "optimizer": {"state": bad}}, None),
        (lambda good, bad: {"state_dict": bad, "state_dict_ema": good}, "state_dict_ema"),
        (lambda good, bad: {"model": bad, "model_ema": good}, "model_ema"),
        (lambda good, bad: {"student": bad, "teacher": good}, "teacher"),  # DINO: the running average
        (lambda good, bad: {"state_dict": {"model": good}}, None),
        (lambda good, bad: {"model": good, "model_ema": None}, None),
        # Settings of the teacher; and torch_ema's averages, which have no names.
        (lambda good, bad: {"state_dict": good, "teacher": {"model": {"name": "vit"}, "weight": 0.5}}, None),
        (lambda good, bad: {"model": good, "ema": {"decay": 0.9, "shadow_params": [*bad.values()]}}, None),
    ],
)
def test_wrappers_and_which_of_several_is_taken(wrap: Any, taken: str | None, model: nn.Module, tmp_path: Path) -> None:
    tensors = dict(model.state_dict())
    torch.save(wrap(tensors, _other(tensors)), tmp_path / "x.pt")
    built = build(NAME, str(tmp_path / "x.pt"), 3)
    assert _is(built, model)
    assert any(f"'{taken}' is taken" in note for note in built.notes) == (taken is not None)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "student.", "encoder.", "module.student.backbone."]
)
def test_prefixes_of_frameworks(prefix: str, model: nn.Module, tmp_path: Path) -> None:
    tensors = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    save_file({**tensors, "criterion.weight": torch.zeros(3)}, tmp_path / "x.safetensors")
    built = build(NAME, str(tmp_path / "x.safetensors"), 3)
    assert _is(built, model)
    assert any("criterion.weight" in note for note in built.notes)


def test_a_teacher_beside_a_student_in_one_dictionary(model: nn.Module, tmp_path: Path) -> None:
    tensors = dict(model.state_dict())
    both = {f"teacher.backbone.{key}": tensor for key, tensor in tensors.items()}
    both |= {f"student.backbone.{key}": tensor for key, tensor in _other(tensors).items()}
    save_file(both, tmp_path / "x.safetensors")
    assert _is(build(NAME, str(tmp_path / "x.safetensors"), 3), model)


@pytest.mark.parametrize("where", ["arch", "args", "beside"])
def test_a_file_names_its_model(where: str, model: nn.Module, tmp_path: Path) -> None:
    """timm's and PyTorch's training scripts write it; else a config.json lies beside."""
    values: dict[str, Any] = {"state_dict": {f"module.{key}": t for key, t in model.state_dict().items()}}
    values |= {"arch": {"arch": NAME}, "args": {"args": argparse.Namespace(model=NAME, lr=1.0)}}.get(where, {})
    path = tmp_path / "model_best.pth.tar"
    torch.save(values, path)
    if where == "beside":
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": NAME, "num_classes": 5, "pretrained_cfg": {"classifier": "head"}})
        )
    built = build(str(path), "pretrained", 3)
    assert _is(built, model) and built.identity.weights == str(path)
    assert built.identity.model == (f"local-dir:{tmp_path}" if where == "beside" else NAME)
    assert _is(build(built.identity.model, built.identity.weights, 3), model)  # as a task opens it again
    with pytest.raises(WeightsError, match="is a file of weights already"):
        build(str(path), "none", 3)


def test_a_file_that_names_no_model_says_what_to_add(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"arch": "x", "state_dict": model.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="does not say which model") as caught:
        build(str(tmp_path / "x.pth"), "pretrained", 3)
    assert f"--set teacher.weights={tmp_path / 'x.pth'}" in str(caught.value)


class _Ran:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (self.mark,))  # type: ignore[return-value]


def test_a_pickle_that_needs_more_is_refused_with_the_line_that_converts_it(model: nn.Module, tmp_path: Path) -> None:
    """The line is run as it stands, on what NumPy's scalars make of a checkpoint, and its file is read."""
    values = {"best": np.float64(0.5), "state_dict": model.state_dict()}
    torch.save(values, tmp_path / "x.pth.tar")
    with pytest.raises(WeightsError, match="weights_only=True") as caught:
        build(NAME, str(tmp_path / "x.pth.tar"), 3)
    line = str(caught.value.do).splitlines()[-1].strip()
    assert line.startswith("python -c ")
    exec(shlex.split(line)[2], {})
    assert set(load_file(tmp_path / "x.safetensors")) == set(model.state_dict())
    assert _is(build(NAME, str(tmp_path / "x.safetensors"), 3), model)


def test_what_pytorch_did_not_write_is_not_converted(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("hello")
    with pytest.raises(WeightsError, match="is not a file that PyTorch wrote") as caught:
        build(NAME, str(tmp_path / "x.pt"), 3)
    assert "python -c" not in str(caught.value)


def test_a_pickle_with_code_runs_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": {"head.weight": _Ran(tmp_path / "mark")}}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="convert it once"):
        build(NAME, str(tmp_path / "x.ckpt"), 3)
    assert not (tmp_path / "mark").exists()


HOLDS_ITSELF: dict[str, Any] = {}
HOLDS_ITSELF.update(model=HOLDS_ITSELF, ema=HOLDS_ITSELF)
DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"model": DEEP}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"epoch": 3}, "holds no tensors"),
        (HOLDS_ITSELF, "holds no tensors"),
        (DEEP, "holds no tensors"),
        ([1, 2], "no mapping of names to tensors"),
        ({"state_dict": {"head.weight": torch.zeros(1).expand(2**20, 2**10)}}, "far larger than the file"),
    ],
)
def test_pickles_that_are_no_checkpoints(values: Any, says: str, tmp_path: Path) -> None:
    torch.save(values, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=says):
        build(NAME, str(tmp_path / "x.pt"), 3)


def test_tensors_that_the_model_has_no_use_for_are_not_left_out(model: nn.Module, tmp_path: Path) -> None:
    """Layer scales change the function; timm says nothing where the number of classes differs."""
    scales = {"blocks.0.ls1.gamma": torch.ones(128)}
    save_file({**model.state_dict(), **scales}, tmp_path / "x.safetensors")
    for classes in (3, 5):
        with pytest.raises(WeightsError, match="ls1"):
            build(NAME, str(tmp_path / "x.safetensors"), classes)


def test_labels_in_a_checkpoint(model: nn.Module, tmp_path: Path) -> None:
    index = {"a": 1, "b": 0, "c": 2, "d": 4, "e": 3}
    torch.save({"model": model.state_dict(), "class_to_idx": index}, tmp_path / "x.pt")
    assert build(NAME, str(tmp_path / "x.pt"), 5, keep_head=True).labels == ("b", "a", "c", "e", "d")


def _hub_dinov2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """facebookresearch/dinov2: a mask token, position embeddings for class token and patches, no classifier."""
    found = {key: tensor for key, tensor in tensors.items() if not key.startswith("head.")}
    return {**found, "mask_token": torch.zeros(1, found["cls_token"].shape[-1])}


def test_keys_that_timms_own_filter_knows(tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape = {"img_size": 28, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_small_patch14_dinov2", **shape)
    torch.save(_hub_dinov2(model.state_dict()), tmp_path / "dinov2.pth")
    whole = {"architecture": "vit_small_patch14_dinov2", "num_classes": 0, "model_args": shape, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert _is(build(str(tmp_path / "dinov2.pth"), "pretrained", 3), model)
