"""Self-supervised weights, in files laid out by hand as the official checkpoints are."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.build import build, state_hash
from remap.backbones.names import preset_of
from remap.errors import BackboneError, WeightsError

NAME = "vit_mini_student_patch4_32"


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model(NAME, num_classes=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _file(path: Path, tensors: dict[str, Tensor]) -> str:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    return str(path)


def _mae(encoder: nn.Module) -> dict[str, Tensor]:
    """The keys of MAE's full pre-training checkpoint: facebookresearch/mae, models_mae.py."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 64),
        "decoder_pos_embed": torch.zeros(1, 65, 64),
        "decoder_embed.weight": torch.zeros(64, 128),
        "decoder_blocks.0.norm1.weight": torch.zeros(64),
        "decoder_norm.weight": torch.zeros(64),
        "decoder_pred.weight": torch.zeros(48, 64),
    }
    return {**encoder.state_dict(), **decoder}


def _moco(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The keys of MoCo v3's checkpoints: facebookresearch/moco-v3, moco/builder.py."""
    projector = {f"{prefix}head.0.weight": torch.zeros(16, 128), f"{prefix}head.1.running_mean": torch.zeros(16)}
    predictor = {"module.predictor.0.weight": torch.zeros(16, 16)}
    return {**{prefix + key: tensor for key, tensor in encoder.state_dict().items()}, **projector, **predictor}


def test_weights_are_not_copied_to_ask_for_the_size_of_a_model(
    encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm copies the configuration with all that is in it, for each model that it builds."""
    real, given = timm.create_model, []

    def create_model(name: str, **arguments: Any) -> nn.Module:
        given.append(("state_dict" in arguments.get("pretrained_cfg_overlay", {}), torch.empty(0).device.type))
        return real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    build(NAME, _file(tmp_path / "mae.safetensors", _mae(encoder)), 7, preset="mae")
    assert given == [(False, "meta"), (True, "cpu")]


@pytest.mark.parametrize("decoder", [False, True])
def test_mae_is_the_mean_of_the_patches_through_a_fresh_norm(decoder: bool, encoder: nn.Module, tmp_path: Path) -> None:
    """Source: MAE's models_vit.py with global_pool: blocks, mean without the class token, fc_norm."""
    path = _file(tmp_path / "mae.safetensors", _mae(encoder) if decoder else encoder.state_dict())
    built = build(NAME, path, 7, preset="mae")
    model, images = built.model.eval(), torch.randn(2, 3, 32, 32)
    encoder.norm = nn.Identity()
    mean = encoder.forward_features(images)[:, 1:].mean(dim=1)
    expected = F.layer_norm(mean, (128,), eps=model.fc_norm.eps)
    torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), expected)
    assert built.anatomy.final_norm == "fc_norm" and not built.anatomy.class_token_pooled
    assert torch.equal(model.fc_norm.weight, torch.ones(128)) and not model.fc_norm.bias.any()
    assert built.identity.preset == "mae" and model.head.weight.shape == (7, 128)
    assert (built.preprocess.mean, built.preprocess.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_a_fine_tuned_mae_keeps_its_norm(encoder: nn.Module, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith("norm.")}
    tensors |= {"fc_norm.weight": torch.full((128,), 2.0), "fc_norm.bias": torch.full((128,), 3.0)}
    model = build(NAME, _file(tmp_path / "tuned.safetensors", tensors), 7, preset="mae").model
    assert torch.equal(model.fc_norm.weight, tensors["fc_norm.weight"])
    assert torch.equal(model.fc_norm.bias, tensors["fc_norm.bias"])


@pytest.mark.parametrize("prefix", ["module.base_encoder.", "module.momentum_encoder.", "base_encoder.", "module.", ""])
def test_moco_v3_is_the_class_token_of_the_encoder(prefix: str, encoder: nn.Module, tmp_path: Path) -> None:
    """Source: the encoder's own class token behind its norm. ``module.`` alone is the linear evaluation's layout,
    which VPT reads."""
    path = _file(tmp_path / "moco.safetensors", _moco(encoder, prefix))
    built = build(NAME, path, 7, preset="moco_v3")
    images = torch.randn(2, 3, 32, 32)
    model = built.model.eval()
    expected = encoder.forward_features(images)[:, 0]
    torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), expected)
    assert built.anatomy.class_token_pooled and built.identity.preset == "moco_v3"
    assert built.identity.sha256 == state_hash(model, built.anatomy)
    assert "state_dict" not in model.pretrained_cfg


def test_the_trained_encoder_is_preferred_to_its_running_average(encoder: nn.Module, tmp_path: Path) -> None:
    """As in the official evaluation, main_lincls.py."""
    average = {f"module.momentum_encoder.{k}": torch.zeros_like(v) for k, v in encoder.state_dict().items()}
    path = _file(tmp_path / "both.safetensors", {**average, **_moco(encoder, "module.base_encoder.")})
    model = build(NAME, path, 7, preset="moco_v3").model
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("classes", [3, 10])
def test_a_preset_on_weights_that_timm_fetches(classes: int) -> None:
    """The shipped weights have a head for ten classes, so that timm would be strict for ten of ours."""
    built = build("mini_student", "pretrained", classes, preset="mae")
    plain = build("mini_student", "pretrained", classes).model.state_dict()
    loaded = built.model.state_dict()
    assert torch.equal(loaded["fc_norm.weight"], torch.ones(128)) and "norm.weight" not in loaded
    assert all(torch.equal(loaded[key], plain[key]) for key in loaded if key.startswith(("blocks", "patch", "pos")))


def test_holes_and_foreign_keys_are_refused(encoder: nn.Module, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith("blocks.3.")}
    with pytest.raises(WeightsError, match="12 tensors would stay random"):
        build(NAME, _file(tmp_path / "holes.safetensors", tensors), 7, preset="mae")
    # Without the preset the missing norm is a hole like any other.
    tensors = {key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith("norm.")}
    with pytest.raises(WeightsError, match="2 tensors would stay random"):
        build(NAME, _file(tmp_path / "bare.safetensors", tensors), 7)
    with pytest.raises(WeightsError, match="holds no encoder of moco_v3"):
        build(NAME, _file(tmp_path / "other.safetensors", {"conv1.weight": torch.zeros(2)}), 7, preset="moco_v3")


def test_presets_are_for_plain_vision_transformers() -> None:
    with pytest.raises(BackboneError, match="'mae' is not for beit_base_patch16_224"):
        build("beit_base_patch16_224", "none", 3, preset="mae")
    with pytest.raises(BackboneError, match="bring no classifier"):
        build(NAME, "none", 3, preset="mae", keep_head=True)


def test_a_short_name_implies_its_preset() -> None:
    assert preset_of("mae_base") == "mae" and preset_of("mae_base", "none") == "none"
    assert preset_of("vit_base") == "none" and preset_of("vit_base", "moco_v3") == "moco_v3"


def test_a_file_is_read_in_place_of_the_weights_in_a_model_folder(encoder: nn.Module, tmp_path: Path) -> None:
    """timm itself would take the folder's weights and say nothing of the file."""
    torch.manual_seed(9)
    timm.models.save_for_hf(timm.create_model(NAME, num_classes=5), tmp_path / "folder", safe_serialization=True)
    path = _file(tmp_path / "mine.safetensors", encoder.state_dict())
    built = build(f"local-dir:{tmp_path / 'folder'}", path, 3)
    assert torch.equal(built.model.pos_embed, encoder.pos_embed)
