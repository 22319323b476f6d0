"""RepAdapter against its formula, and its folding, in float64 on whole tiny models.

Source: Luo et al. 2023 (2302.08106). The frozen parts are an untouched timm model's; the adapter is
written out with one product a group.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from pydantic import ValidationError
from timm.layers import RmsNorm
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]
Weights = dict[str, Tensor]

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
WINDOWS = {"patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "num_classes": 5}
# Where biases have no place of their own: in no layer and no norm, in no key (rotated), and behind padding.
AWKWARD = {
    "no_biases": partial(VisionTransformer, **PLAIN, qkv_bias=False, norm_layer=RmsNorm),
    "rotated_keys": partial(Eva, **PLAIN, use_rot_pos_emb=True, qk_norm=True),
    "padded_windows": partial(SwinTransformer, **WINDOWS, img_size=24, window_size=4),
}


def linear_adapter(w: Weights, at: str, x: Tensor, scale: float, groups: int) -> Tensor:
    if f"{at}.down.weight" not in w:
        return torch.zeros_like(x)
    none = torch.zeros(1, dtype=x.dtype)
    hidden = x @ w[f"{at}.down.weight"].T + w.get(f"{at}.down.bias", none)
    pairs = zip(hidden.chunk(groups, -1), w[f"{at}.up.weight"].chunk(groups), strict=True)
    return scale * (torch.cat([part @ weight.T for part, weight in pairs], -1) + w.get(f"{at}.up.bias", none))


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


@pytest.mark.parametrize("variant", ["dinov2_registers", "eva02", "eva02_separate", "dinov3", "beit", "swin"])
@pytest.mark.parametrize("options", [{}, {"place": "attention", "groups": 4, "scale": 0.5}])
def test_whole_model_equals_the_formula_and_folds(
    build: Build, attach: Attach, rewire: Callable, tools: SimpleNamespace, variant: str, options: dict
) -> None:
    attached = attach("repadapter", build(variant).double(), **options)
    tools.shake(attached)
    weights, images = attached.state(), tools.images().double()
    settings = {"scale": options.get("scale", 1.0), "groups": options.get("groups", 2)}

    def formula(at: str, block: nn.Module, x: Tensor, attn: Callable, mlp: Callable) -> Tensor:
        normed = block.norm1(x)
        x = x + attn(normed + linear_adapter(weights, f"{at}.remap_repadapter_attn", normed, **settings))
        normed = block.norm2(x)
        return x + mlp(normed + linear_adapter(weights, f"{at}.remap_repadapter_mlp", normed, **settings))

    plain = build(variant).double()
    before = plain(images)
    expected = rewire(build(variant).double(), formula)(images)
    assert torch.allclose(attached.model(images), expected, rtol=0, atol=1e-10)
    assert (expected - before).abs().max() > 1e-3
    plain.load_state_dict(attached.merge().state_dict())
    assert torch.allclose(plain(images), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", AWKWARD)
def test_folds_exactly_where_biases_have_no_place_of_their_own(tools: SimpleNamespace, name: str) -> None:
    model, plain = shaken(AWKWARD[name]()), AWKWARD[name]().double().eval()
    attached = attach_method(model, anatomy_of(model), "repadapter", {})
    tools.shake(attached)
    images = tools.images().double()[..., : 24 if name == "padded_windows" else 32, :]
    images = images[..., : images.shape[-2]]
    tuned = model(images)
    plain.load_state_dict(attached.merge().state_dict())
    assert torch.allclose(plain(images), tuned, rtol=0, atol=1e-9)


def test_no_biases_where_none_can_be_folded() -> None:
    model = AWKWARD["no_biases"]()
    trained = attach_method(model, anatomy_of(model), "repadapter", {}).trainable
    assert {name.rpartition("remap_repadapter_")[2] for name in trained} == {
        "attn.down.weight",
        "attn.up.weight",
        *(f"mlp.{layer}.{kind}" for layer in ("down", "up") for kind in ("weight", "bias")),
    }


@pytest.mark.parametrize("name", ["repadapter", "lora+repadapter"])
def test_a_bias_that_no_norm_could_make_is_not_folded_wrongly(
    build: Build, attach: Attach, tools: SimpleNamespace, name: str
) -> None:
    """I + s B A that removes a direction: nothing put into the norm's bias could come out of it in this direction."""
    options = {"bottleneck": 2}
    attached = attach(name, build("dinov3"), **({"repadapter": options} if "+" in name else options))
    tools.shake(attached)
    adapter = attached.model.blocks[0].remap_repadapter_attn
    with torch.no_grad():
        adapter.down.weight.zero_()[0, 0] = 1.0
        adapter.up.weight.zero_()[0, 0] = -1.0
        adapter.up.bias.fill_(0.1)
    before = attached.model(tools.images())
    with pytest.raises(BackboneError, match="cannot be folded exactly"):
        attached.merge()
    assert torch.equal(attached.model(tools.images()), before), "nothing is half folded"


def test_groups_must_divide_bottleneck_and_width(build: Build, attach: Attach) -> None:
    with pytest.raises(ValidationError, match="multiple of groups"):
        attach("repadapter", build("plain"), bottleneck=8, groups=3)
    model = build("plain")
    with pytest.raises(BackboneError, match="divide the width"):
        attach("repadapter", model, bottleneck=9, groups=3)
    assert not [name for name in model.state_dict() if "remap_" in name]


# 24 * (768*8 + 8 + 768*8/2 + 768); the paper counts the weights alone, 221,184 or 0.22 M.
@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 239_808), ({"place": "attention"}, 119_904), ({"groups": 1}, 239_808 + 24 * 768 * 4)],
)
def test_trainable_parameters_on_vit_b16(options: dict, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
        attached = attach_method(model, anatomy_of(model), "repadapter", options)
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for name in attached.trainable) == count
    assert sum(parameters[name].numel() for name in attached.no_decay) == (count > 200_000) * 12 * 776 + 12 * 776
