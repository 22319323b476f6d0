"""LoRA against the untouched timm model in float64 with W + alpha / rank * B A written into its weights.

Which rows of which weight hold queries and values is written out from timm's modules.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method
from remap.tuning.dropout import keep_mask, site_offset

Weights = dict[str, Tensor]
# (layer, the thirds of its rows that change); None for all rows.
QV_FUSED = [("attn.qkv", (0, 2))]
ALL_FUSED = [("attn.qkv", (0, 1, 2)), ("attn.proj", None), ("mlp.fc1", None), ("mlp.fc2", None)]
QV_SEPARATE = [("attn.q_proj", None), ("attn.v_proj", None)]


@pytest.mark.parametrize(
    ("variant", "options", "layers"),
    [
        ("plain", {}, QV_FUSED),
        ("plain", {"rank": 3, "alpha": 12.0}, QV_FUSED),
        ("deit_distilled", {"targets": ["v", "k"]}, [("attn.qkv", (1, 2))]),
        ("dinov2_registers", {"targets": ["fc2", "q", "k", "v", "o", "fc1"], "rank": 2}, ALL_FUSED),
        ("dinov3", {}, QV_FUSED),
        ("beit", {"rank": 4, "alpha": 2.0}, QV_FUSED),
        ("eva02", {"targets": ["q", "v"], "rank": 4}, QV_FUSED),
        ("eva02_separate", {}, QV_SEPARATE),
        ("eva02_separate", {"targets": ["fc1"]}, [("mlp.fc1_g", None), ("mlp.fc1_x", None)]),
    ],
)
def test_equals_weights_changed_in_closed_form(
    shaken: Callable, plain_logits: Callable, variant: str, options: dict, layers: list
) -> None:
    _, state, logits = shaken("lora", variant, **options)
    rank = options.get("rank", 8)
    scale = options.get("alpha", rank) / rank

    def change(weights: Weights) -> None:
        for index in range(3):
            for layer, thirds in layers:
                _add(weights, state, f"blocks.{index}.{layer}", thirds, rank, scale)

    assert len(state) == 2 * 3 * len(layers), "every layer has an A and a B"
    assert torch.allclose(logits, plain_logits(variant, change), rtol=0, atol=1e-10)
    assert not torch.allclose(logits, plain_logits(variant), atol=1e-3)


@pytest.mark.parametrize(
    ("variant", "layers"),
    [("swin", QV_FUSED), ("convnext", [("mlp.fc1", None), ("mlp.fc2", None)])],
)
def test_in_hierarchical_models(shaken: Callable, plain_logits: Callable, variant: str, layers: list) -> None:
    attached, state, logits = shaken("lora", variant)

    def change(weights: Weights) -> None:
        for block in attached.anatomy.blocks:
            for layer, thirds in layers:
                _add(weights, state, f"{block.block}.{layer}", thirds, 8, 1.0)

    assert torch.allclose(logits, plain_logits(variant, change), rtol=0, atol=1e-10)


def test_on_1x1_convolutions(tools: SimpleNamespace) -> None:
    """The small ConvNeXts of timm have them for their MLPs."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "conv_mlp": True, "ls_init_value": 0.5}
        models.append(ConvNeXt(**options, num_classes=5).double().eval())
    attached = attach_method(models[0], anatomy_of(models[0]), "lora", {"rank": 2, "dropout": 0.0})
    tools.shake(attached)
    weights, state = dict(models[1].named_parameters()), attached.state()
    with torch.no_grad():
        for block in attached.anatomy.blocks:
            for layer in ("mlp.fc1", "mlp.fc2"):
                _add(weights, state, f"{block.block}.{layer}", None, 2, 1.0)
    images = tools.images().double()
    assert torch.allclose(models[0](images), models[1](images), rtol=0, atol=1e-10)
    merged = attached.merge()
    assert torch.allclose(merged(images), models[1](images), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("variant", "targets", "kernels"),
    [
        ("resnet", None, {(3, 3)}),
        ("resnet_bottleneck", None, {(1, 1)}),
        ("resnet_bottleneck", ["conv", "linear"], {(1, 1), (3, 3)}),
        ("convnext", ["conv"], {(7, 7)}),
    ],
)
def test_on_kernels_as_matrices(
    shaken: Callable, plain_logits: Callable, tools: SimpleNamespace, variant: str, targets: list | None, kernels: set
) -> None:
    """c_out x c_in * k * k; without linear layers and 1x1 convolutions, the kernels are the default."""
    attached, state, logits = shaken("lora", variant, rank=4, targets=targets)
    layers = {name.partition(".remap_lora")[0] for name in state}

    def change(weights: Weights) -> None:
        assert {tuple(weights[f"{layer}.weight"].shape[2:]) for layer in layers} == kernels
        for layer in layers:
            _add(weights, state, layer, None, 4, 1.0)

    expected = plain_logits(variant, change)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(logits, plain_logits(variant), atol=1e-3)
    assert torch.allclose(attached.merge()(tools.images().double()), expected, rtol=0, atol=1e-10)


