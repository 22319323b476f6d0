"""Which weights partial trains, and how. Sources: names in timm's state dict; methods counted in the VPT paper."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]

# The last entries are of the norm in front of the classifier; residual networks have none.
CHOSEN = [
    ("plain", {}, ("blocks.2.", "norm.")),
    ("plain", {"num_blocks": 2}, ("blocks.1.", "blocks.2.", "norm.")),
    ("plain", {"blocks": [2, 0]}, ("blocks.0.", "blocks.2.", "norm.")),
    ("dinov2_registers", {"parts": "attention"}, ("blocks.2.norm1.", "blocks.2.attn.", "blocks.2.ls1.", "norm.")),
    ("dinov2_registers", {"parts": "mlp"}, ("blocks.2.norm2.", "blocks.2.mlp.", "blocks.2.ls2.", "norm.")),
    ("dinov3", {"parts": "attention"}, ("blocks.2.norm1.", "blocks.2.attn.", "blocks.2.gamma_1", "norm.")),
    ("beit", {"parts": "mlp"}, ("blocks.2.norm2.", "blocks.2.mlp.", "blocks.2.gamma_2", "fc_norm.")),
    ("avg_pool", {}, ("blocks.2.", "fc_norm.")),
    ("siglip", {}, ("blocks.2.", "norm.")),
    ("swin", {}, ("layers.1.blocks.0.", "norm.")),
    ("swin", {"blocks": [1]}, ("layers.0.blocks.1.", "norm.")),
    ("convnext", {"num_blocks": 2}, ("stages.2.blocks.0.", "stages.3.blocks.0.", "head.norm.")),
    ("resnet", {}, ("layer4.0.",)),
]


@pytest.mark.parametrize(("variant", "options", "prefixes"), CHOSEN)
def test_the_chosen_blocks_and_the_final_norm_train(
    build: Build, attach: Attach, variant: str, options: dict, prefixes: tuple[str, ...]
) -> None:
    attached = attach("partial", build(variant), **options)
    assert set(attached.trainable) == {n for n, _ in build(variant).named_parameters() if n.startswith(prefixes)}
    assert all(any(name.startswith(prefix) for name in attached.trainable) for prefix in prefixes)


@pytest.mark.parametrize(("variant", "options", "prefixes"), CHOSEN)
def test_a_step_moves_them_as_it_moves_an_untouched_model(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str, options: dict, prefixes: tuple[str, ...]
) -> None:
    attached, plain = attach("partial", build(variant), **options), build(variant)
    images, labels = tools.images(4), torch.tensor([0, 1, 2, 3])
    for model in (attached.model, plain):
        nn.functional.cross_entropy(model(images), labels).backward()
    torch.optim.SGD([p for p in attached.model.parameters() if p.requires_grad], lr=0.1).step()
    torch.optim.SGD([p for n, p in plain.named_parameters() if n.startswith(prefixes)], lr=0.1).step()
    expected = plain.state_dict()
    for name, value in attached.model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-7), name


def test_only_the_tuned_blocks_drop_and_count(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    """Batch statistics of the tuned blocks move and are saved, those of the frozen ones stay."""
    attached = attach("partial", build("resnet_bottleneck"))
    before = copy.deepcopy(attached.model.state_dict())
    tools.step(attached)
    after = attached.model.state_dict()
    moved = {name for name in before if "running" in name and not torch.equal(before[name], after[name])}
    statistics = {name for name in before if "running" in name and name.startswith("layer4.0.")}
    assert moved == statistics
    assert statistics <= set(attached.buffers) <= set(attached.state())


@pytest.mark.parametrize(("blocks", "count"), [(1, 7_089_408), (2, 14_177_280), (4, 28_353_024)])
def test_counts_on_vit_b16(blocks: int, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    attached = attach_method(model, anatomy_of(model), "partial", {"num_blocks": blocks})
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for name in attached.trainable) == count


@pytest.mark.parametrize("options", [{"num_blocks": 4}, {"blocks": [0, 3]}])
def test_blocks_that_are_not_there_are_refused(build: Build, attach: Attach, options: dict) -> None:
    with pytest.raises(BackboneError, match="does not have"):
        attach("partial", build("plain"), **options)


def test_branches_that_are_not_there_are_refused(build: Build, attach: Attach) -> None:
    with pytest.raises(BackboneError, match="have no branch 'mlp'"):
        attach("partial", build("resnet"), parts="mlp")


@pytest.mark.parametrize("options", [{"blocks": []}, {"blocks": [-1]}, {"num_blocks": 0}, {"parts": "norm"}])
def test_options_that_mean_nothing_are_refused(build: Build, attach: Attach, options: dict) -> None:
    with pytest.raises(ValidationError):
        attach("partial", build("plain"), **options)
