"""Tiny networks of every supported family and their attention maps as timm itself computes them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tiny_models import tiny_models
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, anatomy_of, module_at, set_fused_attention
from remap.remapping.objective import Pair
from remap.remapping.signals import Needs, Signals
from remap.remapping.tap import Tap

FAMILIES = tiny_models("signals")
CLASSES = 5


@dataclass
class Network:
    """A model in eval mode with every parameter frozen, and images (B=4) of its own size."""

    model: nn.Module
    anatomy: Anatomy
    images: Tensor

    def signals(self, needs: Needs, rows: slice = slice(None), extra_tokens: int = 0) -> Signals:
        with Tap(self.model, self.anatomy, needs, extra_tokens) as tap:
            return tap(self.images[rows])


def build(family: str = "plain", *, seed: int = 0, **changes: int) -> Network:
    """A ViT with random weights large enough for attention maps far from uniform."""
    row = FAMILIES[family]
    options = {**row.options, **changes}
    if isinstance(row.make, str):  # rotary, or with a relative position bias: a rotation turns channels in fours
        options["embed_dim"] = 8 * options["num_heads"]
    torch.manual_seed(seed)
    model = row.build(CLASSES, **options).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.25)
    images = torch.randn(4, 3, options["img_size"], options["img_size"])
    return Network(model, anatomy_of(model), images)


def timm_maps(model: nn.Module, anatomy: Anatomy, images: Tensor) -> list[Tensor]:
    """Attention maps (B, H, T, T) of all blocks over all tokens: what timm's unfused attention gives to dropout."""
    twin = copy.deepcopy(model)
    set_fused_attention(twin, anatomy, False)
    maps: list[Tensor] = []
    for paths in anatomy.blocks:
        dropout = module_at(twin, paths.attn).attn_drop
        dropout.register_forward_pre_hook(lambda module, args: maps.append(args[0].detach()))
    with torch.no_grad():
        twin(images)
    return maps


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(FAMILIES))
def network(request: pytest.FixtureRequest) -> Network:
    return build(request.param)


@pytest.fixture
def build_network() -> Callable[..., Network]:
    return build


@pytest.fixture
def maps_of_timm() -> Callable[[nn.Module, Anatomy, Tensor], list[Tensor]]:
    return timm_maps


@pytest.fixture
def student() -> Network:
    """Other depth, heads, width and grid (3 x 3) than the teacher's."""
    network = build(seed=1, embed_dim=16, num_heads=2, depth=2)
    network.model.requires_grad_(True)
    return network


@pytest.fixture
def teacher() -> Network:
    """Deeper, wider, with registers, on a 4 x 4 grid."""
    return build("layerscale_registers", seed=2, img_size=32, depth=3, embed_dim=24, num_heads=3)


@pytest.fixture
def pair(student: Network, teacher: Network) -> Pair:
    return Pair(student.anatomy, teacher.anatomy, CLASSES)
