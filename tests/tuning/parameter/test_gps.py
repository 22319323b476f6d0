"""GPS against autograd on the untouched timm model in float64: which weights it chooses, and what they change.

The loss is written out from Khosla et al. 2020 (2004.11362), equation 2, image by image.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError, RunError
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method
from remap.tuning.base import Sample

TEMPERATURE = 0.07


@pytest.mark.parametrize("num_weights", [1, 3])
@pytest.mark.parametrize("variant", ["plain", "deit_distilled", "beit", "convnext", "resnet"])
def test_chooses_the_largest_gradients_of_every_neuron(
    build: Callable, tools: SimpleNamespace, variant: str, num_weights: int
) -> None:
    sample = _sample(tools)
    attached = _attach(build(variant).double(), num_weights)
    attached.prepare(sample)
    gradients = _gradients(build(variant).double(), sample)
    assert {name.removesuffix(".remap_gps.places") for name in attached.buffers} == set(gradients)
    for layer, gradient in gradients.items():
        places = attached.state()[f"{layer}.remap_gps.places"].long()
        expected = gradient.flatten(1).abs().argsort(dim=1, descending=True)[:, :num_weights]
        strength = gradient.flatten(1).abs()
        # By strength, as neurons without any gradient may take any weights.
        found, best = (strength.gather(1, at).sort(dim=1).values for at in (places, expected))
        assert torch.allclose(found, best, rtol=1e-6, atol=1e-12), layer
        assert all(len(set(row)) == len(row) for row in places.tolist())
    assert not any(p.requires_grad for n, p in attached.model.named_parameters() if n not in attached.trainable)
    assert all(p.grad is None for p in attached.model.parameters())


@pytest.mark.parametrize("variant", ["plain", "beit", "eva02", "swin", "resnet_bottleneck"])
def test_changes_the_chosen_weights_and_biases_only(build: Callable, tools: SimpleNamespace, variant: str) -> None:
    attached = _attach(build(variant).double(), 2)
    attached.prepare(_sample(tools))
    tools.shake(attached)
    state, images = attached.state(), tools.images().double()
    logits = attached.model(images)
    base = build(variant).double()
    changed = 0
    with torch.no_grad():
        weights = dict(base.named_parameters())
        for name, value in state.items():
            if name.endswith(".values"):
                rows = weights[name.replace("remap_gps.values", "weight")].flatten(1)  # a view
                for neuron, places in enumerate(state[name.replace("values", "places")].tolist()):
                    for place, amount in zip(places, value[neuron], strict=True):
                        rows[neuron, place] += amount
                        changed += 1
            elif name in weights:
                weights[name].copy_(value)
                assert not isinstance(base.get_submodule(name.rpartition(".")[0]), nn.LayerNorm | nn.BatchNorm2d)
        assert changed > 100
        assert torch.allclose(base(images), logits, rtol=0, atol=1e-9)
    merged = attached.merge().state_dict()
    assert all(torch.allclose(merged[name], value, rtol=0, atol=1e-12) for name, value in base.state_dict().items())


def test_places_differ_before_any_sample_was_seen(build: Callable, tools: SimpleNamespace) -> None:
    for variant, count in (("plain", 30), ("convnext", 8)):
        model = build(variant)
        state = _attach(model, count).state()
        for name, places in state.items():
            if name.endswith("places"):
                weight = model.state_dict()[name.replace("remap_gps.places", "weight")]
                assert places.shape[1] == count
                assert places.min() >= 0 and places.max() < weight[0].numel()
                assert all(len(set(row)) == len(row) for row in places.tolist()), name


def test_more_weights_than_a_neuron_has_are_refused(build: Callable, attach: Callable) -> None:
    with pytest.raises(BackboneError, match="(?s)8 weights in stages.0.blocks.0.mlp.fc1.*allowed: 1 to 8"):
        attach("gps", build("convnext"), num_weights=9)


def test_a_sample_without_pairs_is_an_error(build: Callable, attach: Callable, tools: SimpleNamespace) -> None:
    attached = attach("gps", build("plain"))
    lonely = Sample(lambda: iter([(tools.images(3), torch.tensor([0, 1, 2]))]), 5)
    before = attached.state()
    with pytest.raises(RunError, match="pairs of training images of one class"):
        attached.prepare(lonely)
    assert all(torch.equal(value, before[name]) for name, value in attached.state().items())
    trains = {name for name, p in attached.model.named_parameters() if p.requires_grad}
    assert trains == set(attached.trainable)


def test_state_is_small_and_loads_without_a_sample(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace
) -> None:
    attached = attach("gps", build("plain"))
    tools.shake(attached)
    state = attached.state()
    assert all(value.dtype == torch.int32 for name, value in state.items() if name.endswith("places"))
    neurons = 3 * (96 + 32 + 64 + 32) + 32
    assert sum(value.numel() for name, value in state.items() if name.endswith(("places", "values"))) == 2 * neurons


def test_count(count: Callable[..., int]) -> None:
    """A neuron has a bias each: 12 * (2,304 + 768 + 3,072 + 768) + 768."""
    assert count("gps") == 2 * 83_712 == 167_424
    assert count("gps", num_weights=2) == 3 * 83_712 == 251_136


def _attach(model: nn.Module, num_weights: int) -> Attached:
    return attach_method(model, anatomy_of(model), "gps", {"num_weights": num_weights})


def _sample(tools: SimpleNamespace) -> Sample:
    """Two batches, most pairs of a class across them."""
    labels = (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 3, 0]))
    batches = [(tools.images(len(y), seed).double(), y) for seed, y in zip((31, 32), labels, strict=True)]
    return Sample(lambda: iter(batches), 5)


def _gradients(model: nn.Module, sample: Sample) -> dict[str, Tensor]:
    """By layer, all images in one pass. Features: what timm calls the output before the classifier."""
    images, labels = (torch.cat(parts) for parts in zip(*sample.batches(), strict=True))
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in ("head", "head_dist", "head.fc", "fc")
    }
    tokens = model.forward_features(images)
    if hasattr(model, "head_dist"):
        features = torch.cat([tokens[:, 0], tokens[:, 1]], 1)
    else:
        features = model.forward_head(tokens, pre_logits=True)
    z = features / features.norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        same = [p for p in others if labels[p] == labels[i]]
        if same:
            total = sum(torch.exp(z[i] @ z[a] / TEMPERATURE) for a in others)
            probabilities = [torch.exp(z[i] @ z[p] / TEMPERATURE) / total for p in same]
            terms.append(-sum(torch.log(p) for p in probabilities) / len(same))
    loss = sum(terms) / len(terms)
    assert math.isfinite(float(loss.detach()))
    found = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    return dict(zip(layers, found, strict=True))
