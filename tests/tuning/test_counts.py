"""Trained parameters on ViT-B/16, without the classifier.

Sources: the closed forms in L = 12, D = 768, H = 3072 written out below, which give the numbers of the papers where
those count biases in (VPT, AdaptFormer 1.19 M, SSF 0.205 M, FacT 0.069 M on its ranks, LST 2.38 M).
"""

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn

from remap.backbones.anatomy import anatomy_of
from remap.tuning import METHODS
from remap.tuning.attaching import attach_method

L, D, H = 12, 768, 3072
ADAPTER_8 = 2 * D * 8 + 8 + D
BLOCK = (3 * D * D + 3 * D) + (D * D + D) + (D * H + H) + (H * D + D) + 4 * D
ALL = L * BLOCK + 2 * D + (3 * 16 * 16 * D + D) + D + 197 * D

CLOSED_FORMS = {
    "full": ALL,
    "linear": 0,
    "mlp": 2 * (D * D + D + 2 * D),
    "partial": BLOCK + 2 * D,
    "vpt_shallow": 10 * D,
    "vpt_deep": L * 10 * D,
    "vp": 12 * 30 * (224 - 30),
    "e2vpt": L * D * (10 + 5),
    "vqt": L * D,
    "houlsby": 2 * L * ADAPTER_8,
    "pfeiffer": L * ADAPTER_8,
    "adapter_plus": L * (ADAPTER_8 + D),
    "adaptformer": L * (2 * D * 64 + 64 + D),
    "convpass": 2 * L * (ADAPTER_8 + 9 * 8 * 8 + 8),
    "repadapter": 2 * L * (D * 8 + 8 + D * 8 // 2 + D),
    "lst": L * (12 * 96**2 + 13 * 96) + (L + 1) * (D * 96 + 96) + 96 * D + D,
    "bitfit": L * (3 * D + D + H + D + 2 * D) + D + D,
    "norm": L * 4 * D + 2 * D,
    "diffit": 102_912 + L * 2 * D + D + 2 * D * L,
    "lora": L * 2 * (D * 8 + 8 * D),
    "fact_tt": 2 * D * 16 + 12 * L * 16**2,
    "fact_tk": 2 * D * 32 + 12 * L * 32 + 32**3,
    "ssf": L * 2 * (D + 3 * D + D + D + H + D) + 2 * D + 2 * D,
    "krona": 2 * L * (32 * 24 + 24 * 32),
    "gps": 83_712 + 83_712,
    "skip": L,
}

# Some of them as plain numbers, against a slip in a formula.
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


@pytest.mark.parametrize("row", [row for row in METHODS if row.vit_base is not None], ids=lambda row: row.name)
def test_the_table_says_what_is_trained(vit_b16: nn.Module, row: object) -> None:
    anatomy = anatomy_of(vit_b16)
    attached = attach_method(vit_b16, anatomy, row.name, {})
    parameters = dict(vit_b16.named_parameters())
    assert sum(parameters[name].numel() for name in attached.trainable) == row.vit_base


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_the_table_agrees_with_the_closed_form(method: str) -> None:
    assert METHODS.row(method).vit_base == CLOSED_FORMS[method]
    assert QUOTED.get(method, CLOSED_FORMS[method]) == CLOSED_FORMS[method]


def test_methods_without_a_count_do_not_fit_a_vision_transformer() -> None:
    from remap.backbones.families import FAMILIES

    parts = FAMILIES.row("vit").parts
    assert {row.name for row in METHODS if row.vit_base is None} == {row.name for row in METHODS if not row.fits(parts)}
