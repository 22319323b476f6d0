"""Two classifiers and their mixture (Kang et al. 2025, arXiv 2505.07675), against the formula in float64."""

from collections.abc import Callable

import torch
from torch import nn

from remap.backbones.anatomy import anatomy_of, classifier_parameters
from remap.remapping.knowledge.logits.distillation import answer_to_labels, answer_to_teacher
from remap.remapping.signals import Needs
from remap.remapping.tap import Tap
from remap.tuning.attaching import attach_method


def test_losses_read_their_own_classifiers_of_both_tokens(build: Callable[..., nn.Module]) -> None:
    """A distilled DeiT answers with the mean over its two tokens; each of them has a classifier for either loss."""
    model = build("deit_distilled")
    anatomy = anatomy_of(model)
    attach_method(model, anatomy, "dual_head", {})
    heads = [model.head, model.head_dist]
    with torch.no_grad():
        for head in heads:
            head.remap_dual_head.weight.normal_()
    inputs: list[torch.Tensor] = []
    for head in heads:
        head.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with Tap(model, anatomy, Needs()) as tap:
        signals = tap(torch.randn(2, 3, 32, 32))

    def mean_of(linears: list[nn.Module]) -> torch.Tensor:
        return sum(linear.double()(x.double()) for linear, x in zip(linears, inputs, strict=True)) / 2

    seconds = [head.remap_dual_head for head in heads]
    torch.testing.assert_close(answer_to_teacher(signals).double(), mean_of(seconds), rtol=1e-5, atol=1e-5)
    plain = [nn.Linear(head.in_features, head.out_features) for head in heads]
    for one, head in zip(plain, heads, strict=True):
        one.load_state_dict({"weight": head.weight, "bias": head.bias})
    torch.testing.assert_close(answer_to_labels(signals).double(), mean_of(plain), rtol=1e-5, atol=1e-5)


def test_probabilities_are_mixed_and_each_loss_reads_its_own(build: Callable[..., nn.Module]) -> None:
    model = build("plain")
    anatomy = anatomy_of(model)
    attached = attach_method(model, anatomy, "lora+dual_head", {"dual_head": {"share": 0.3, "temperature": 2.0}})
    second = model.head.remap_dual_head
    assert torch.equal(second.weight, model.head.weight), "both start alike"
    with torch.no_grad():
        second.weight.add_(torch.randn_like(second.weight))
    assert {"head.remap_dual_head.weight", "head.weight"} <= set(classifier_parameters(model, anatomy))
    assert all("lora" in name for name in attached.trainable) and not attached.mergeable
    images = torch.randn(4, 3, 32, 32)
    with Tap(model, anatomy, Needs(pooled=True)) as tap:
        signals = tap(images)
    x = signals.pooled_BD.double()
    first = x @ model.head.weight.double().T + model.head.bias.double()
    other = x @ second.weight.double().T + second.bias.double()
    expected = 0.3 * first.softmax(-1) + 0.7 * (other / 2.0).softmax(-1)
    torch.testing.assert_close(signals.logits_BC.double().exp(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answer_to_labels(signals).double(), first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer_to_teacher(signals).double(), other, rtol=1e-5, atol=1e-5)


def test_random_features_belong_to_the_classifier_of_the_labels(build: Callable[..., nn.Module]) -> None:
    """Whichever is attached first: behind the mixture they would leave each loss the same answer."""
    images, found = torch.randn(2, 3, 32, 32), []
    for method in ("dual_head+ranpac", "ranpac+dual_head"):
        model = build("plain")
        anatomy = anatomy_of(model)
        attach_method(model, anatomy, method, {})
        with torch.no_grad():
            model.head.remap_ranpac.weight.fill_(0.1)
        with Tap(model, anatomy, Needs()) as tap:
            found.append(tap(images))
    assert torch.equal(found[0].logits_BC, found[1].logits_BC)
    assert all(torch.equal(one, other) for one, other in zip(*(s.head_logits for s in found), strict=True))
    assert len(found[0].head_logits) == 2 and not torch.equal(*found[0].head_logits)
