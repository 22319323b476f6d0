"""Every supported cell of the table method x family, on tiny models: the contract of ``remap.tuning.base``.

Expected values are the untouched timm model (a second one built from the same seed, without hooks), or the same
quantity computed another way (a fresh model, its state dict); nothing is a recorded number.
"""

import copy
import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gpu import computing_on_gpu, move, on_gpu
from torch import Tensor, nn

from remap.backbones.anatomy import AttentionBlock, anatomy_of, rest_of_forward
from remap.backbones.families import FAMILIES
from remap.errors import BackboneError, RunError
from remap.tuning import METHODS
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method, nearest
from remap.tuning.base import is_inserted
from remap.tuning.dropout import SampleDropout

# Shifts every key alike, which a softmax over keys does not see: its gradient is 0 by nature, whatever the method.
KEY_SHIFT = "k_norm.bias"

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]
Tools = SimpleNamespace


def test_a_method_that_was_just_attached(
    build: Build, attach: Attach, tools: Tools, pair: Any, subtests: pytest.Subtests
) -> None:
    """One object for all checks; those that change it come last."""
    base, attached = _plain(build, tools, pair.variant), attach(pair.method, build(pair.variant))
    checks = [
        lambda: _identity_at_initialisation_is_what_is_declared(base, attached, tools),
        lambda: _only_the_declared_parameters_require_grad(attached),
        lambda: _paths_of_the_backbones_weights_do_not_change(base, attached),
        lambda: _load_refuses_other_names_and_shapes(attached),
        lambda: _the_row_says_what_attaching_gives(attached, pair),
        lambda: _sites_of_dropout_differ(attached),
        lambda: _a_copy_has_nothing_of_the_original(attached, tools),
        lambda: _weight_decay_leaves_vectors_and_prompts_alone(attached, tools),
        lambda: _forward_features_and_intermediates_keep_their_shapes(base, attached, tools, pair),
        lambda: _extra_tokens_stand_between_prefix_and_patches_inside_every_block(base, attached, tools, pair),
        lambda: _a_second_inserted_method_is_refused(base, attached, attach, pair),
        lambda: _frozen_modules_stay_in_eval_and_the_methods_own_train(base, attached),
        lambda: _signals_called_unchanged_do_not_change(base, attached, tools, pair),
        lambda: _dropout_is_keyed_by_sample(attached, tools),
    ]
    if pair.each:
        if pair.method != "attention_copy":  # which moves a teacher beside the model, with its numbers
            checks.append(lambda: _it_computes_on_the_device_of_its_model(attached, tools))
        checks.append(lambda: _a_model_converted_after_attaching_trains(attached, tools))
    for check in checks:
        with subtests.test(check.__code__.co_names[0]):
            check()


@pytest.mark.guarantee(11)
def test_a_method_that_was_trained(
    build: Build, attach: Attach, tools: Tools, pair: Any, figure: Callable[..., None], subtests: pytest.Subtests
) -> None:
    """Trains one model and loads its state into a fresh one; the first is detached, the second merged."""
    base, attached = _plain(build, tools, pair.variant), attach(pair.method, build(pair.variant))
    with subtests.test("every trained tensor gets a gradient and moves"):
        _every_trained_tensor_gets_a_gradient_and_moves(attached, tools)
    with subtests.test("frozen parameters and buffers are bit equal after steps"):
        changing = {*attached.trainable, *attached.buffers}
        after = attached.model.state_dict()
        for name, value in base.state.items():
            if name not in changing and not attached.anatomy.is_head(name):
                assert torch.equal(after[name], value), name
    fresh = attach(pair.method, build(pair.variant), seed=99)
    with subtests.test("state loads into a fresh model to the same logits"):
        fresh.load(attached.state())
        _copy_head(attached, fresh)
        assert torch.equal(fresh.model(tools.images()), attached.model(tools.images()))
    with subtests.test("the seam cuts the forward where it says"):
        _the_seam_cuts_the_forward_where_it_says(attached, tools)
    with subtests.test("merge gives plain weights or says no"):
        _merge_gives_plain_weights_or_says_no(build(pair.variant), fresh, tools, pair, figure)
    with subtests.test("detach gives the backbone back bit for bit"):
        _detach_gives_the_backbone_back_bit_for_bit(base, attached, tools)


def _plain(build: Build, tools: Tools, variant: str) -> Tools:
    """What the untouched model of timm gives; computed once for all methods."""
    if variant not in PLAIN:
        model, images = build(variant), tools.images()
        with torch.no_grad():
            found = Tools(
                state=model.state_dict(),
                modules=[name for name, _ in model.named_modules()],
                logits=model(images),
                features=model.forward_features(images),
                tokens=_tokens_in_blocks(model, images) if "sequence" in anatomy_of(model).parts else [],
            )
            found.shapes = [_shapes(model.forward_intermediates(images, **o)) for o in _intermediates(found.tokens)]
        PLAIN[variant] = found
    return PLAIN[variant]


