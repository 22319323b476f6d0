"""Side-tuning against its formula, in float64 on whole tiny models.

Source: Zhang et al. 2020 (1912.13503), y = a * base(x) + (1 - a) * side(x). Base and side are untouched timm models.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError, UnknownName
from remap.tuning import METHODS
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]

CLASSIFIERS = {"plain": ["head"], "deit_distilled": ["head", "head_dist"], "convnext": ["head.fc"], "resnet": ["fc"]}
SIDE = "remap_sidetune.network."


def expected_logits(base: nn.Module, side: nn.Module, w: dict[str, Tensor], images: Tensor, heads: list[str]) -> Tensor:
    seen: dict[str, Tensor] = {}
    handles = [
        base.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: seen.update({path: args[0]})
        )
        for path in heads
    ]
    base(images)
    for handle in handles:
        handle.remove()
    a = 1 / (1 + torch.exp(-w["remap_sidetune.alpha"]))
    extra = (1 - a) * (side(images) @ w["remap_sidetune.proj.weight"].T)
    logits = [base.get_submodule(path)(a * seen[path] + extra) for path in heads]
    return sum(logits) / len(logits)


def side_of(attached: Attached, name: str) -> nn.Module:
    side = timm.create_model(name, num_classes=0).double().eval()
    weights = attached.model.state_dict()
    side.load_state_dict({key.removeprefix(SIDE): v for key, v in weights.items() if key.startswith(SIDE)})
    return side


@pytest.mark.parametrize("variant", CLASSIFIERS)
@pytest.mark.parametrize("name", ["test_resnet", "lcnet_035"])
def test_whole_model_equals_the_formula(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str, name: str
) -> None:
    attached = attach("sidetune", build(variant).double(), side=name)
    assert torch.equal(attached.state()["remap_sidetune.alpha"].double().sigmoid(), torch.full((1,), 0.5).double())
    tools.shake(attached, size=0.1)
    base, images = build(variant).double(), tools.images().double()
    side, w = side_of(attached, name), attached.state()
    expected = expected_logits(base, side, w, images, CLASSIFIERS[variant])
    assert torch.allclose(attached.model(images), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(base(images), expected, rtol=0.1)


def test_the_side_network_trains_whole_in_train_mode(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    attached = attach("sidetune", build("plain"))
    before = attached.state()
    tools.step(attached)
    after = attached.state()
    statistics = [name for name in after if name.startswith(SIDE) and name.endswith(("running_mean", "running_var"))]
    assert statistics and all(not torch.equal(before[name], after[name]) for name in statistics)
    assert set(after) == {n for n in attached.model.state_dict() if n.startswith("remap_sidetune.")}


def test_a_single_image_takes_the_statistics_of_training_so_far(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    attached = attach("sidetune", build("plain"), side="lcnet_035")
    tools.step(attached)
    expected, before = attached.model(tools.images(1)), attached.state()
    attached.train()
    assert torch.allclose(attached.model(tools.images(1)), expected, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in attached.state().items())
    modes = {module.training for module in attached.model.remap_sidetune.modules()}
    assert modes == {True}


def test_nothing_random_drops_features_by_default(build: Build, attach: Attach) -> None:
    attached = attach("sidetune", build("plain"), **METHODS.load("sidetune").Config().model_dump())
    rates = [getattr(m, "p", None) or getattr(m, "drop_prob", None) for m in attached.model.remap_sidetune.modules()]
    assert not any(rates) and not attached.model.remap_sidetune.network.drop_rate


def test_count_on_vit_b16_and_both_image_sizes(build: Build) -> None:
    side = timm.create_model("lcnet_075", num_classes=0)
    own = sum(p.numel() for p in side.parameters())
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    attached = attach_method(model, anatomy_of(model), "sidetune", {})
    parameters = dict(model.named_parameters())
    count = sum(parameters[name].numel() for name in attached.trainable)
    assert count == own + 1280 * 768 + 1 == METHODS.row("sidetune").vit_base
    assert 500_000 < own < 2_000_000
    small = build("plain")
    attach_method(small, anatomy_of(small), "sidetune", {})
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_side_networks_that_cannot_be_are_refused(build: Build, attach: Attach) -> None:
    with pytest.raises(UnknownName, match="lcnet_O75"):
        attach("sidetune", build("plain"), side="lcnet_O75")
    with pytest.raises(UnknownName, match="small networks are lcnet_"):
        attach("sidetune", build("plain"), side="nonsense")
    with pytest.raises(BackboneError, match="32 x 32"):
        attach("sidetune", build("plain"), side="vit_tiny_patch16_224")


def test_features_without_an_image_are_an_error(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    attached = attach("sidetune", build("plain"))
    features = attached.model.forward_features(tools.images())
    assert attached.model.forward_head(features).shape == (2, 5)
    with pytest.raises(BackboneError, match="no image"):
        attached.model.forward_head(features)
