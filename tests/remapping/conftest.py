"""Tiny networks of every supported family and their attention maps as timm itself computes them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, anatomy_of, module_at, set_fused_attention
from remap.remapping.objective import Pair
from remap.remapping.signals import Needs, Signals, Tap

# Options on top of the tiny sizes. ``name`` is a timm model whose other options are kept.
FAMILIES: dict[str, dict] = {
    "plain": {},
    "layerscale_registers": {"reg_tokens": 3, "init_values": 0.5},
    "qk_norm": {"qk_norm": True},
    "distilled": {"distilled": True},
    "no_class": {"class_token": False, "global_pool": "avg"},
    "no_class_registers": {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
    "siglip": {"class_token": False, "global_pool": "map"},
    "eva02_fused": {"name": "eva02_tiny_patch14_224"},
    "eva02_split": {"name": "eva02_base_patch14_224"},
    "dinov3": {"name": "vit_small_patch16_dinov3"},
    "dinov3_bias": {"name": "vit_small_patch16_dinov3_qkvb"},
    "pe_core": {"name": "vit_pe_core_tiny_patch16_384"},
    "rope_mixed": {"name": "vit_small_patch16_rope_mixed_224"},
    "eva_no_rope": {"name": "eva_giant_patch14_224"},
    "beit": {"name": "beit_base_patch16_224"},
    "beit_shared": {
        "name": "beit_base_patch16_224",
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
    },
    "beit_both": {"name": "beit_base_patch16_224", "use_shared_rel_pos_bias": True, "qkv_bias": False},
}
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
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": CLASSES}
    options = {**sizes, **FAMILIES[family], **changes}
    kind: Callable[..., nn.Module] = (
        VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer
    )
    if "name" in options:
        # A rotation turns channels in fours.
        options["embed_dim"], kind = 8 * options["num_heads"], partial(timm.create_model, options.pop("name"))
    torch.manual_seed(seed)
    model = kind(**options).eval().requires_grad_(False)
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
