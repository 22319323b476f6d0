"""Normalised features of a teacher against numpy in float64 and the properties that PHI-S is defined by."""

import numpy as np
import pytest
import torch

from remap.errors import BackboneError
from remap.remapping.normalization import TargetNorm, hadamard


@pytest.mark.parametrize("width", [1, 2, 4, 12, 20, 24, 44, 192, 320, 384, 768, 1024, 1152, 1280, 1664])
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_size(width: int) -> None:
    matrix = hadamard(width).double()
    assert (matrix.abs() - width**-0.5).abs().max() < 1e-7
    assert (matrix @ matrix.mT - torch.eye(width)).abs().max() < 1e-6


@pytest.mark.parametrize("width", [3, 6, 18, 100])
def test_a_width_without_one_is_refused(width: int) -> None:
    with pytest.raises(BackboneError, match="standard"):
        TargetNorm("phi_s", width)


def seen(kind: str, width: int = 12) -> tuple[TargetNorm, np.ndarray, torch.Tensor]:
    """A normaliser, correlated features of very uneven channels, and these normalised."""
    draws = np.random.default_rng(0)
    x = draws.normal(size=(400, width)) @ draws.normal(size=(width, width)) * np.geomspace(0.01, 30, width) + 5.0
    norm, rows = TargetNorm(kind, width), torch.from_numpy(x).float()
    for part in (rows[:300].reshape(100, 3, width), rows[300:]):  # as tokens and in several batches
        norm.observe(part)
    norm.settle()
    return norm, x, norm(rows)


def test_standardised_channels_are_those_of_numpy() -> None:
    _, x, y = seen("standard")
    assert np.abs(y.numpy() - (x - x.mean(0)) / x.std(0)).max() < 1e-4


def test_phi_s_gives_each_channel_variance_one_and_keeps_directions() -> None:
    """Channels have variance 1, and distances between images are those before, over the mean channel's deviation."""
    _, x, y = seen("phi_s")
    assert np.abs(y.double().numpy().std(0) - 1.0).max() < 1e-3
    phi = np.sqrt(np.trace(np.cov(x.T, bias=True)) / x.shape[1])
    before, after = (np.linalg.norm(rows[:50, None] - rows[None, :50], axis=2) for rows in (x, y.double().numpy()))
    assert np.abs(after - before / phi).max() < 1e-3 * after.max()
