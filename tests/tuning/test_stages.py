"""Every method that fits networks which are read by their stages, on one with convolutions of all kinds.

Those with attention in some stages meet half of the methods each.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from tiny_models import tiny_models
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, anatomy_of
from remap.backbones.families import FAMILIES
from remap.tuning import METHODS
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method
from remap.tuning.base import Sample

FITTING = [row.name for row in METHODS if row.fits(FAMILIES.row("generic").parts)]
# Its narrowest layers have 16 channels.
SMALL = {"randlora": {"rank": 8, "alpha": 8}, "sidetune": {"side": "test_resnet"}, "vpt_pad": {"border": 2}}
SMALL |= {"fourierft": {"coefficients": 200}}
SMALL |= {"waveft": {"coefficients": 100}, "psoft": {"rank": 8}}
# Which experts are masked is random, and a step or two may leave one untouched.
SMALL |= {"mlae": {"dropout": 0.0}}
# Ranks go where they count most, and may all leave a layer (test_peft_bridge looks at that): here few leave.
SMALL |= {"adalora": {"rank": 7, "initial_rank": 8}}
LABELS = torch.tensor([0, 1, 2, 3])


CELLS = [(method, "efficientnet") for method in FITTING]
CELLS += [
    (method, name)
    for number, method in enumerate(FITTING)
    for name in (("hiera", "tiny_vit")[number % 2],)
    if METHODS.row(method).fits(FAMILIES.row(name).parts)
]


@cache
def shared_anatomy(name: str) -> Anatomy:
    """Read once: watching a pass takes longer than all else here, and paths are those of every copy."""
    model = tiny_models("methods")[name].build(5)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return anatomy_of(model)


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def attached_to(model: nn.Module, name: str, method: str, seed: int = 0) -> Attached:
    torch.manual_seed(seed)
    attached = attach_method(model, shared_anatomy(name), method, SMALL.get(method, {}))
    if attached.wants_sample:
        attached.prepare(Sample(lambda: iter([(images(1), LABELS), (images(2), LABELS)]), 5))
    return attached


@pytest.mark.parametrize(("method", "name"), CELLS)
def test_trains_reloads_merges_and_comes_off(method: str, name: str, build: Callable[[str], nn.Module]) -> None:
    """Source: the plain model's tensors and logits before, those of the trained one after."""
    base, attached = build(name), attached_to(build(name), name, method)
    model, before = attached.model, build(name).state_dict()
    head = {name: p.requires_grad_(True) for name, p in model.named_parameters() if attached.anatomy.is_head(name)}
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name in attached.trainable}
    if attached.identity_at_init:
        assert torch.allclose(model(images(5)), base(images(5)), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for step in range(2):
        attached.train()
        optimizer.zero_grad()
        (F.cross_entropy(model(images(3 + step)), LABELS) + (attached.penalty() or 0.0)).backward()
        optimizer.step()
        attached.after_step(step, 2)
    after, trained = model.eval().state_dict(), dict(model.named_parameters())
    still = [name for name, value in start.items() if torch.equal(value, trained[name])]
    assert not still, f"{still} did not move"
    changing = {*attached.trainable, *attached.buffers, *head}
    assert [
        name for name, value in before.items() if name not in changing and not torch.equal(after[name], value)
    ] == []

    fresh = attached_to(build(name), name, method, seed=9)
    fresh.load(attached.state())
    with torch.no_grad():
        for name, parameter in fresh.model.named_parameters():
            if name in head:
                parameter.copy_(head[name])
        logits = model(images(5))
        assert torch.equal(fresh.model.eval()(images(5)), logits)
        if attached.mergeable:
            assert METHODS.row(method).mergeable
            merged = attached.merge()
            assert list(merged.state_dict()) == list(before)
            base.load_state_dict(merged.state_dict())
            base.eval()  # TinyViT remembers its position bias until it is told its mode
            assert torch.allclose(base(images(5)), logits, rtol=1e-3, atol=1e-4)
        plain = fresh.detach().state_dict()
    assert [name for name in before if name not in head and not torch.equal(plain[name], before[name])] == []
