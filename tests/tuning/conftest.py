"""Tiny timm models of every supported kind, and the methods attached to them. Random, offline, on the CPU."""

import functools
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_models
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of, classifier_parameters
from remap.backbones.families import FAMILIES
from remap.tuning import METHODS, MethodEntry, parts_of
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method
from remap.tuning.base import Sample

VARIANTS = tiny_models("methods")


def seed_draws(seed: int) -> None:
    """What ``torch.manual_seed`` does for the CPU; a CUDA build formats the stack besides, which takes milliseconds."""
    torch.default_generator.manual_seed(seed)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    seed_draws(0)


@dataclass(frozen=True)
class Pair:
    """A method and a tiny model it fits."""

    method: str
    variant: str

    @property
    def row(self) -> MethodEntry:
        return METHODS.row(self.method)

    @property
    def each(self) -> bool:
        """Whether the model stands for its family, for what takes long."""
        return VARIANTS[self.variant].each


def pairs(variants: Iterable[str], others: bool = True) -> list[object]:
    """Cells of the table of support that say yes, for some of the tiny models; all cells would take half an hour.

    The first method of each file meets one model a family and every third variant, each variant thus a third of the
    files. The others of a file, which share its code, meet a sequence model and one without a sequence. Networks that
    are read by their stages have a test of their own, ``test_stages.py``.
    """
    variants = [v for v in variants if "blocks" in FAMILIES.row(VARIANTS[v].family).parts]
    files = [row.target.partition(":")[0] for row in METHODS]
    found = []
    for index, row in enumerate(METHODS):
        fitting = [v for v in variants if row.fits(FAMILIES.row(VARIANTS[v].family).parts)]
        each = [v for v in fitting if VARIANTS[v].each]
        if files[index] in files[:index] and not others:
            continue
        if files[index] in files[:index]:
            is_sequence = ["sequence" in FAMILIES.row(VARIANTS[v].family).parts for v in each]
            chosen = [each[is_sequence.index(kind)] for kind in (True, False) if kind in is_sequence]
        else:
            chosen = each + [v for v in fitting if v not in each and (index + list(VARIANTS).index(v)) % 3 == 0]
        found += [pytest.param(Pair(row.name, v), id=f"{row.name}-{v}") for v in chosen]
    return found


@pytest.fixture(params=[row.name for row in METHODS if "words" not in row.needs])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=pairs(VARIANTS))
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


# Tensors read past their layer, and convolutions: compiling takes a second or two each. Hooks on a plain network are
# compiled for each method, block by block; what the other methods of a file change lies in blocks.
COMPILED = ("eva02", "resnet_bottleneck")


@pytest.fixture(params=pairs(COMPILED, others=False))
def compiled_pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """A function from family name to a model, in eval, with every parameter away from its initial 0 or 1."""

    return lambda name, seed=0, depth=None: deepcopy(_built(name, seed, depth))


@functools.cache
def _built(name: str, seed: int, depth: int | None) -> nn.Module:
    seed_draws(seed)
    row = VARIANTS[name]
    key = next(key for key in ("depth", "depths", "layers") if key in row.options) if depth else ""
    size = depth if key == "depth" else (depth,) * len(row.options[key]) if depth else None
    model = row.build(5, **({key: size} if depth else {}))
    model.pretrained_cfg = {"input_size": (3, 32, 32)}  # all that tells the size of a convolutional network's images
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


