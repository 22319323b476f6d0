"""Changes of linear layers: on the output, through the weight, and folded. The source is the changed weight itself."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Projection, anatomy_of
from remap.tuning.attaching import attach_method
from remap.tuning.base import Attachment, Edits
from remap.tuning.dropout import SampleDropout
from remap.tuning.weights import (
    Delta,
    attach_deltas,
    channels_first,
    drop,
    plain_class,
    recompute,
    registered,
    weight_of,
)


class Dense(Delta):
    """A change of any size, given as a matrix (o, i)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64))

    def delta(self) -> Tensor:
        return self.matrix

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class Owner(nn.Module):
    """A layer called, or its weight read past it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.double()

    def forward(self, x: Tensor, called: bool) -> Tensor:
        if called:
            return self.layer(x)
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def fold(attachment: Attachment) -> None:
    assert attachment.fold is not None
    with torch.no_grad():
        attachment.fold.write()


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("ranges", [[(0, 6)], [(0, 2)], [(4, 6)], [(4, 6), (0, 2)], [(0, 2), (2, 6)], [(2, 3)]])
def test_rows_change_as_if_written_into_the_weight(called: bool, ranges: list[tuple[int, int]]) -> None:
    owner, x = Owner(nn.Linear(4, 6)), torch.randn(2, 3, 4, dtype=torch.float64)
    deltas = {Projection("layer", *rows, called): Dense(rows[1] - rows[0], 4) for rows in ranges}
    weight = owner.layer.weight.detach().clone()
    for projection, delta in deltas.items():
        weight[projection.start : projection.stop] += delta.matrix.detach()
    expected = x @ weight.T + owner.layer.bias
    attachment = attach_deltas(Edits(owner), deltas)
    assert torch.allclose(owner(x, called), expected, rtol=0, atol=1e-12)
    owner(x, called).sum().backward()
    assert all(delta.matrix.grad.abs().min() > 0 for delta in deltas.values())
    fold(attachment)
    assert attachment.edits is not None
    attachment.edits.remove()
    assert torch.equal(owner.layer.weight, weight)
    assert torch.allclose(owner(x, called), expected, rtol=0, atol=1e-12)


def test_1x1_convolutions() -> None:
    owner, x = Owner(nn.Conv2d(4, 6, 1)), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    deltas = {Projection("layer", 0, 2): Dense(2, 4), Projection("layer", 3, 6): Dense(3, 4)}
    assert [weight_of(owner, projection).shape[1] for projection in deltas] == [4, 4]
    weight = owner.layer.weight.detach().clone()
    for projection, delta in deltas.items():
        weight[projection.start : projection.stop, :, 0, 0] += delta.matrix.detach()
    expected = torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x) + owner.layer.bias[:, None, None]
    attachment = attach_deltas(Edits(owner), deltas)
    assert torch.allclose(owner(x, True), expected, rtol=0, atol=1e-12)
    fold(attachment)
    assert torch.equal(owner.layer.weight, weight)


def test_every_read_is_recomputed_in_order_and_the_registered_tensor_stays() -> None:
    layer = nn.Linear(3, 3)
    weight, names = layer.weight, list(layer.state_dict())
    double, more = partial(torch.mul, other=2.0), partial(torch.add, other=1.0)
    undo_double, undo_more = recompute(layer, "weight", double), recompute(layer, "weight", more)
    undo_bias = recompute(layer, "bias", double)
    assert torch.equal(layer.weight, 2 * weight + 1) and torch.equal(layer.bias, 2 * registered(layer, "bias"))
    assert registered(layer, "weight") is weight and dict(layer.named_parameters())["weight"] is weight
    assert list(layer.state_dict()) == names and torch.equal(layer.state_dict()["weight"], weight)
    assert isinstance(layer, nn.Linear) and plain_class(layer) is nn.Linear
    undo_double()
    assert torch.equal(layer.weight, weight + 1)
    undo_more()
    assert layer.weight is weight and not torch.equal(layer.bias, registered(layer, "bias"))
    undo_bias()
    assert type(layer) is nn.Linear and "_remap_recomputed" not in vars(layer)


def test_a_function_can_ask_to_be_the_first() -> None:
    layer = nn.Linear(3, 3)
    recompute(layer, "weight", partial(torch.mul, other=2.0))
    recompute(layer, "weight", partial(torch.add, other=1.0), first=True)
    assert torch.equal(layer.weight, 2 * (registered(layer, "weight") + 1))


def test_buffers_can_be_recomputed() -> None:
    norm = nn.BatchNorm1d(3)
    undo = recompute(norm, "running_mean", partial(torch.add, other=1.0))
    assert torch.equal(norm.running_mean, torch.ones(3)) and torch.equal(
        norm.state_dict()["running_mean"], torch.zeros(3)
    )
    undo()
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_a_copy_recomputes_from_its_own_modules() -> None:
    owner = Owner(nn.Linear(4, 6))
    owner.remap_change = Dense(6, 4)
    attach_deltas(Edits(owner), {Projection("layer", 0, 6, False): owner.remap_change})
    twin, x = copy.deepcopy(owner), torch.randn(2, 4, dtype=torch.float64)
    before = owner(x, False).detach()
    with torch.no_grad():
        owner.remap_change.matrix.zero_()
    assert torch.equal(twin(x, False), before) and not torch.equal(owner(x, False), before)
    twin(x, False).sum().backward()
    assert twin.remap_change.matrix.grad is not None and owner.remap_change.matrix.grad is None


def test_a_failing_function_does_not_fall_back_to_the_registered_tensor() -> None:
    layer = nn.Linear(3, 3)
    recompute(layer, "weight", _faulty)
    with pytest.raises(RuntimeError, match="recomputing weight failed"):
        layer(torch.zeros(1, 3))


def test_layers_with_channels_first() -> None:
    first = [nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.GroupNorm(1, 2)]
    assert all(channels_first(module) for module in first)
    assert not any(channels_first(module) for module in (nn.Linear(2, 2), nn.LayerNorm(2)))
    recompute(first[0], "weight", torch.neg)
    assert channels_first(first[0])


def test_dropout_by_image_on_tensors_cut_into_windows() -> None:
    """(B * windows, ...) and (B, windows, ...) lose the same elements."""
    dropout, x = SampleDropout(0.5), torch.randn(2, 3, 4, 5)
    dropout.keys_B = torch.tensor([1, 2])
    assert torch.equal(drop(dropout, x.flatten(0, 1)), dropout(x).flatten(0, 1))
    dropout.eval()
    assert drop(dropout, x) is x


def _faulty(weight: Tensor) -> Tensor:
    return weight.no_such_attribute


@pytest.mark.parametrize("variant", ["plain", "beit", "eva02_separate", "swin"])
@pytest.mark.parametrize("method", ["lora+ssf", "ssf+lora", "diffit+fact_tt", "krona+diffit", "ssf+gps", "gps+lora"])
def test_combinations_fold_to_the_function_they_were(
    build: Callable, tools: SimpleNamespace, method: str, variant: str
) -> None:
    """A scale of a layer's output acts on the changed layer, whichever of the two was attached first."""
    model, base, images = build(variant).double(), build(variant).double(), tools.images().double()
    options = {"lora": {"targets": ["q", "o", "fc2"]}} if "lora" in method else {}
    attached = attach_method(model, anatomy_of(model), method, options)
    tools.shake(attached)
    tuned = model(images)
    base.load_state_dict(attached.merge().state_dict())
    assert torch.allclose(base(images), tuned, rtol=0, atol=1e-10 * tuned.abs().max().item())
