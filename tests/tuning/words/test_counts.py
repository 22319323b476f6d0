"""Trained parameters beside CLIP ViT-B/16, without memory: the closed form of each row, and the papers' numbers."""

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.projected_head import ProjectedHead
from remap.language.configs import TextSide
from remap.language.pair import Language
from remap.language.text_tower import TextConfig, TextTower
from remap.tuning import METHODS
from remap.tuning.attaching import attach_method

# CoOp: 16 x 512; CoCoOp 35,360 and MaPLe 3.55 M by the authors' code; PromptSRC 46 K, TCP 0.332 M, MMRL 4.992 M and
# CLIP-LoRA 184 K in their papers; the others by hand.
QUOTED = {
    "coop": 8_192,
    "cocoop": 35_360,
    "kgcoop": 2_048,
    "prograd": 8_192,
    "tcp": 331_904,
    "maple": 3_555_072,
    "promptsrc": 46_080,
    "mmrl": 4_992_256,
    "promptkd": 553_984,
    "clip_adapter": 131_072,
    "clip_lora": 184_320,
}


@pytest.mark.parametrize("row", [row for row in METHODS if "words" in row.needs], ids=lambda row: row.name)
def test_the_table_says_what_is_trained_on_clip(row: object) -> None:
    config = TextConfig(vocab=49_408, context=77, width=512, depth=12, heads=8, hidden=2048, out=512)
    with torch.device("meta"):
        model = VisionTransformer(pre_norm=True, num_classes=0)
        model.head = ProjectedHead(nn.Linear(768, 512, bias=False), 512, 10)
        tower = TextTower(config)
        model.language = Language(Path("nowhere"), TextSide(config, "lower", True), 100.0, 0.0)
        model.language.__dict__["tower"] = tower
        attached = attach_method(model, anatomy_of(model), row.name, {})
    count = sum(model.get_parameter(name).numel() for name in attached.trainable)
    expected = {"taskres": 10 * 512, "tip_adapter": 10 * 16 * 512}
    assert count == (row.vit_base or expected[row.name])
    assert row.vit_base == QUOTED.get(row.name)
