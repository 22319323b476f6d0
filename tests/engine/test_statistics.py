"""Statistics of the teachers' outputs before the first step."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from remap.engine.statistics import estimate_statistics
from remap.progress import Silent
from remap.remapping.normalization import TargetNorm


@pytest.mark.parametrize(("processes", "accumulation", "size"), [(1, 1, 8), (2, 1, 4), (2, 2, 2), (4, 2, 1)])
def test_passes_are_as_large_as_those_of_training(tiny: Any, processes: int, accumulation: int, size: int) -> None:
    """A process that has memory for its share of a step has it for these. Source: 8 images a step, divided; and the
    mean and deviation of all features by NumPy."""
    recipe = tiny.recipe("train.batch_size=8", f"train.accumulation={accumulation}")
    features_ND = np.random.default_rng(0).normal(3.0, 2.0, (20, 5)).astype(np.float32)
    norm, sizes = TargetNorm("standard", 5), list[int]()

    def targets(_images: Any, indices_B: np.ndarray, _view: int) -> dict[str, torch.Tensor]:
        sizes.append(len(indices_B))
        return {"feature": torch.from_numpy(features_ND[indices_B])}

    job: Any = SimpleNamespace(
        recipe=recipe,
        accelerator=SimpleNamespace(num_processes=processes, process_index=0),
        source=SimpleNamespace(split=range(20), batch=lambda rows: (None, rows)),
        teachers=[SimpleNamespace(number=0, sees_plain=False, targets=targets)],
        objective=SimpleNamespace(unsettled=lambda _: [("feature", norm)]),
        progress=Silent(),
        expected_N=None,
    )
    estimate_statistics(job)
    assert max(sizes) == size and sum(sizes) == 20
    assert torch.allclose(norm.shift_D, torch.from_numpy(features_ND.mean(0)), atol=1e-6)
    assert torch.allclose(1.0 / norm.map_, torch.from_numpy(features_ND.std(0)), atol=1e-6)
