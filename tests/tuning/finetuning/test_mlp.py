"""MLP-k in training. Source of the formulas: Ioffe and Szegedy 2015 (1502.03167) for batch norm."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.tuning.attached import Attached

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


def features(model: nn.Module, images: Tensor) -> Tensor:
    """The class token behind the final norm of an untouched plain model."""
    return model.forward_features(images)[:, 0]


def test_training_normalises_by_the_batch_and_remembers_it(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    base, attached = build("plain").double(), attach("mlp", build("plain").double(), num_layers=1, dropout=0.0)
    tools.shake(attached)
    w, images = attached.state(), tools.images(5).double()
    hidden = (features(base, images) @ w["remap_mlp.linears.0.weight"].T + w["remap_mlp.linears.0.bias"]).clamp(min=0)
    centred = hidden - hidden.mean(0)
    variance = centred.pow(2).mean(0)
    out = centred / (variance + 1e-5).sqrt() * w["remap_mlp.norms.0.weight"] + w["remap_mlp.norms.0.bias"]
    attached.train()
    assert torch.allclose(attached.model(images), base.head(out), rtol=0, atol=1e-10)
    after = attached.state()
    assert torch.allclose(after["remap_mlp.norms.0.running_mean"], 0.1 * hidden.mean(0))
    assert torch.allclose(after["remap_mlp.norms.0.running_var"], 0.9 + 0.1 * variance * 5 / 4)


def test_a_single_image_is_normalised_by_what_was_seen_before(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    attached = attach("mlp", build("plain"), dropout=0.0)
    tools.step(attached)
    expected, before = attached.model(tools.images(1)), attached.state()
    attached.train()
    found = attached.model(tools.images(1))
    assert torch.allclose(found, expected, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in attached.state().items())


def test_dropout_zeroes_hidden_features(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    attached = attach("mlp", build("plain"), num_layers=1, dropout=0.5)
    tools.shake(attached)  # a unit that is 0 for all images is 0 behind a fresh batch norm too
    attached.train()
    seen: list[Tensor] = []
    attached.model.head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    attached.model(tools.images(64))
    assert 0.4 < float((seen[0] == 0).float().mean()) < 0.6


@pytest.mark.parametrize("layers", [1, 3])
def test_every_hidden_layer_has_d_squared_and_3_d_parameters(build: Build, attach: Attach, layers: int) -> None:
    attached = attach("mlp", build("plain"), num_layers=layers)
    parameters = dict(attached.model.named_parameters())
    assert sum(parameters[name].numel() for name in attached.trainable) == layers * (32 * 32 + 3 * 32)