PLAIN: dict[str, Tools] = {}


def _a_copy_has_nothing_of_the_original(attached: Attached, tools: Tools) -> None:
    """Copies compute side by side in threads: what one does to its modules, tensors and hooks, others must not see."""
    images = tools.images()
    with torch.no_grad():
        expected = attached.model(images)
        twin = copy.deepcopy(attached)
        assert torch.equal(twin.model(images), expected)
        for tensor in (*twin.model.parameters(), *twin.model.buffers()):
            tensor.zero_()
        assert torch.equal(attached.model(images), expected)


def _intermediates(sequence: object) -> list[dict[str, Any]]:
    if not sequence:
        return [{"intermediates_only": True}]
    words = ("output_fmt", "norm", "return_prefix_tokens")
    each = itertools.product(("NCHW", "NLC"), (False, True), (False, True))
    return [dict(zip(words, values, strict=True)) for values in each]


@torch.no_grad()  # PyTorch may choose another attention kernel where a bias requires a gradient
def _identity_at_initialisation_is_what_is_declared(base: Tools, attached: Attached, tools: Tools) -> None:
    assert torch.equal(attached.model(tools.images()), base.logits) == attached.identity_at_init


def _only_the_declared_parameters_require_grad(attached: Attached) -> None:
    parameters = dict(attached.model.named_parameters())
    head = {name for name in parameters if attached.anatomy.is_head(name)}
    assert {name for name, p in parameters.items() if p.requires_grad} - head == set(attached.trainable)
    assert not head & set(attached.trainable)
    assert len(set(attached.trainable)) == len(attached.trainable)


def _every_trained_tensor_gets_a_gradient_and_moves(attached: Attached, tools: Tools) -> None:
    """Catches dead initialisations: two zero factors never move each other."""
    before = attached.state()
    alive = tools.step(attached, 5)
    for name, parameter in tools.trained(attached).items():
        if name.endswith(KEY_SHIFT):
            continue
        assert name in alive, f"{name} has no gradient"
        assert not torch.equal(parameter.detach(), before[name]), f"{name} did not move"


def _paths_of_the_backbones_weights_do_not_change(base: Tools, attached: Attached) -> None:
    added = set(attached.model.state_dict()) - set(base.state)
    assert set(base.state) <= set(attached.model.state_dict())
    assert all(is_inserted(name) for name in added)
    kept = {*attached.trainable, *attached.buffers}
    assert all(name in kept or attached.anatomy.is_head(name) for name in added), "inserted, so part of every task file"


def _frozen_modules_stay_in_eval_and_the_methods_own_train(base: Tools, attached: Attached) -> None:
    for parent in (attached.model, attached.model.train()):  # whoever calls train() in between
        attached.train()
        modes = {name: module.training for name, module in parent.named_modules()}
        for name in base.modules:
            tuned = any(name == path or not path or name.startswith(f"{path}.") for path in attached.tuned_modules)
            assert modes[name] == tuned, name
        assert all(training for name, training in modes.items() if is_inserted(name))
    attached.model.eval()


def _load_refuses_other_names_and_shapes(attached: Attached) -> None:
    state = attached.state()
    with pytest.raises(RunError, match="unexpected stranger"):
        attached.load({**state, "stranger": torch.zeros(1)})
    for name in attached.trainable[:1]:
        with pytest.raises(RunError, match="missing"):
            attached.load({key: value for key, value in state.items() if key != name})
        with pytest.raises(RunError, match="wanted"):
            attached.load({**state, name: state[name][None]})


def _merge_gives_plain_weights_or_says_no(
    base: nn.Module, attached: Attached, tools: Tools, pair: Any, figure: Callable[..., None]
) -> None:
    tuned = attached.model(tools.images()).detach()
    if not attached.mergeable:
        with pytest.raises(BackboneError, match="cannot be folded"):
            attached.merge()
        figure("pairs of method and model that cannot be folded and say so", 1, 1)
        return
    assert pair.row.mergeable, "the table promises less than the method keeps"
    merged = attached.merge()
    assert list(merged.state_dict()) == list(base.state_dict())
    assert _untouched(merged)
    base.load_state_dict(merged.state_dict())
    difference = float((base(tools.images()) - tuned).detach().abs().max())
    assert difference <= 1e-5 * max(1.0, float(tuned.abs().max()))
    assert difference <= 1e-4
    figure("pairs that are folded", 1, 1)
    figure("largest difference of logits", difference)


