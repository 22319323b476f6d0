"""Every method leaves a network that ``torch.export`` takes with a batch of any size."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_models

from remap.backbones.families import FAMILIES
from remap.tuning import METHODS
from remap.tuning.attached import Attached

# As few blocks as there can be: tracing takes as long as the model is deep.
MODELS: dict[str, dict[str, Any]] = {
    "siglip": {"depth": 1, "class_token": True, "global_pool": "token"},
    "resnet_bottleneck": {"layers": (1, 1, 1, 1)},
    "swin": {"depths": (1, 1)},
}
# Whose blocks are of two kinds.
DEEPER = {"dualprompt": {"depth": 2}}
TINY = tiny_models("methods")


def model_for(method: str) -> str:
    """The first of the models that the method fits."""
    row = METHODS.row(method)
    return next(name for name in MODELS if row.fits(FAMILIES.row(TINY[name].family).parts))


# Those of a text tower are exported in words/test_contract.py.
NAMES = [row.name for row in METHODS if "words" not in row.needs]
CASES = [*((name, model_for(name)) for name in NAMES), ("vpt_deep", "swin"), ("vpt_shallow", "swin")]


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_exports_with_a_batch_of_any_size(
    attach: Callable[..., Attached], tools: SimpleNamespace, method: str, variant: str
) -> None:
    """Source: the network itself, on batches of other sizes than that of the export."""
    torch.manual_seed(0)
    model = TINY[variant].build(5, **(MODELS[variant] | DEEPER.get(method, {}))).eval()
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    attached = attach(method, model)
    tools.shake(attached)
    sizes = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (tools.images(3),), dynamic_shapes=(sizes,)).module()
        for batch in (1, 5):
            images = tools.images(batch)
            torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)
