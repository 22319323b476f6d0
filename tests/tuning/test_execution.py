"""Every method under gradient checkpointing, compilation, copying and autocast, on every tiny family.

Expected values are the same model run the plain way: not checkpointed, not compiled, not copied, in float32.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.tuning import METHODS
from remap.tuning.base import Attached

# Shifts every key alike, which a softmax over keys does not see: its gradient is 0 by nature, whatever the method.
KEY_SHIFT = "k_norm.bias"

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


def test_gradient_checkpointing_gives_equal_gradients_after_two_forward_passes(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    """Blocks run again in backward, after the second pass has run: each must find the prompts of its own pass."""
    attached = attach(method, build(family), **_without_dropout(method))
    tools.shake(attached)
    expected, found = (_two_pass_gradients(attached, tools, on) for on in (False, True))
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if not name.endswith(KEY_SHIFT))


def test_checkpointing_repeats_dropout_masks(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    """With sample keys the mask is a pure function, so a block that runs again draws the same one."""
    attached = attach(method, build(family))
    tools.shake(attached)
    if attached.trains_backbone:
        attached.model.eval()
    else:
        attached.train()
    attached.set_sample_keys(torch.tensor([11, 12]))
    expected, found = (_two_pass_gradients(attached, tools, on) for on in (False, True))
    assert set(expected) == set(found) >= set(attached.trainable)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_gives_equal_output(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, backend: str
) -> None:
    """In one graph: a hook that dynamo cannot trace would break it."""
    torch._dynamo.reset()
    attached = attach(method, build("dinov2_registers"))
    tools.shake(attached)
    compiled = torch.compile(attached.model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(tools.images()), attached.model(tools.images()), atol=1e-6)
    torch._dynamo.reset()


def test_a_deep_copy_after_a_forward_is_whole_and_independent(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    attached = attach(method, build(family))
    tools.shake(attached)
    before = attached.model(tools.images())
    twin = copy.deepcopy(tools.open_head(attached.model))
    with torch.no_grad():
        for parameter in attached.model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(twin(tools.images()), before)
    assert not torch.equal(attached.model(tools.images()), before)
    twin(tools.images()).sum().backward()
    assert all(p.grad is None for p in attached.model.parameters()), "the copy's hooks reach the original"


def test_bfloat16_autocast_runs_and_keeps_parameters_in_float32(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    attached = attach(method, build(family), **_without_dropout(method))
    tools.shake(attached)
    full = attached.model(tools.images())
    tools.open_head(attached.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = attached.model(tools.images())
    # bfloat16 keeps 8 bits, an error of 2^-8 a rounding; a lost branch or prompt would be of the size of the logits.
    assert (half.float() - full).norm() < 0.05 * full.norm()
    half.float().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in tools.trained(attached).values())


def _without_dropout(method: str) -> dict[str, float]:
    return {"dropout": 0.0} if "dropout" in METHODS.load(method).Config.model_fields else {}


def _two_pass_gradients(attached: Attached, tools: SimpleNamespace, checkpointing: bool) -> dict[str, Tensor]:
    model = tools.open_head(attached.model)
    model.set_grad_checkpointing(checkpointing)
    model.zero_grad()
    (model(tools.images()).square().sum() + model(tools.images(seed=8)).pow(3).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
