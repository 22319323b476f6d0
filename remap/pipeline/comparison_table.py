"""The table of a comparison, from its run directories: accuracies, paired intervals, costs, agreement. No torch."""

import math
import statistics
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remap.pipeline.comparison_cells import ALONE, TEACHER, Cell, category_title
from remap.recipe.schema import Recipe
from remap.runs.answers import Evidence, read_evidence
from remap.runs.interval import paired, paired_draws
from remap.runs.run_dir import RunDir
from remap.runs.summary_schema import metric_of
from remap.tuning import CATEGORIES

# Normalising constant of the performance-parameter trade-off.
PPT_PARAMETERS = 1e7
# Predictions (S, N), their probabilities, and the labels (N,); of seeds S and images N.
_Answered = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]


class _Ranked(NamedTuple):
    """The mAP of S seeds, also on K resamples of their images, which ``images`` tells from others."""

    images: Any
    figures_S: NDArray[np.float64]
    draws_SK: NDArray[np.float64]


def ppt(accuracy: float, parameters: int) -> float:
    """Return the performance-parameter trade-off of V-PETL Bench (Xin et al. 2024): accuracy exp(-log10(P/1e7 + 1))."""
    return accuracy * math.exp(-math.log10(parameters / PPT_PARAMETERS + 1))


def tabulate(recipe: Recipe, cells: Sequence[Cell], output: Path) -> dict[str, Any]:
    """Return the content of compare.json: a row for each method, swept value and loss set, by category."""

    # A run counts in several rows and pairs: that of full tuning in many.
    @cache
    def summary(name: str) -> dict[str, Any]:
        return RunDir.open(output / name).summary()

    @cache
    def answers(names: tuple[str, ...]) -> _Answered | _Ranked | None:
        return _answers([output / name for name in names])

    def names(label: str, objective: str) -> tuple[str, ...]:
        return tuple(cell.name for cell in cells if cell.label == label and cell.objective == objective)

    rows: list[dict[str, Any]] = []
    runs: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    # One cell stands for its seeds, which differ in nothing that is read of it.
    firsts = {(cell.label, cell.objective): cell for cell in cells if cell.with_teacher}
    epochs_alone = {cell.label: cell.recipe.train.epochs for cell in cells if not cell.with_teacher}
    order = list(CATEGORIES.values())  # of the survey
    for (label, objective), cell in sorted(firsts.items(), key=lambda one: order.index(category_title(one[1].method))):
        alone, taught = names(label, ALONE), names(label, objective)
        runs.append((alone, taught))
        rows.append(
            {
                "category": category_title(cell.method),
                "method": cell.method,
                "name": label if objective == TEACHER else f"{label} {objective}",
                "settings": dict(cell.settings),
                "losses": objective,
                "alone": _statistics([summary(name) for name in alone]),
                "teacher": _statistics([summary(name) for name in taught]),
                **_costs([summary(name) for name in taught], cell.recipe),
                "epochs_alone": epochs_alone[label],
            }
        )
    for row, (alone, taught) in zip(rows, runs, strict=True):
        full = next((i for i in _alike(rows, row) if rows[i]["method"] == "full"), None)
        right = {key: answers(found) for key, found in (("alone", alone), ("teacher", taught))}
        # Full tuning on labels alone, whatever the row learns from.
        of_full = None if full is None else answers(runs[full][0])
        row["gain"] = row["teacher"]["mean"] - row["alone"]["mean"]
        row["difference"] = {
            "to_alone": _difference(right["teacher"], right["alone"]),
            "to_full": _difference(right["teacher"], of_full),
            "alone_to_full": _difference(right["alone"], of_full),
        }
        if full is not None and runs[full][0] == alone:  # full tuning on labels alone does not differ from itself
            row["difference"]["alone_to_full"] = None
        row["ppt"] = ppt(row["teacher"]["mean"], row["trainable_parameters"])
    for row in rows:
        row["pareto"] = not any(_dominates(other, row) for other in rows)
    # A run with the teacher, whose summary names it.
    first = summary(runs[0][1][0])
    return {
        "recipe": recipe.name,
        "output": str(output),
        "data": recipe.data.source,
        "images": first["data"]["val_images"],
        "metric": metric_of(first),
        "epochs": _range([row["epochs"] for row in rows]),
        # Labels alone take as many steps: of fewer images, these are more epochs.
        "epochs_alone": _range([row["epochs_alone"] for row in rows]),
        "batch_size": recipe.train.batch_size,
        "seeds": sorted({cell.seed for cell in cells}),
        "losses": {loss.name: loss.weight for loss in recipe.losses},
        "objective": [loss.model_dump(mode="json") for loss in recipe.losses],
        "student": recipe.student.model,
        "teacher": first["teacher"],
        "more_teachers": first.get("more_teachers", []),
        "rows": rows,
        "pairs": _pairs([(row["name"], answers(taught)) for row, (_, taught) in zip(rows, runs, strict=True)]),
    }


def _range(epochs: Sequence[int]) -> int | str:
    """Return the epochs of all rows, or "7 to 12" where a budget or sweep makes them differ."""
    return epochs[0] if len(set(epochs)) == 1 else f"{min(epochs)} to {max(epochs)}"


