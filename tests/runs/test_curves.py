"""The picture of a run's metrics."""

import re

from remap.runs.curves import curves


def _axes(drawn: str) -> list[str]:
    """The numbers at the axes: lowest and highest loss, lowest and highest accuracy."""
    return [word for word in re.findall(r'text-anchor="end">([^<]*)<', drawn) if word not in ("1", "2")]


def test_losses_begin_at_zero() -> None:
    """A loss that falls to 0.00557 is near 0, and not on the ground; one below 0, as a log-likelihood, is there."""
    history = [{"epoch": 1, "loss": 4.0, "accuracy": 0.9}, {"epoch": 2, "loss": 0.00557, "accuracy": 0.95}]
    assert _axes(curves(history, "run")) == ["0", "4", "90", "95"]
    history[1]["loss"] = -3.0
    assert _axes(curves(history, "run")) == ["-3", "4", "90", "95"]