def _the_row_says_what_attaching_gives(attached: Attached, pair: Any) -> None:
    """The table is what listings and plans go by, before anything is built."""
    assert attached.mergeable == pair.row.mergeable
    if "sequence" in attached.anatomy.parts:
        assert (attached.extra_tokens > 0) == pair.row.adds_tokens


def _sites_of_dropout_differ(attached: Attached) -> None:
    """Equal sites would drop the same elements of an image."""
    sites = [m.site for m in attached.model.modules() if isinstance(m, SampleDropout) and m.p]
    assert len(set(sites)) == len(sites)


def _a_model_converted_after_attaching_trains(attached: Attached, tools: Tools) -> None:
    """The training loop moves the model to its device when the method is there already; a type is as good a test."""
    model = tools.open_head(attached.model).double()
    attached.train()
    attached.set_sample_keys(torch.tensor([11, 12]))
    for step in range(2):
        model.zero_grad()
        out, penalty = model(tools.images().double()), attached.penalty()
        (out.square().sum() if penalty is None else out.square().sum() + penalty).backward()
        attached.after_step(step, 2)
    assert out.dtype == torch.float64
    assert all(p.grad.dtype == torch.float64 for p in tools.trained(attached).values())


def _it_computes_on_the_device_of_its_model(attached: Attached, tools: Tools) -> None:
    """Source: PyTorch's fake tensors, which refuse operations between a GPU and the CPU."""
    twin, images = copy.deepcopy(attached), on_gpu(tools.images())
    twin.train()
    twin.set_sample_keys(on_gpu(torch.tensor([11, 12])))
    move(twin.model)
    with computing_on_gpu():
        out, penalty = twin.model(images), twin.penalty()
        assert {one.device.type for one in (out, penalty) if one is not None} == {"cuda"}


