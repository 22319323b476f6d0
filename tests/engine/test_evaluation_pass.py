"""Evaluation counts every image once, whatever the number of images, the batch size and the number of processes."""

from typing import Any

import numpy as np
import pytest
import torch

from remap.distributed.launch import accelerator
from remap.engine.evaluation import Evaluation
from remap.engine.evaluation_pass import evaluate
from remap.errors import DataError
from remap.network import Network
from remap.pipeline.components import build_components
from remap.pipeline.shared import SharedResources
from remap.progress import Silent


class _Names(torch.nn.Module):
    """Says class 0 for dark images, 1 for bright ones."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))

    def forward_head(self, brightness: torch.Tensor) -> torch.Tensor:
        return torch.stack([-brightness, brightness], dim=1)


class _Source:
    """Black and white images by a list, some of which cannot be read."""

    def __init__(self, white: list[bool], labels: list[bool], bad: tuple[int, ...] = ()) -> None:
        self.white, self.split = np.asarray(white), _Split(np.asarray(labels, dtype=np.int64))
        self.bad = {index: "not an image" for index in bad}

    def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        good = np.asarray([i for i in indices if i not in self.bad], dtype=np.int64)
        pixels = torch.from_numpy(self.white[good] * 255).to(torch.uint8)
        return pixels[:, None, None, None].expand(-1, 3, 4, 4), good

    def bad_names(self) -> list[tuple[str, str]]:
        return [(f"{index}.png", reason) for index, reason in self.bad.items()]


class _Split:
    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


def _network(tiny: Any) -> Network:
    network = build_components(tiny.recipe(losses="ce"), None, Silent(), SharedResources()).student
    network.model = _Names(network.model)
    network.preprocess = type(network.preprocess)(4, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return network


def _evaluate(network: Network, source: Any, **options: Any) -> Evaluation:
    common = {"bf16": False, "progress": Silent(), "what": "evaluation", "batch_size": 8}
    return evaluate(network, source, accelerator(), **{**common, **options})


@pytest.mark.parametrize("count", [1, 7, 8, 97, 101])
@pytest.mark.parametrize("batch_size", [1, 8, 200])
def test_the_count_is_exact(tiny: Any, count: int, batch_size: int) -> None:
    """Expected by hand: white is taken for class 1 and black for 0, and half of the images are labelled otherwise."""
    white = [index % 3 == 0 for index in range(count)]
    labels = [one != (index < count // 2) for index, one in enumerate(white)]
    found = _evaluate(_network(tiny), _Source(white, labels), batch_size=batch_size)
    assert (found.correct, found.count) == (count - count // 2, count)
    assert found.accuracy == (count - count // 2) / count
    assert found.predictions_N.tolist() == white


def test_an_unreadable_image_stops_or_is_left_out_of_the_count(tiny: Any) -> None:
    white = [True, False] * 5
    network, source = _network(tiny), _Source(white, white, bad=(3, 4))
    with pytest.raises(DataError, match="2 of 10 evaluation images cannot be read"):
        _evaluate(network, source)
    result = _evaluate(network, source, skip_bad=True)
    assert (result.correct, result.count) == (8, 8)
    assert result.predictions_N.tolist() == [1, 0, 1, -1, -1, 0, 1, 0, 1, 0]


def test_confidence_rank_and_loss_of_each_image(tiny: Any) -> None:
    """By hand: a white image of brightness 1 has logits -1 and 1, so its class has the probability 1/(1 + e^-2)."""
    found = _evaluate(_network(tiny), _Source([True, True, True], [True, False, True], bad=(2,)), skip_bad=True)
    likely = 1 / (1 + np.exp(-2.0))
    assert found.ranks_N.tolist() == [0, 1, -1]
    np.testing.assert_allclose(found.confidences_N, [likely, likely, -1], rtol=1e-6)
    np.testing.assert_allclose(found.losses_N, [-np.log(likely), -np.log(1 - likely), -1], rtol=1e-6)
    assert found.loss == pytest.approx(-np.log(likely * (1 - likely)) / 2, rel=1e-6)
