"""Weights from every source remap knows, on small things made here: no network is needed."""

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.build import build, state_hash
from remap.backbones.families import FAMILIES
from remap.backbones.names import ABOUT, PRESETS, SHORT_NAMES
from remap.errors import BackboneError, UnknownName, WeightsError

NAME = "vit_mini_student_patch4_32"


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A safetensors file of a mini model with a five-class head, and the model it came from."""
    torch.manual_seed(3)
    model = timm.create_model(NAME, num_classes=5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", model


def _same_backbone(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[k], right[k]) for k in left if not k.startswith("head"))


def test_a_safetensors_file_gives_its_weights_and_a_fresh_head(weights: tuple[Path, nn.Module]) -> None:
    path, model = weights
    built = build(NAME, str(path), 7)
    assert _same_backbone(built.model, model)
    assert built.model.head.weight.shape == (7, 128) and built.head_is_fresh
    assert torch.equal(built.model.head.bias, torch.zeros(7))


def test_even_a_head_of_the_same_size_is_fresh_unless_kept(weights: tuple[Path, nn.Module]) -> None:
    """Ten CIFAR classes are not ten digits: a head is never taken over because its size happens to fit."""
    path, model = weights
    assert not torch.equal(build(NAME, str(path), 5).model.head.weight, model.head.weight)
    kept = build(NAME, str(path), 5, keep_head=True)
    assert torch.equal(kept.model.head.weight, model.head.weight) and not kept.head_is_fresh
    with pytest.raises(BackboneError, match="has 5 outputs, the data has 6 classes"):
        build(NAME, str(path), 6, keep_head=True)


def test_a_local_folder_as_timm_saves_it(weights: tuple[Path, nn.Module], tmp_path: Path) -> None:
    save_for_hf(weights[1], tmp_path / "folder", safe_serialization=True)
    assert _same_backbone(build(f"local-dir:{tmp_path / 'folder'}", "pretrained", 3).model, weights[1])


def test_a_hub_cache_made_by_hand(weights: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """timm's own loader reads a cache laid out as the hub lays it out; the tag is one of timm's."""
    name = "vit_tiny_patch16_224.augreg_in21k"
    model = timm.create_model(name, num_classes=21843)
    snapshot = tmp_path / "hub" / f"models--timm--{name}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    code = textwrap.dedent(
        """
        from remap.backbones.build import build
        built = build("vit_tiny", "pretrained", 3)
        print(built.identity.model, built.identity.sha256)
        """
    )
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name, state_hash(model, anatomy_of(model))]


def test_a_hub_out_of_reach_names_repository_cache_and_ways_on(tmp_path: Path) -> None:
    code = "from remap.backbones.build import build; build('vit_large', 'pretrained', 3)"
    environment = {"HF_HUB_CACHE": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    for part in (
        "WeightsError",
        "timm/vit_large_patch16_224.augreg_in21k",
        str(tmp_path / "none"),
        "hf download",
        "local-dir:",
        "--weights none",
    ):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("word", "weights", "error", "part"),
    [
        ("vit_smal", "none", UnknownName, "did you mean 'vit_small'"),
        ("vit_small_patch16_224.nonsense", "pretrained", UnknownName, "no weights tagged 'nonsense'"),
        ("runs/absent", "pretrained", UnknownName, "no such model or run directory"),
        ("mobilenetv3_small_050", "none", BackboneError, "MobileNetV3 is not a backbone"),
        (NAME, "model.pt", WeightsError, "unknown source of weights"),
        (NAME, "absent.safetensors", WeightsError, "cannot read absent.safetensors"),
        ("local-dir:/nowhere", "pretrained", WeightsError, "config.json is missing"),
    ],
)
def test_what_cannot_be_built_says_why(word: str, weights: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        build(word, weights, 3)


def test_weights_of_another_shape_are_refused(weights: tuple[Path, nn.Module]) -> None:
    with pytest.raises(WeightsError, match="does not fit"):
        build("vit_mini_teacher_patch4_32", str(weights[0]), 3)


def test_weights_with_holes_are_refused(weights: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """timm itself loads such a file without a word when the number of classes differs; the rest stays random."""
    tensors = {key: value for key, value in weights[1].state_dict().items() if not key.startswith("blocks.3.")}
    save_file(tensors, tmp_path / "holes.safetensors")
    with pytest.raises(WeightsError, match=r"12 tensors would stay random"):
        build(NAME, str(tmp_path / "holes.safetensors"), 3)
    save_file({f"backbone.{k}": v for k, v in weights[1].state_dict().items()}, tmp_path / "prefix.safetensors")
    with pytest.raises(WeightsError):
        build(NAME, str(tmp_path / "prefix.safetensors"), 3)


def test_a_file_without_a_head_will_do(weights: tuple[Path, nn.Module], tmp_path: Path) -> None:
    tensors = {key: value for key, value in weights[1].state_dict().items() if not key.startswith("head.")}
    save_file(tensors, tmp_path / "headless.safetensors")
    for classes in (3, 10):
        assert _same_backbone(build(NAME, str(tmp_path / "headless.safetensors"), classes).model, weights[1])


def test_a_pickle_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="as safetensors"):
        build(NAME, str(tmp_path / "w.safetensors"), 3)


def test_the_hash_sees_one_flipped_bit_and_no_head() -> None:
    """Second formula: the same bytes through hashlib in the documented order."""
    built = build(NAME, "none", 3)
    digest = hashlib.sha256()
    for name, tensor in sorted(built.model.state_dict().items()):
        if not name.startswith("head."):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode() + tensor.numpy().tobytes())
    assert built.identity.sha256 == digest.hexdigest()
    with torch.no_grad():
        built.model.head.weight.zero_()
    assert state_hash(built.model, built.anatomy) == built.identity.sha256
    built.model.cls_token.data.view(torch.int32)[0, 0, 0] ^= 1
    assert state_hash(built.model, built.anatomy) != built.identity.sha256


@pytest.mark.parametrize("short", [name for name in SHORT_NAMES if not name.startswith("mini")])
def test_short_names_are_tags_of_timm_with_the_sizes_listed(short: str) -> None:
    """Source: timm's own model of that name, built without a head on the meta device."""
    architecture, _, tag = SHORT_NAMES[short].partition(".")
    assert any(name.endswith(tag) for name in timm.list_pretrained(f"{architecture}.*"))
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0)
    assert ABOUT[short][0] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"
    assert ABOUT[short][1] == timm.get_pretrained_cfg(SHORT_NAMES[short]).input_size[-1]
    assert FAMILIES.row(anatomy_of(model).family)


def test_the_tables_of_names_agree() -> None:
    assert set(SHORT_NAMES) == set(ABOUT) and set(PRESETS) <= set(SHORT_NAMES)


@pytest.mark.parametrize(("short", "limit"), [("mini_student", 0.7e6), ("mini_teacher", 5e6)])
def test_the_mini_pair_is_as_small_as_promised(short: str, limit: float) -> None:
    model = build(short, "none", 10).model
    assert sum(p.numel() for p in model.parameters()) <= limit
    assert model.patch_embed.patch_size == (4, 4) and model.patch_embed.img_size == (32, 32)