def _statistics(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [summary["student"]["accuracy"] for summary in summaries]
    tests = [summary["student"]["test_accuracy"] for summary in summaries if "test_accuracy" in summary["student"]]
    return {
        "accuracies": accuracies,
        "mean": statistics.fmean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "seconds": statistics.fmean(summary["train_seconds"] for summary in summaries),
        **({"test_accuracies": tests, "test_mean": statistics.fmean(tests)} if tests else {}),
    }


def _costs(summaries: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Return what a method costs with the teacher; a step's time is that of training divided by its steps."""
    first, train = summaries[0], recipe.train
    trained = [summary.get("choice", {}).get("epochs_trained", train.epochs) for summary in summaries]  # patience
    steps = max(1, first["data"]["train_images"] // train.batch_size) * statistics.fmean(trained)
    return {
        **{name: first["student"][name] for name in ("trainable_parameters", "total_parameters", "task_bytes")},
        "flops": first["student"].get("flops"),  # runs of earlier versions have none
        "learning_rate": first["learning_rate"],
        "weight_decay": train.weight_decay,
        "epochs": train.epochs,
        "step_seconds": statistics.fmean(summary["train_seconds"] for summary in summaries) / steps,
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in summaries),
    }


def _alike(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[int]:
    """Return the rows with the same swept recipe fields, whatever was swept of the methods."""

    def key(one: dict[str, Any]) -> Any:
        return [(name, value) for name, value in one["settings"].items() if not name.startswith("method.")]

    return [index for index, one in enumerate(rows) if key(one) == key(row)]


def _answers(runs: Sequence[Path]) -> _Answered | _Ranked | None:
    """Return what the runs of all seeds answered; None where they cannot be compared image by image."""
    found = [one for run in runs if (one := read_evidence(run)) is not None]
    if len(found) < len(runs) or any(one.labels != found[0].labels for one in found):
        return None  # runs of earlier versions
    if found[0].multilabel:
        return _ranked(found)
    predictions_SN = np.array([one.student.predictions for one in found], np.int64)
    confidences_SN = np.array([one.student.confidences for one in found], np.float64)
    read_N = (predictions_SN >= 0).all(axis=0)  # -1 of an image that could not be read, as in the accuracies
    return predictions_SN[:, read_N], confidences_SN[:, read_N], np.array(found[0].labels, np.int64)[read_N]


def _ranked(found: Sequence[Evidence]) -> _Ranked | None:
    seen = [[loss >= 0 for loss in one.student.losses] for one in found]
    draws = [one.student.draws for one in found]
    if not all(draws) or any(one != seen[0] for one in seen):
        return None  # runs of earlier versions, or draws of other images
    known = [[share for share in one.student.precision or () if share is not None] for one in found]
    return _Ranked((found[0].labels, seen[0]), np.array([statistics.fmean(one) for one in known]), np.array(draws))


def _difference(first: _Answered | _Ranked | None, second: _Answered | _Ranked | None) -> dict[str, Any] | None:
    """Return the mean difference of accuracy or mAP, its interval, and whether that leaves 0 out."""
    # Paired by image and seed: both need the same images in the same order, and as many seeds.
    if first is None or second is None:
        return None
    if isinstance(first, _Ranked) or isinstance(second, _Ranked):
        if not (isinstance(first, _Ranked) and isinstance(second, _Ranked)):
            return None
        if first.images != second.images or first.draws_SK.shape != second.draws_SK.shape:
            return None
        mean, low, high = paired_draws(first.figures_S - second.figures_S, first.draws_SK - second.draws_SK)
    elif not np.array_equal(first[2], second[2]) or len(first[0]) != len(second[0]):
        return None
    else:
        mean, low, high = paired(first[0] == first[2], second[0] == second[2])
    return {"mean": mean, "low": low, "high": high, "distinguishable": low > 0 or high < 0}


def _dominates(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether a row is nowhere worse in trained parameters and accuracy, and better in one."""
    # Negative accuracy, so that less is better in both numbers.
    one, two = ((row["trainable_parameters"], -row["teacher"]["mean"]) for row in (first, second))
    return one != two and one[0] <= two[0] and one[1] <= two[1]


def _pairs(answered: Sequence[tuple[str, _Answered | _Ranked | None]]) -> list[dict[str, Any]]:
    """Return difference, agreement and ensemble (the surer answer) of every two methods, with the teacher.

    Where an image has any number of classes, the difference alone.
    """
    pairs: list[dict[str, Any]] = []
    for (first, one), (second, two) in combinations(answered, 2):
        if isinstance(one, _Ranked) or isinstance(two, _Ranked):
            pairs.append({"methods": [first, second], "difference": _difference(one, two)})
            continue
        if one is None or two is None or one[0].shape != two[0].shape:
            continue
        right = one[2]
        surer_SN = np.where(one[1] >= two[1], one[0], two[0])
        alone = max(float((answers[0] == right).mean()) for answers in (one, two))
        together = float((surer_SN == right).mean())
        pairs.append(
            {
                "methods": [first, second],
                "difference": _difference(one, two),
                "agreement": float((one[0] == two[0]).mean()),
                "ensemble": together,
                "ensemble_gain": together - alone,
            }
        )
    return pairs
