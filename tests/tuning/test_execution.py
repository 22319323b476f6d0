"""Every method under gradient checkpointing, compilation, copying and autocast, on every tiny family.

Expected values are the same model run the plain way: not checkpointed, not compiled, not copied, in float32.
"""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from remap.backbones.families import FAMILIES
from remap.tuning import METHODS
from remap.tuning.attached import Attached

# Shifts every key alike, which a softmax over keys does not see: its gradient is 0 by nature, whatever the method.
KEY_SHIFT = "k_norm.bias"
# peft's wavelet transform selects elements by a mask, whose number is not known in advance: compiled in several graphs.
IN_PIECES = ("waveft",)

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


def test_a_tuned_model_runs_in_every_way(
    build: Build, attach: Attach, tools: SimpleNamespace, pair: Any, one_process: None
) -> None:
    """One object for all: each way leaves the parameters as they are until the last one, the copy."""
    attached = attach(pair.method, build(pair.variant), **_without_dropout(pair.method))
    tools.shake(attached)
    _bfloat16_autocast_runs_and_keeps_parameters_in_float32(attached, tools)
    _gradient_checkpointing_gives_equal_gradients_after_two_forward_passes(attached, tools)
    if pair.each:
        _the_distributed_wrapper_finds_every_parameter_used(attached, tools)
    _a_deep_copy_after_a_forward_is_whole_and_independent(attached, tools)


def _gradient_checkpointing_gives_equal_gradients_after_two_forward_passes(
    attached: Attached, tools: SimpleNamespace
) -> None:
    """Blocks run again in backward, after the second pass has run: each must find the prompts of its own pass."""
    expected, found = (_two_pass_gradients(attached, tools, on) for on in (False, True))
    attached.model.set_grad_checkpointing(False)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if not name.endswith(KEY_SHIFT))


def test_checkpointing_repeats_dropout_masks(build: Build, attach: Attach, tools: SimpleNamespace, pair: Any) -> None:
    """With sample keys the mask is a pure function, so a block that runs again draws the same one."""
    if not _without_dropout(pair.method):
        return  # no masks of its own: the test above runs the same passes
    attached = attach(pair.method, build(pair.variant))
    tools.shake(attached)
    attached.train()
    for path in attached.tuned_modules:  # torch's own dropout is not keyed
        attached.model.get_submodule(path).eval()
    attached.set_sample_keys(torch.tensor([11, 12]))
    expected, found = (_two_pass_gradients(attached, tools, on) for on in (False, True))
    assert set(expected) == set(found) >= set(attached.trainable)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_compiled_model_gives_equal_output(
    build: Build, attach: Attach, tools: SimpleNamespace, compiled_pair: Any
) -> None:
    """In one graph: a hook that dynamo cannot trace would break it."""
    _compile_anew()
    depth = tools.traced_depth(compiled_pair.method, compiled_pair.variant)
    attached = attach(compiled_pair.method, build(compiled_pair.variant, depth=depth))
    tools.shake(attached)
    compiled = torch.compile(attached.model, backend="eager", fullgraph=compiled_pair.method not in IN_PIECES)
    with torch.no_grad():
        assert torch.allclose(compiled(tools.images()), attached.model(tools.images()), atol=1e-6)


@pytest.mark.slow
def test_compiled_blocks_give_equal_gradients(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str
) -> None:
    """As the training loop compiles, with the backward traced too, and each block in one graph."""
    variant = "dinov2_registers" if METHODS.row(method).fits(FAMILIES.row("vit").parts) else "resnet"
    _compile_anew()
    found = []
    for compiled in (False, True):
        attached = attach(method, build(variant, depth=tools.traced_depth(method, variant)))
        tools.shake(attached)
        if compiled:
            for block in attached.anatomy.blocks:
                attached.model.get_submodule(block.block).compile(
                    backend="aot_eager", fullgraph=method not in IN_PIECES
                )
        _with_penalty(attached, tools.open_head(attached.model)(tools.images()).square().sum()).backward()
        found.append({name: p.grad for name, p in attached.model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-4, atol=1e-5), name


def _compile_anew() -> None:
    """``torch._dynamo.reset`` also forgets the shapes that each operator gives, which takes a third longer."""
    torch._dynamo.reset_code_caches()


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _the_distributed_wrapper_finds_every_parameter_used(attached: Attached, tools: SimpleNamespace) -> None:
    """Without a search for unused parameters the second forward fails if the first backward missed one."""
    attached.model.zero_grad()
    wrapped = DistributedDataParallel(tools.open_head(attached.model))
    for seed in (1, 2):
        attached.train()
        _with_penalty(attached, wrapped(tools.images(4, seed)).square().sum()).backward()
    wrapped(tools.images())
    attached.model.eval()


def _a_deep_copy_after_a_forward_is_whole_and_independent(attached: Attached, tools: SimpleNamespace) -> None:
    before = attached.model(tools.images())
    twin = copy.deepcopy(tools.open_head(attached.model))
    attached.model.zero_grad()
    with torch.no_grad():
        for parameter in attached.model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(twin(tools.images()), before)
    assert not torch.equal(attached.model(tools.images()), before)
    twin(tools.images()).sum().backward()
    assert all(p.grad is None for p in attached.model.parameters()), "the copy's hooks reach the original"


def _bfloat16_autocast_runs_and_keeps_parameters_in_float32(attached: Attached, tools: SimpleNamespace) -> None:
    full = attached.model(tools.images())
    tools.open_head(attached.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = attached.model(tools.images())
    # bfloat16 keeps 8 bits, an error of 2^-8 a rounding; a lost branch or prompt would be of the size of the logits.
    assert (half.float() - full).norm() < 0.05 * full.norm()
    _with_penalty(attached, half.float().sum()).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in tools.trained(attached).values())


def _without_dropout(method: str) -> dict[str, float]:
    return {"dropout": 0.0} if "dropout" in METHODS.load(method).Config.model_fields else {}


def _two_pass_gradients(attached: Attached, tools: SimpleNamespace, checkpointing: bool) -> dict[str, Tensor]:
    model = tools.open_head(attached.model)
    model.set_grad_checkpointing(checkpointing)
    model.zero_grad()
    loss = model(tools.images()).square().sum() + model(tools.images(seed=8)).pow(3).sum()
    _with_penalty(attached, loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _with_penalty(attached: Attached, loss: Tensor) -> Tensor:
    """Add the method's penalty, as training does: some parameters have a gradient by it alone."""
    penalty = attached.penalty()
    return loss if penalty is None else loss + penalty