def _detach_gives_the_backbone_back_bit_for_bit(base: Tools, attached: Attached, tools: Tools) -> None:
    model = attached.model
    returned = attached.detach().eval()
    assert returned is model
    assert list(model.state_dict()) == list(base.state)
    for name, value in base.state.items():
        assert attached.anatomy.is_head(name) or torch.equal(model.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(model.forward_features(tools.images()), base.features)
    assert all(p.requires_grad for p in model.parameters())
    assert _untouched(model)


@torch.no_grad()
def _forward_features_and_intermediates_keep_their_shapes(
    base: Tools, attached: Attached, tools: Tools, pair: Any
) -> None:
    model, images = attached.model, tools.images()
    enlarges = pair.method == "vpt_pad"  # its border makes the image, and so every map, larger
    features = model.forward_features(images)
    if not enlarges:
        assert features.shape == base.features.shape
    assert model.forward_head(features).shape == (2, 5)
    found = [model.forward_intermediates(images, **options) for options in _intermediates(base.tokens)]
    if not base.tokens:
        assert enlarges or _shapes(found) == base.shapes
        return
    assert _shapes(found) == base.shapes
    final, tokens = model.forward_intermediates(images, output_fmt="NLC", norm=True)
    patches = features[:, attached.anatomy.num_prefix_tokens :]
    assert torch.equal(final[:, attached.anatomy.num_prefix_tokens :], patches)
    assert torch.equal(tokens[-1], patches)


def _weight_decay_leaves_vectors_and_prompts_alone(attached: Attached, tools: Tools) -> None:
    exempt = set(attached.no_decay)
    assert exempt <= set(attached.trainable)
    for name, parameter in tools.trained(attached).items():
        must = parameter.ndim <= 1 or "prompts" in name or name in ("cls_token", "pos_embed", "reg_token")
        assert name in exempt or not must, name


def _extra_tokens_stand_between_prefix_and_patches_inside_every_block(
    base: Tools, attached: Attached, tools: Tools, pair: Any
) -> None:
    """Attention does not see the order of tokens, so logits cannot tell; who reads inside a block relies on it."""
    if "sequence" not in attached.anatomy.parts:
        assert attached.extra_tokens == 0
        return
    outside = base.tokens
    inside = _tokens_in_blocks(attached.model, tools.images())[-len(outside) :]  # a first pass may ask for a feature
    extra, prefix = attached.extra_tokens, attached.anatomy.num_prefix_tokens
    assert [len(x[0]) for x in inside] == [len(x[0]) + extra for x in outside]
    if pair.row.category == "prompt" and pair.method not in ("vp",):
        assert torch.equal(inside[0][:, :prefix], outside[0][:, :prefix])
        assert torch.equal(inside[0][:, prefix + extra :], outside[0][:, prefix:])


def _the_seam_cuts_the_forward_where_it_says(attached: Attached, tools: Tools) -> None:
    if attached.seam is None:
        return
    images = tools.images()
    kept = attached.seam.stem(images)
    assert all(len(value) == 2 and not value.requires_grad for value in kept.values())
    whole = attached.model(images)
    for all_tokens in (False, True):
        pixels = images if attached.seam.reads_images else None
        rest = attached.seam.rest(kept, pixels, whole_blocks=all_tokens)
        assert torch.allclose(rest, whole, rtol=1e-5, atol=1e-5)
    first = attached.seam.first_block
    assert first == attached.anatomy.depth or torch.allclose(
        attached.model.forward_head(rest_of_forward(attached.model, attached.anatomy, first, kept["input"])), whole
    )


@torch.no_grad()
def _signals_called_unchanged_do_not_change(base: Tools, attached: Attached, tools: Tools, pair: Any) -> None:
    """``unchanged`` decides which losses are refused as idle."""
    tools.shake(attached)
    ours = attached.model.forward_features(tools.images())
    same = ours.shape == base.features.shape and torch.equal(ours, base.features)
    assert same == ("tokens" in pair.row.unchanged)


def _a_second_inserted_method_is_refused(base: Tools, attached: Attached, attach: Attach, pair: Any) -> None:
    if set(attached.model.state_dict()) == set(base.state):
        assert not attached.added, "in-place methods insert nothing"
        return
    with pytest.raises(BackboneError, match="already carries"):
        attach(pair.method, attached.model)


def _dropout_is_keyed_by_sample(attached: Attached, tools: Tools) -> None:
    """What is dropped of an image depends on its key alone, not on the rest of the batch. Parameters are shaken."""
    ours = [m for name, m in attached.model.named_modules() if is_inserted(name) and isinstance(m, nn.Dropout)]
    assert not ours, "torch's own dropout is not keyed"
    if not any(isinstance(m, SampleDropout) and m.p for m in attached.model.modules()) or _has_batch_norm(attached):
        return
    attached.train()
    images, keys = tools.images(3), torch.tensor([11, 12, 13])
    attached.set_sample_keys(keys)
    together = attached.model(images)
    attached.set_sample_keys(keys[[2, 0]])
    assert torch.allclose(attached.model(images[[2, 0]]), together[[2, 0]], rtol=1e-4, atol=1e-5)
    attached.set_sample_keys(keys + 1)
    assert not torch.allclose(attached.model(images), together, rtol=1e-4, atol=1e-5)


REFUSED = [
    (row.name, family.name)
    for row in METHODS
    for family in FAMILIES
    if not row.fits(family.parts) and ("words" not in row.needs or family.name == "vit")  # no family has words
]
MODELS = {
    "vit": "plain",
    "naflexvit": "naflexvit",
    "eva": "eva02",
    "beit": "beit",
    "swin": "swin",
    "swinv2": "swinv2",
    "convnext": "convnext",
    "resnet": "resnet",
    "generic": "efficientnet",
    "hiera": "hiera",
    "tiny_vit": "tiny_vit",
}


@pytest.mark.parametrize(("method", "family"), REFUSED)
def test_what_does_not_fit_is_refused_with_a_method_that_does(build: Build, method: str, family: str) -> None:
    model = build(MODELS[family])
    before = list(model.state_dict())
    with pytest.raises(BackboneError, match=re.escape(f"{method} does not fit")) as caught:
        attach_method(model, anatomy_of(model), method, {})
    assert list(model.state_dict()) == before
    offered = nearest(METHODS.row(method), family)
    assert offered and all(name in str(caught.value) for name in offered)
    assert all(METHODS.row(name).fits(FAMILIES.row(family).parts) for name in offered)


def _copy_head(source: Attached, target: Attached) -> None:
    tensors = source.model.state_dict()
    with torch.no_grad():
        for name, parameter in target.model.named_parameters():
            if target.anatomy.is_head(name):
                parameter.copy_(tensors[name])


def _untouched(model: nn.Module) -> bool:
    """No hook, no replaced forward, no changed class is left."""
    return not [
        m
        for m in model.modules()
        if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ or "Recomputed" in type(m).__name__
    ]


def _has_batch_norm(attached: Attached) -> bool:
    return any(
        is_inserted(name) and isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))
        for name, m in attached.model.named_modules()
    )


def _shapes(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [_shapes(item) for item in value]


def _tokens_in_blocks(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The input of the first norm of every block, as the block calls it on the whole sequence."""
    seen: list[Tensor] = []
    handles = []
    for block in anatomy_of(model).blocks:
        assert isinstance(block, AttentionBlock)
        norm = model.get_submodule(block.norm1)
        handles.append(norm.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    model(images)
    for handle in handles:
        handle.remove()
    return seen
