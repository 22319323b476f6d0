"""Every row of the table of methods on every tiny family: the contract of ``remap.tuning.base``.

Expected values are the untouched timm model (a second one built from the same seed, without hooks), or the same
quantity computed another way (a fresh model, its state dict); nothing is a recorded number.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.errors import BackboneError, RunError
from remap.tuning import METHODS
from remap.tuning.base import Attached
from remap.tuning.dropout import SampleDropout

# Shifts every key alike, which a softmax over keys does not see: its gradient is 0 by nature, whatever the method.
KEY_SHIFT = "k_norm.bias"

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


def test_identity_at_initialisation_is_what_is_declared(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    base, model = build(family), build(family)
    attached = attach(method, model)
    assert torch.equal(model(tools.images()), base(tools.images())) == attached.identity_at_init


def test_only_the_declared_parameters_require_grad(build: Build, attach: Attach, method: str, family: str) -> None:
    model = build(family)
    attached = attach(method, model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(attached.trainable)
    assert not [name for name in attached.trainable if name.startswith(("head.", "head_dist."))]
    assert len(set(attached.trainable)) == len(attached.trainable)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_every_trained_tensor_gets_a_gradient_and_moves(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str, optimiser: type
) -> None:
    """Catches dead initialisations: two zero factors never move each other."""
    attached = attach(method, build(family))
    before = attached.state()
    tools.step(attached, optimiser=optimiser)
    for name, parameter in tools.trained(attached).items():
        if name.endswith(KEY_SHIFT):
            continue
        assert parameter.grad.abs().max() > 0, f"{name} has no gradient"
        assert not torch.equal(parameter.detach(), before[name]), f"{name} did not move"


def test_frozen_parameters_and_buffers_are_bit_equal_after_steps(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    base, model = build(family), build(family)
    attached = attach(method, model)
    tools.step(attached)
    after = model.state_dict()
    frozen = {name: value for name, value in base.state_dict().items() if name not in attached.trainable}
    assert frozen, "the head at least is frozen"
    for name, value in frozen.items():
        assert torch.equal(after[name], value), name


def test_paths_of_the_backbones_weights_do_not_change(build: Build, attach: Attach, method: str, family: str) -> None:
    base, model = build(family), build(family)
    attached = attach(method, model)
    added = set(model.state_dict()) - set(base.state_dict())
    assert set(base.state_dict()) <= set(model.state_dict())
    assert added <= set(attached.trainable), "inserted tensors are all trained, so all saved"


def test_frozen_modules_stay_in_eval_and_the_methods_own_train(
    build: Build, attach: Attach, method: str, family: str
) -> None:
    base, model = build(family), build(family)
    attached = attach(method, model)
    attached.train()
    of_backbone = {name for name, _ in base.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    assert all(modes[name] == attached.trains_backbone for name in of_backbone)
    assert all(training for name, training in modes.items() if name not in of_backbone)
    dropout_is_on = any(modes[name] for name, m in model.named_modules() if isinstance(m, SampleDropout))
    assert dropout_is_on == (method in ("vpt_shallow", "vpt_deep", "adaptformer"))


def test_state_loads_into_a_fresh_model_to_the_same_logits(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    attached = attach(method, build(family))
    tools.step(attached)
    fresh = attach(method, build(family), seed=99)
    fresh.load(attached.state())
    assert torch.equal(fresh.model(tools.images()), attached.model(tools.images()))


def test_load_refuses_other_names_and_shapes(build: Build, attach: Attach, method: str, family: str) -> None:
    attached = attach(method, build(family))
    state = attached.state()
    with pytest.raises(RunError, match="unexpected stranger"):
        attached.load({**state, "stranger": torch.zeros(1)})
    for name in attached.trainable[:1]:
        with pytest.raises(RunError, match="missing"):
            attached.load({key: value for key, value in state.items() if key != name})
        with pytest.raises(RunError, match="wanted"):
            attached.load({**state, name: state[name][..., :-1]})


def test_merge_gives_plain_weights_or_says_no(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    base, attached = build(family), attach(method, build(family))
    tools.step(attached)
    tuned = attached.model(tools.images())
    assert attached.mergeable == METHODS.row(method).mergeable
    if not attached.mergeable:
        with pytest.raises(BackboneError, match="cannot be folded"):
            attached.merge()
        return
    merged = attached.merge()
    assert list(merged.state_dict()) == list(base.state_dict())
    base.load_state_dict(merged.state_dict())
    assert (base(tools.images()) - tuned).abs().max() <= 1e-5


def test_detach_gives_the_backbone_back_bit_for_bit(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    base, model = build(family), build(family)
    attached = attach(method, model)
    tools.step(attached)
    returned = attached.detach().eval()
    assert returned is model
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.state_dict().items())
    assert torch.equal(model(tools.images()), base(tools.images()))
    assert all(p.requires_grad for p in model.parameters())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_forward_features_and_intermediates_keep_their_shapes(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    base, attached = build(family), attach(method, build(family))
    model, images = attached.model, tools.images()
    assert model.forward_features(images).shape == base.forward_features(images).shape
    for output_format, norm, prefix in itertools.product(("NCHW", "NLC"), (False, True), (False, True)):
        options = {"output_fmt": output_format, "norm": norm, "return_prefix_tokens": prefix}
        ours, theirs = (m.forward_intermediates(images, **options) for m in (model, base))
        assert _shapes(ours) == _shapes(theirs)
    final, tokens = model.forward_intermediates(images, output_fmt="NLC", norm=True)
    patches = model.forward_features(images)[:, model.num_prefix_tokens :]
    assert torch.equal(final[:, model.num_prefix_tokens :], patches)
    assert torch.equal(tokens[-1], patches)


def test_weight_decay_leaves_vectors_and_prompts_alone(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    attached = attach(method, build(family))
    exempt = set(attached.no_decay)
    assert exempt <= set(attached.trainable)
    for name, parameter in tools.trained(attached).items():
        must = parameter.ndim <= 1 or "prompts" in name or name in ("cls_token", "pos_embed", "reg_token")
        assert name in exempt or not must, name
        assert not (name in exempt and name.endswith("weight") and parameter.ndim == 2), name


def test_extra_tokens_stand_between_prefix_and_patches_inside_every_block(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, family: str
) -> None:
    """Attention does not see the order of tokens, so logits cannot tell; who reads inside a block relies on it."""
    base, attached = build(family), attach(method, build(family))
    inside, outside = (_tokens_in_blocks(model, tools.images()) for model in (attached.model, base))
    extra, prefix = attached.extra_tokens, base.num_prefix_tokens
    assert [len(x[0]) for x in inside] == [len(x[0]) + extra for x in outside]
    assert torch.equal(inside[0][:, :prefix], outside[0][:, :prefix])
    assert torch.equal(inside[0][:, prefix + extra :], outside[0][:, prefix:])


def test_a_second_inserted_method_is_refused(build: Build, attach: Attach, method: str) -> None:
    model = build("plain")
    attached = attach(method, model)
    if set(model.state_dict()) == set(build("plain").state_dict()):
        assert not attached._added, "in-place methods insert nothing"
        return
    with pytest.raises(BackboneError, match="already carries"):
        attach(method, model)


def _shapes(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [_shapes(item) for item in value]


def _tokens_in_blocks(model: nn.Module, images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        block.norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for block in model.blocks
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return seen
