"""A fitted head of every kind that timm has: hidden layers, joined features, weighted classifiers, one of tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from timm.models.efficientvim import EfficientViM
from timm.models.metaformer import MetaFormer
from timm.models.volo import VOLO
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.build import Backbone, Identity, fresh_head
from remap.backbones.preprocess import Preprocess, PreprocessSpec
from remap.data.splits import Split
from remap.errors import BackboneError
from remap.network import Network, Runner, tuned
from remap.pipeline.adjusting import balance, calibrate
from remap.pipeline.probe import fit_probe
from remap.progress import Silent

CLASSES = 3
# Hidden layers; the mean of two classifiers of two branches; a learned mix of four stages; a maximum over tokens.
HEADS: dict[str, Callable[[], nn.Module]] = {
    "metaformer": partial(MetaFormer, depths=(1, 1, 1, 1), dims=(8, 8, 16, 32), num_classes=CLASSES),
    "crossvit": partial(
        timm.create_model, "crossvit_tiny_240", num_classes=CLASSES, embed_dim=(12, 24), depth=((1, 1, 0),)
    ),
    "efficientvim": partial(EfficientViM, num_classes=CLASSES, embed_dim=(16, 32, 48), depths=(1, 1, 1)),
    "volo": partial(
        VOLO, (1, 1, 1, 1), 64, num_classes=CLASSES, embed_dims=(24,) * 4, num_heads=(2,) * 4, global_pool="avg"
    ),
}


def network_of(name: str) -> Network:
    torch.manual_seed(0)
    model: Any = HEADS[name]()
    side = 240 if name == "crossvit" else 64
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "input_size": (3, side, side)}
    if name == "volo":
        model.pretrained_cfg["classifier"] = ("head", "aux_head")  # as timm's own configurations say
    anatomy = anatomy_of(model)
    fresh_head(model, anatomy, CLASSES)
    backbone = Backbone(model, anatomy, PreprocessSpec.of(model), Identity(name, "none", ""), head_is_fresh=True)
    network = tuned(backbone, "linear", {})
    network.classes = tuple("abc")
    return network


class Colours:
    """Noisy images around a colour of their class."""

    def __init__(self) -> None:
        labels, draws = np.arange(24) % CLASSES, np.random.default_rng(0)
        pixels = draws.integers(60, 196, (CLASSES, 3, 1, 1))[labels] + draws.integers(-60, 60, (24, 3, 16, 16))
        self.images = torch.from_numpy(pixels.astype(np.uint8))
        self.split = Split(("",) * 24, labels, lambda index: b"")

    def batch(self, indices: Any) -> tuple[Tensor, np.ndarray]:
        return self.images[torch.from_numpy(np.asarray(indices))], np.asarray(indices)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_the_logits_are_those_of_the_fitted_regression(name: str) -> None:
    """Expected: scikit-learn's Newton solver on the features that timm's own ``pre_logits`` gives."""
    network, source = network_of(name), Colours()
    strength = fit_probe(network, source, 8, Silent())  # type: ignore[arg-type]
    model: Any = network.model
    pixels = Preprocess(network.preprocess)(source.images)
    features = model.forward_head(model.forward_features(pixels), pre_logits=True)
    if name == "metaformer":
        head = model.head.fc
        features = head.norm(head.act(head.fc1(features)))
    features = features.double().numpy()
    standard = (features - features.mean(0)) / (features.std(0) + 1e-6)
    solver = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10, max_iter=10_000)
    expected = solver.fit(standard, source.split.labels).predict_proba(standard)
    logits = Runner(network)(source.images).logits_BC.double()
    found = logits.softmax(-1).numpy()
    assert np.abs(found - expected).max() < 5e-3, "L-BFGS stops at a gradient of 1e-4"
    assert np.abs(found - 1 / CLASSES).max() > 0.1
    temperature = calibrate(network, source, 8, Silent())  # type: ignore[arg-type]
    calibrated = Runner(network)(source.images).logits_BC.double()
    torch.testing.assert_close(calibrated * temperature, logits, rtol=1e-3, atol=1e-3)
    if len(network.anatomy.classifier_heads) > 1:
        with pytest.raises(BackboneError, match="which has several classifiers"):
            balance(network, source, 0.5, 8, Silent())  # type: ignore[arg-type]
        return
    balance(network, source, 0.5, 8, Silent())  # type: ignore[arg-type]
    balanced, mean_C = Runner(network)(source.images).logits_BC.double(), calibrated.softmax(-1).mean(0)
    torch.testing.assert_close(balanced, calibrated - 0.5 * mean_C.log(), rtol=1e-3, atol=1e-3)


def test_a_classifier_without_bias_is_refused() -> None:
    network = network_of("volo")
    model: Any = network.model
    model.head = nn.Linear(24, CLASSES, bias=False)
    with pytest.raises(BackboneError, match="no bias"):
        fit_probe(network, Colours(), 8, Silent())  # type: ignore[arg-type]
