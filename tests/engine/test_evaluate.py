"""Evaluation counts every image once, whatever the number of images, the batch size and the number of processes."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remap.assembly import assemble
from remap.bench import Bench
from remap.engine.evaluate import Evaluation, evaluate
from remap.engine.launch import accelerator
from remap.errors import DataError
from remap.network import Network
from remap.progress import Silent
from remap.recipe import dump

COUNTS = (1, 7, 97, 101)

# Each of two gloo processes evaluates the first n digits and writes down what it counted.
RANKS = f"""
import json, os, sys
from pathlib import Path
from remap.assembly import assemble
from remap.bench import Bench
from remap.engine.evaluate import evaluate
from remap.engine.launch import accelerator
from remap.progress import Silent
from remap.recipe import load

parts = assemble(load(Path(sys.argv[1])), None, Silent(), Bench())
source, found = parts.views.val, []
whole = source.split
for count in {COUNTS}:
    source.split = whole.take(range(count))
    result = evaluate(parts.student, source, accelerator(), batch_size=8, bf16=False, progress=Silent(), what="x")
    found.append([result.correct, result.count, result.predictions_N.tolist()])
Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps([accelerator().num_processes, found]))
"""


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
    network = assemble(tiny.recipe(losses="ce"), None, Silent(), Bench()).student
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


def test_two_processes_count_what_one_counts(
    tiny: Any, tmp_path: Path, start_process: Callable[..., subprocess.Popen]
) -> None:
    """Expected: the predictions of this single process, image by image, also where batches do not divide."""
    recipe = tiny.recipe(losses="ce", data="digits")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start_process(*launcher, str(tmp_path / "ranks.py"), str(tmp_path / "recipe.yaml"), str(tmp_path))
    parts = assemble(recipe, None, Silent(), Bench())
    labels = parts.views.val.split.labels
    whole = _evaluate(parts.student, parts.views.val, batch_size=8).predictions_N
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for rank in ("0", "1"):
        processes, found = json.loads((tmp_path / rank).read_text())
        assert processes == 2
        for (correct, count, predictions), expected in zip(found, COUNTS, strict=True):
            assert count == expected
            assert predictions == whole[:expected].tolist()
            assert correct == (whole == labels)[:expected].sum()
