"""RanPAC. The source of the formulas is McDonnell et al. 2023, arXiv 2307.02251, computed here in float64."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from remap.backbones.anatomy import module_at
from remap.errors import BackboneError
from remap.tuning.attached import Attached

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


@pytest.mark.parametrize("variant", ["plain", "deit_distilled", "swin", "resnet"])
def test_the_classifier_reads_a_fixed_random_projection(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str
) -> None:
    model, images = build(variant).double(), tools.images(3).double()
    attached = attach("ranpac", model, dim=7)
    paths = attached.anatomy.classifier_heads
    inputs: dict[str, torch.Tensor] = {}
    for path in paths:
        module_at(model, path).register_forward_hook(lambda _m, args, _out, path=path: inputs.update({path: args[0]}))
    expected = model(images)  # the new rows are zero at first
    draws = torch.randn(attached.anatomy.width, 7, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.randn(5, 7, dtype=torch.float64)
    with torch.no_grad():
        for path in paths:
            module_at(model, path).remap_ranpac.weight.copy_(weight)
    hidden = sum((x.flatten(1) @ draws / attached.anatomy.width**0.5).clamp(min=0) for x in inputs.values())
    assert torch.allclose(model(images) - expected, hidden @ weight.T / len(paths), rtol=1e-6, atol=1e-6)
    assert attached.trainable == () and attached.buffers == ("remap_ranpac.projection_DM",)


def test_a_classifier_with_hidden_layers_is_refused(build: Build, attach: Attach) -> None:
    model = build("plain")
    model.head = nn.Sequential(nn.Linear(model.num_features, 4), nn.Linear(4, 5))
    with pytest.raises(BackboneError, match="one layer"):
        attach("ranpac", model)