# Options that keep the tiny models tiny, and make room for what a default would not show.
SMALL: dict[str, dict[str, object]] = {
    "vpt_shallow": {"num_prompts": 3},
    "vpt_deep": {"num_prompts": 3},
    "vpt_pad": {"border": 2},
    "e2vpt": {"num_prompts": 3, "num_kv": 2},
    "adaptformer": {"bottleneck": 4},
    "fact_tt": {"rank": 4},
    "fact_tk": {"rank": 4},
    "sidetune": {"side": "test_resnet"},
    "vqt": {"num_prompts": 2},
    "l2p": {"pool": 4, "length": 2, "top": 2},
    "dualprompt": {"sessions": 2, "general": 2, "general_blocks": 1, "length": 3},
    "coda_prompt": {"sessions": 2, "pool": 6, "length": 4},
    "domains": {"length": 3, "centroids": 2},
    "ease": {"bottleneck": 4},
    "adalora": {"rank": 4, "initial_rank": 6},
    "lst": {"reduction": 4},
    "gralora": {"rank": 4, "alpha": 4},
    "vera": {"rank": 4},
    "randlora": {"rank": 4, "alpha": 4},
    "fourierft": {"coefficients": 40},
    "waveft": {"coefficients": 40, "scale": 5.0},
    "vblora": {"rank": 2, "vectors": 6, "length": 8},
    "shira": {"rank": 2},
    "c3a": {"block_size": 8},
    "psoft": {"rank": 4},
    "tinylora": {"numbers": 5, "tying": 1.0},
    "unilora": {"rank": 2, "numbers": 30},
}


@pytest.fixture
def attach() -> Callable[..., Attached]:
    """A function that attaches a method or a combination with the given options (small where none are given)."""

    def make(name: str, model: nn.Module, seed: int = 1, **options: object) -> Attached:
        torch.manual_seed(seed)
        parts = parts_of(name)
        small = SMALL.get(name, {}) if len(parts) == 1 else {part: SMALL.get(part, {}) for part in parts}
        attached = attach_method(model, anatomy_of(model), name, {**small, **options})
        if attached.wants_sample:
            attached.prepare(_sample())
        return attached

    return make


def _sample() -> Sample:
    """Two batches of random images of five classes."""
    batches = [(_images(4, seed), torch.tensor([0, 1, 2, 3 + seed % 2])) for seed in (21, 22)]
    return Sample(lambda: iter(batches), 5)


@pytest.fixture
def tools() -> SimpleNamespace:
    """Helpers that several test files share."""
    return SimpleNamespace(
        images=_images,
        trained=_trained,
        shake=_shake,
        step=_step,
        open_head=_open_head,
        sample=_sample,
        traced_depth=_traced_depth,
    )


def _traced_depth(method: str, variant: str) -> int:
    """Tracing takes as long as a network is deep. What changes layers one by one needs one block; tokens, side
    networks and adapters may pass something from block to block, or from stage to stage where there are stages."""
    return 1 if METHODS.row(method).category == "parameter" or "depth" not in VARIANTS[variant].options else 2


def _images(batch: int = 2, seed: int = 7) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _trained(attached: Attached) -> dict[str, nn.Parameter]:
    parameters = dict(attached.model.named_parameters())
    return {name: parameters[name] for name in attached.trainable}


def _shake(attached: Attached, size: float = 0.2) -> None:
    """Move what the method trains, so that nothing is hidden by a zero initialisation."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in attached.model.named_parameters():
            if name not in attached.trainable and ".remap_" not in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(size * noise.to(parameter.dtype))


def _open_head(model: nn.Module) -> nn.Module:
    """What the training loop does besides attaching: the classifier trains."""
    for parameter in classifier_parameters(model, anatomy_of(model)).values():
        parameter.requires_grad_(True)
    return model


def _step(attached: Attached, steps: int = 3) -> set[str]:
    """A few steps of the method's own parameters and the classifier on random labels, as the training loop does them.

    Returns:
        Names of the trained parameters that had a gradient other than 0 in one of them.
    """
    model, labels = _open_head(attached.model), torch.tensor([0, 1, 2, 3])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stepper = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.0)
    alive: set[str] = set()
    for step in range(steps):
        attached.train()
        stepper.zero_grad()
        loss = nn.functional.cross_entropy(model(_images(4, seed=7 + step)), labels)
        penalty = attached.penalty()
        (loss if penalty is None else loss + penalty).backward()
        assert not [name for name, p in trained.items() if p.grad is None], "DDP would wait for their gradients"
        alive |= {name for name, p in trained.items() if p.grad.abs().max() > 0}
        stepper.step()
        attached.after_step(step, steps)
    model.eval()
    return alive
