"""Which epoch is the result and when training stops early: functions of the history, so equal on all processes."""

from collections.abc import Mapping, Sequence
from typing import Any

from remap.engine.evaluation import Evaluation
from remap.engine.metrics import metrics
from remap.engine.state import State
from remap.recipe.schema import TrainSpec

# What ``train.metric`` was on the selection images, in the record of an epoch.
SELECTION = "selection"


def selection_metric(name: str, found: Evaluation, labels_N: Any) -> float:
    """Return a metric of the selection images, by its name in ``train.metric``; a loss is a mean cross-entropy."""
    if name in (found.metric, "loss"):
        return found.merit if name == found.metric else found.loss
    return metrics(found, labels_N).get(name, 0.0)  # 0 where no image could be read, as the accuracy


def best_epoch(history: Sequence[Mapping[str, Any]], metric: str) -> int:
    """Return the epoch (from 1) with the best metric, of equal ones the first; 0 where none was measured."""
    sign = -1.0 if metric == "loss" else 1.0
    measured = [record for record in history if SELECTION in record]
    return max(measured, key=lambda record: sign * record[SELECTION])["epoch"] if measured else 0


def is_over(state: State, spec: TrainSpec) -> bool:
    """Whether training ends here: after the last epoch, or ``spec.patience`` epochs after the best."""
    if state.epoch >= spec.epochs:
        return True
    # Only where the metric was measured: the last epoch is one that was evaluated.
    measured = bool(state.history) and state.step == 0 and SELECTION in state.history[-1]
    late = spec.patience is not None and measured
    return late and state.epoch - best_epoch(state.history, spec.metric) >= (spec.patience or 0)


def kept_epoch(state: State, spec: TrainSpec) -> int:
    """Return the epoch (from 1) whose student is the result."""
    return best_epoch(state.history, spec.metric) if spec.keep == "best" else state.epoch


def described(state: State, spec: TrainSpec, images: int) -> dict[str, Any]:
    """Return what a summary says of the choice.

    Args:
        images: How many selection images there are.
    """
    best = best_epoch(state.history, spec.metric)
    return {
        "keep": spec.keep,
        "metric": spec.metric,
        "images": images,
        "best_epoch": best,
        "best": state.history[best - 1][SELECTION],
        "kept_epoch": kept_epoch(state, spec),
        "epochs_trained": state.epoch,
    }
