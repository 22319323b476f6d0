"""Tiny timm models of every supported kind, and the methods attached to them. Random, offline, on the CPU."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.tuning import METHODS
from remap.tuning.base import Attached

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}

# What timm passes for the named model, at a tiny size; rates above 0 show whether frozen parts stay in eval.
FAMILIES: dict[str, tuple[type[VisionTransformer], dict[str, object]]] = {
    "plain": (VisionTransformer, {"drop_path_rate": 0.3, "proj_drop_rate": 0.2}),
    "dinov2_registers": (
        VisionTransformer,
        {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True, "patch_drop_rate": 0.5},
    ),
    "deit_distilled": (VisionTransformerDistilled, {}),
    "siglip": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "clip": (VisionTransformer, {"pre_norm": True, "attn_drop_rate": 0.2}),
    "avg_pool": (VisionTransformer, {"global_pool": "avg", "qk_norm": True, "pos_drop_rate": 0.2}),
}


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=METHODS.names)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build() -> Callable[[str], nn.Module]:
    """A function from family name to a model, in eval, with every parameter away from its initial 0 or 1."""

    def make(name: str, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        cls, options = FAMILIES[name]
        model = cls(**SIZE, **options, num_classes=5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def attach() -> Callable[..., Attached]:
    """A function that attaches a row of the table with the given options (small where none are given)."""
    small = {"vpt_shallow": {"num_prompts": 3}, "vpt_deep": {"num_prompts": 3}, "adaptformer": {"bottleneck": 4}}

    def make(name: str, model: nn.Module, seed: int = 1, **options: object) -> Attached:
        torch.manual_seed(seed)
        cls = METHODS.load(name)
        return cls(cls.Config(**{**small.get(name, {}), **options})).attach(model, anatomy_of(model))

    return make


@pytest.fixture
def tools() -> SimpleNamespace:
    """Helpers that several test files share."""
    return SimpleNamespace(images=_images, trained=_trained, shake=_shake, step=_step, open_head=_open_head)


def _images(batch: int = 2, seed: int = 7) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _trained(attached: Attached) -> dict[str, nn.Parameter]:
    parameters = dict(attached.model.named_parameters())
    return {name: parameters[name] for name in attached.trainable}


def _shake(attached: Attached, size: float = 0.2) -> None:
    """Move what the method trains, so that nothing is hidden by a zero initialisation."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in _trained(attached).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(size * noise.to(parameter.dtype))


def _open_head(model: nn.Module) -> nn.Module:
    """What the training loop does besides attaching: the classifier trains."""
    model.head.requires_grad_(True)
    return model


def _step(attached: Attached, steps: int = 3, optimiser: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
    """A few steps of the method's own parameters on random labels."""
    if not attached.trainable:
        return
    images, labels = _images(4), torch.tensor([0, 1, 2, 3])
    # A plain gradient step shrinks with the adapter's zero initialisation; float32 would round a small one away.
    lr = 0.01 if optimiser is torch.optim.AdamW else 0.3
    stepper = optimiser(_trained(attached).values(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        attached.train()
        stepper.zero_grad()
        nn.functional.cross_entropy(attached.model(images), labels).backward()
        stepper.step()
    attached.model.eval()
