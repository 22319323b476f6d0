"""Seams: the frozen beginning once, the rest on what was kept. Expected values: the whole model, in float64."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.tuning.attached import Attached
from remap.tuning.finetuning.partial import ClassRowSeam

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]

SEQUENCES = (
    *("plain", "dinov2_registers", "deit_distilled", "siglip", "clip", "avg_pool"),
    *("eva02", "eva02_separate", "dinov3", "beit"),
)
CASES = [
    *[("linear", variant, {}) for variant in ("plain", "deit_distilled", "swin", "resnet")],
    *[("mlp", variant, {"dropout": 0.0}) for variant in ("plain", "deit_distilled", "swin", "convnext")],
    *[("partial", variant, {}) for variant in (*SEQUENCES, "swin", "convnext", "resnet")],
    ("partial", "plain", {"num_blocks": 2}),
    ("partial", "dinov3", {"blocks": [1]}),
    ("partial", "clip", {"parts": "attention"}),
    ("partial", "clip", {"parts": "mlp"}),
    *[("sidetune", variant, {}) for variant in ("plain", "deit_distilled", "convnext")],
    *[("vqt", variant, {"dropout": 0.0}) for variant in SEQUENCES],
    *[("lst", variant, {}) for variant in SEQUENCES],
    ("lst", "plain", {"gates": "learned"}),
]


@pytest.mark.parametrize(("method", "variant", "options"), CASES)
def test_the_rest_has_the_logits_and_gradients_of_the_whole(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, variant: str, options: dict
) -> None:
    attached = attach(method, build(variant).double(), **options)
    tools.shake(attached, size=0.1)
    model, images = tools.open_head(attached.model), tools.images().double()
    kept = attached.seam.stem(images)
    assert all(len(value) == 2 and not value.requires_grad for value in kept.values())
    pixels = images if attached.seam.reads_images else None
    expected, wanted = _logits_and_gradients(model, lambda: model(images))
    for whole in (False, True):
        logits, found = _logits_and_gradients(model, lambda w=whole: attached.seam.rest(kept, pixels, whole_blocks=w))
        assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9)
        assert set(found) == set(wanted) >= set(attached.trainable)
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, rtol=1e-8, atol=1e-8 * float(gradient.abs().max())), name


def _logits_and_gradients(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = run()
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["mlp", "sidetune"])
def test_batch_statistics_count_in_the_rest_alone(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str
) -> None:
    options = {"dropout": 0.0} if method == "mlp" else {}
    split, whole = (attach(method, build("plain"), **options) for _ in range(2))
    kept = split.seam.stem(tools.images(4))
    for attached in (split, whole):
        attached.train()
    before = split.state()
    rest = split.seam.rest(kept, tools.images(4), whole_blocks=False)
    assert torch.allclose(rest, whole.model(tools.images(4)), atol=1e-5)
    after, expected = split.state(), whole.state()
    assert any(not torch.equal(before[name], after[name]) for name in split.buffers)
    assert all(torch.allclose(after[name], expected[name], atol=1e-6) for name in split.buffers)


def test_stems_leave_everything_of_the_method_alone(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    """Also in a distilled model, whose first classifier is passed on the way to the second."""
    for method in ("sidetune", "vqt", "lst"):
        attached = attach(method, build("deit_distilled"))
        before, expected = attached.state(), attached.model(tools.images())
        attached.train()
        attached.seam.stem(tools.images())
        assert all(torch.equal(value, before[name]) for name, value in attached.state().items())
        attached.model.eval()
        assert torch.equal(attached.model(tools.images()), expected)


@pytest.mark.parametrize(
    ("variant", "options", "one_row"),
    [
        ("plain", {}, True),
        ("dinov2_registers", {}, True),
        ("clip", {"parts": "mlp"}, True),
        ("plain", {"blocks": [2]}, True),
        ("plain", {"num_blocks": 2}, False),
        ("plain", {"blocks": [1]}, False),
        *[(variant, {}, False) for variant in ("deit_distilled", "siglip", "avg_pool", "eva02", "beit", "swin")],
    ],
)
def test_one_row_is_enough_where_the_class_token_alone_is_read(
    build: Build, attach: Attach, variant: str, options: dict, one_row: bool
) -> None:
    attached = attach("partial", build(variant), **options)
    assert isinstance(attached.seam, ClassRowSeam) == one_row


def test_one_row_is_computed_unless_more_are_wanted(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    """All rows: where attention is read, and where the block drops (rates 0.2 and 0.3 here) in training."""
    attached = attach("partial", build("plain"))
    kept, seen = attached.seam.stem(tools.images()), []
    attached.model.blocks[2].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    for training, whole in ((False, False), (False, True), (True, False)):
        attached.train() if training else attached.model.eval()
        attached.seam.rest(kept, None, whole_blocks=whole)
    assert seen == [1, 17, 17]


def test_in_float32_one_row_agrees_to_1e_5_and_keys_biases_have_no_gradient(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    attached = attach("partial", build("dinov2_registers"))
    kept, gradients = attached.seam.stem(tools.images()), []
    for whole in (False, True):
        logits, found = _logits_and_gradients(
            attached.model, lambda w=whole: attached.seam.rest(kept, None, whole_blocks=w)
        )
        gradients.append({**found, "logits": logits})
    for name, expected in gradients[1].items():
        assert torch.allclose(gradients[0][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name
    q, k, v = gradients[0]["blocks.2.attn.qkv.bias"].chunk(3)
    assert k.abs().max() < 1e-5 * min(q.abs().max(), v.abs().max())