def test_initialisation(build: Callable[..., nn.Module], attach: Callable[..., Attached]) -> None:
    """B zero; A uniform within 1 / sqrt(inputs), what kaiming_uniform(a = sqrt 5) comes to, for each projection."""
    state = attach("lora", build("plain"), rank=32).state()
    down, up = (state[f"blocks.0.attn.qkv.remap_lora.{name}"] for name in ("down", "up"))
    assert up.abs().max() == 0
    for part in down.split(32):
        assert 0.99 / 32**0.5 < part.abs().max() <= 1 / 32**0.5
        assert abs(part.std() - (1 / 32**0.5) / 3**0.5) < 0.01


@pytest.mark.parametrize(("variant", "windows"), [("plain", 1), ("swin", 4)])
def test_dropout_acts_on_the_input_by_image(
    shaken: Callable, build: Callable, tools: SimpleNamespace, variant: str, windows: int
) -> None:
    """A reads x * mask / (1 - p), the mask of an image a function of its key and the layer, also within windows."""
    attached, state, _ = shaken("lora", variant, dropout=0.5)
    keys, images = torch.tensor([5, 6]), tools.images().double()
    attached.train()
    attached.set_sample_keys(keys)
    found = attached.model(images)
    base, seen = build(variant).double(), []
    for site, block in enumerate(attached.anatomy.blocks):
        layer = f"{block.block}.attn.qkv"

        def add(module: nn.Module, args: tuple, output: Tensor, site: int = site, layer: str = layer) -> Tensor:
            x = args[0]
            seen.append(len(x))
            mask = keep_mask(keys, x.numel() // 2, 0.5, site_offset(site)).view_as(x)
            delta = torch.zeros_like(module.weight)
            _add({f"{layer}.weight": delta}, state, layer, (0, 2), 8, 1.0)
            return output + (2 * x * mask) @ delta.T

        base.get_submodule(layer).register_forward_hook(add)
    assert torch.allclose(found, base(images), rtol=0, atol=1e-10)
    assert seen[0] == 2 * windows, "windows stand in the leading dimension"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in ("lora", "pissa", "olora", "dora", "rslora", "loha", "hira", "hra", "miss")),
        *((method, {}) for method in ("fact_tt", "fact_tk", "randlora", "gralora")),
        ("adalora", {"initial_rank": 4002}),
    ],
)
def test_a_rank_above_that_of_the_layer(build: Callable, attach: Callable, method: str, options: dict) -> None:
    """Said before anything of that size is made."""
    model = build("plain")
    message = r"^rank 400\d is larger than the layer: \d+ x 32\n  given:   blocks.0.attn"
    with pytest.raises(BackboneError, match=message):
        attach(method, model, rank=4000, **options)
    assert list(model.state_dict()) == list(build("plain").state_dict())


def test_targets_that_are_not_there(build: Callable[..., nn.Module], attach: Callable[..., Attached]) -> None:
    with pytest.raises(BackboneError, match="has a layer called q"):
        attach("lora", build("convnext"), targets=["q"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 294_912),
        ({"rank": 4}, 147_456),
        ({"targets": ["q", "k", "v", "o"]}, 589_824),
        ({"targets": ["q", "k", "v", "o", "fc1", "fc2"]}, 12 * 8 * (4 * 2 * 768 + 2 * (768 + 3072))),
    ],
)
def test_count(count: Callable[..., int], options: dict, expected: int) -> None:
    assert count("lora", **options) == expected


def _add(weights: Weights, state: Weights, layer: str, thirds: tuple[int, ...] | None, rank: int, scale: float) -> None:
    """W += scale * B A in the named thirds of a layer's rows, or in all of them."""
    weight = weights[f"{layer}.weight"]
    down, up = state[f"{layer}.remap_lora.down"], state[f"{layer}.remap_lora.up"]
    parts = [weight] if thirds is None else [weight.chunk(3)[third] for third in thirds]
    for index, part in enumerate(parts):
        for r in range(rank):
            part += scale * torch.outer(up[index, :, r], down[index * rank + r]).view_as(part)
