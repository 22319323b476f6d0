"""Convpass against its formula, in float64 on whole tiny models.

Source: Jie and Deng 2022 (2207.07039). The frozen parts are an untouched timm model's; the convolution is
written out as nine shifted products, and tokens that are no patches as images of one pixel.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]
Weights = dict[str, Tensor]

# Grid of patches of every block.
GRIDS = {
    "dinov2_registers": [(4, 4)] * 3,
    "siglip": [(4, 4)] * 3,
    "eva02": [(4, 4)] * 3,
    "beit": [(4, 4)] * 3,
    "swin": [(8, 8)] * 2 + [(4, 4)],
}


@pytest.mark.parametrize("size", [24, 48])
def test_another_image_size_is_refused(build: Build, attach: Attach, size: int) -> None:
    """A model that takes any size would convolve tokens that are no neighbours."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, dynamic_img_size=True, depth=1, embed_dim=24)
    attached = attach("convpass", model)
    assert attached.model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(BackboneError, match="another image size"):
        attached.model(torch.zeros(1, 3, size, size))


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def convolve(w: Weights, at: str, image: Tensor) -> Tensor:
    """(B, rows, columns, r), zeros around."""
    batch, rows, columns, channels = image.shape
    padded = image.new_zeros(batch, rows + 2, columns + 2, channels)
    padded[:, 1:-1, 1:-1] = image
    taps = w[f"{at}.conv.weight"]
    out = w[f"{at}.conv.bias"].expand_as(image)
    for i in range(3):
        for j in range(3):
            out = out + padded[:, i : i + rows, j : j + columns] @ taps[:, :, i, j].T
    return out


def convpass(w: Weights, at: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
    tokens = x.reshape(len(x), -1, x.shape[-1])
    hidden = quick_gelu(tokens @ w[f"{at}.down.weight"].T + w[f"{at}.down.bias"])
    first_patch = hidden.shape[1] - grid[0] * grid[1]
    parts = [convolve(w, at, hidden[:, i, None, None]).flatten(1, 2) for i in range(first_patch)]
    parts.append(convolve(w, at, hidden[:, first_patch:].unflatten(1, grid)).flatten(1, 2))
    out = quick_gelu(torch.cat(parts, 1)) @ w[f"{at}.up.weight"].T + w[f"{at}.up.bias"]
    return out.reshape(x.shape)


@pytest.mark.parametrize("variant", GRIDS)
@pytest.mark.parametrize("options", [{}, {"place": "attention", "scale": 0.5}])
def test_whole_model_equals_the_formula(
    build: Build, attach: Attach, rewire: Callable, tools: SimpleNamespace, variant: str, options: dict
) -> None:
    attached = attach("convpass", build(variant).double(), **options)
    tools.shake(attached)
    weights, images, grids = attached.state(), tools.images().double(), iter(GRIDS[variant])

    def formula(at: str, block: nn.Module, x: Tensor, attn: Callable, mlp: Callable) -> Tensor:
        grid, scale = next(grids), options.get("scale", 1.0)
        normed = block.norm1(x)
        x = x + attn(normed) + scale * convpass(weights, f"{at}.remap_convpass_attn", normed, grid)
        normed = block.norm2(x)
        beside = 0.0 if options else scale * convpass(weights, f"{at}.remap_convpass_mlp", normed, grid)
        return x + mlp(normed) + beside

    untouched = build(variant).double()
    before = untouched(images)
    expected = rewire(untouched, formula)(images)
    assert torch.allclose(attached.model(images), expected, rtol=0, atol=1e-9)
    assert (expected - before).abs().max() > 1e-3


def test_prompts_do_not_move_the_patches(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    """Patches are the last tokens: what stands in front of them changes neither their place nor their neighbours."""
    attached = attach("convpass", build("plain"))
    tools.shake(attached)
    adapter, tokens, prompts = (
        attached.model.blocks[0].remap_convpass_mlp,
        torch.randn(2, 17, 32),
        torch.randn(2, 3, 32),
    )
    plain = adapter(tokens)
    prompted = adapter(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1))
    assert torch.allclose(torch.cat([prompted[:, :1], prompted[:, 4:]], 1), plain, atol=1e-6)
    assert torch.allclose(prompted[:, 1:4], adapter(torch.cat([prompts, tokens[:, 1:]], 1))[:, :3], atol=1e-6)


def test_convolution_starts_as_the_identity(build: Build, attach: Attach) -> None:
    conv = attach("convpass", build("plain")).model.blocks[1].remap_convpass_attn.conv
    hidden = torch.randn(2, 8, 4, 4)
    assert torch.allclose(conv(hidden), hidden, atol=1e-6)


# 2 * 12 * (2*768*8 + 9*64 + 2*8 + 768), and half of it beside attention only.
@pytest.mark.parametrize(("options", "count"), [({}, 327_552), ({"place": "attention"}, 163_776)])
def test_trainable_parameters_on_vit_b16(options: dict, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
        attached = attach_method(model, anatomy_of(model), "convpass", options)
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for name in attached.trainable) == count
