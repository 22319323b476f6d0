"""Trained parameters on ViT-B/16, without the classifier.

Sources: the closed form in the row of each method, which gives the numbers of the papers where those count biases in
(VPT, AdaptFormer 1.19 M, SSF 0.205 M, FacT 0.069 M on its ranks, LST 2.38 M).
"""

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn

from remap.backbones.anatomy import anatomy_of
from remap.tuning import METHODS
from remap.tuning.attaching import attach_method

# Numbers of the papers and of the reference implementations, against a slip in the formula of a row.
QUOTED = {
    "vpt_deep": 92_160,
    "houlsby": 313_536,
    "adapter_plus": 165_984,
    "adaptformer": 1_189_632,
    "convpass": 327_552,
    "repadapter": 239_808,
    "bitfit": 102_912,
    "norm": 38_400,
    "diffit": 140_544,
    "lora": 294_912,
    "fact_tt": 61_440,
    "fact_tk": 86_528,
    "ssf": 205_824,
    "lst": 2_376_288,
    "partial": 7_089_408,
}


@pytest.fixture
def vit_b16() -> Iterator[nn.Module]:
    """Without a head; shapes only, so no memory."""
    with torch.device("meta"):
        yield timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=10)


# Those of a text tower are counted in words/test_counts.py.
COUNTED = [row for row in METHODS if row.vit_base is not None and "words" not in row.needs]


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: row.name)
def test_the_table_says_what_is_trained(vit_b16: nn.Module, row: object) -> None:
    anatomy = anatomy_of(vit_b16)
    attached = attach_method(vit_b16, anatomy, row.name, {})
    parameters = dict(vit_b16.named_parameters())
    assert sum(parameters[name].numel() for name in attached.trainable) == row.vit_base


@pytest.mark.parametrize("method", QUOTED)
def test_the_row_gives_the_quoted_number(method: str) -> None:
    assert METHODS.row(method).vit_base == QUOTED[method]


def test_methods_without_a_count_do_not_fit_a_vision_transformer() -> None:
    from remap.backbones.families import FAMILIES

    parts = FAMILIES.row("vit").parts | {"words"}
    by_classes = {"tip_adapter", "taskres"}
    without = {row.name for row in METHODS if row.vit_base is None}
    assert without == by_classes | {row.name for row in METHODS if not row.fits(parts)}
