"""Two classifiers and their mixture (Kang et al. 2025, arXiv 2505.07675), against the formula in float64."""

from collections.abc import Callable

import torch
from torch import nn

from remap.backbones.anatomy import anatomy_of, classifier_parameters
from remap.remapping.knowledge.logits.distillation import answer_to_labels, answer_to_teacher
from remap.remapping.signals import Needs
from remap.remapping.tap import Tap
from remap.tuning.attaching import attach_method


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
