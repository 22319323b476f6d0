"""The shipped pair: what its model card says of it. The figures there come from the forward pass that trained it."""

import re

import numpy as np
import pytest
import torch

from remap.backbones.build import build
from remap.data.sources import open_data
from remap.data.views import View, ViewSource
from remap.language.names import MINI, MINI_FOLDER
from remap.language.pair import require_language, write_zero_shot_head

CARD = (MINI_FOLDER / "README.md").read_text()


@pytest.mark.parametrize(("part", "row"), [("val", "held-out names"), ("train", "names seen")])
def test_zero_shot_accuracy_on_the_drawings_is_that_of_the_model_card(part: str, row: str) -> None:
    data = open_data("drawings", None, 0.2)
    split = getattr(data, part)
    backbone = build(MINI, "pretrained", len(data.classes))
    language = require_language(backbone.model, "test")
    write_zero_shot_head(
        backbone.model, backbone.anatomy, language.class_features([[f"a drawing of a {name}"] for name in data.classes])
    )
    spec = backbone.preprocess
    images, _ = ViewSource(split, View(spec.size, spec.crop_pct, spec.interpolation), memory_bytes=0.0).batch(
        np.arange(len(split))
    )
    with torch.no_grad():
        answers = backbone.model.eval()(images.float() / 127.5 - 1).argmax(1).numpy()
    stated = float(re.search(rf"16 classes, {row}.*\| (\S+) \|$", CARD, re.MULTILINE)[1])
    assert 100 * (answers == split.labels).mean() == pytest.approx(stated, abs=1.5)  # there all colours


def test_the_pair_is_small_and_its_parameters_are_those_of_the_model_card() -> None:
    assert sum(path.stat().st_size for path in MINI_FOLDER.iterdir()) < 6e6
    backbone = build(MINI, "pretrained", 2)
    projected = sum(p.numel() for name, p in backbone.model.named_parameters() if "classifier" not in name)
    texts = sum(p.numel() for p in require_language(backbone.model, "test").tower.parameters())
    assert [f"{count:,}" in CARD for count in (projected, texts)] == [True, True]


def test_the_attribution_that_the_licences_ask_for_is_in_the_card() -> None:
    for words in ("Twitter, Inc and other contributors", "CC BY 4.0", "Copyright (c) Microsoft Corporation", "MIT"):
        assert words in CARD
