"""``remap recommend``: rank methods for some images and a budget by short runs, on training images that are held out.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): all methods train for an eighth of the epochs, the
better half for a quarter, the better half of those for all. The evaluation images are not looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from remap.errors import RecipeError, RunError
from remap.io import atomic_write, links
from remap.io.human_size import number_of
from remap.pipeline.build_cache import prepare_shared_teacher
from remap.pipeline.compare import resumable
from remap.pipeline.comparison_budget import of_length, read_budget, trained_parameters, with_epochs, within_parameters
from remap.pipeline.comparison_cells import Cell, comparison_cells
from remap.pipeline.comparison_folder import (
    RECOMMENDATION,
    TEACHER,
    claim,
    fingerprint_of,
    is_done,
    require_same_images,
)
from remap.pipeline.comparison_plan import require_rankable
from remap.pipeline.comparison_search import held_out
from remap.pipeline.held_out_classes import require_each_class
from remap.pipeline.labels_only import images_of
from remap.pipeline.nested_runs import open_or_create
from remap.pipeline.objective import without_idle_losses
from remap.pipeline.run import run
from remap.pipeline.shared import SharedResources
from remap.progress import Progress, Within
from remap.recipe.schema import DataSpec, Recipe
from remap.runs.answers import read_evidence
from remap.runs.interval import paired, wilson
from remap.runs.run_dir import RunDir
from remap.runs.task import open_backbone

# Shares of the epochs that the rounds take. Half of the methods go on, two at least.
ROUNDS = (1 / 8, 1 / 4, 1.0)
FEWEST = 2


@dataclass
class Candidate:
    """A method and what it reached: one entry of ``accuracies`` and ``right`` for each round it took part in."""

    cell: Cell
    parameters: int
    accuracies: list[float]
    right: list[np.ndarray]
    seconds: float = 0.0


def recommend(
    recipe: Recipe, methods: Sequence[str], output: Path, progress: Progress, budget: str | None = None
) -> dict[str, Any]:
    """Rank methods and return the content of recommend.json.

    Args:
        methods: As for a comparison, each is run with the recipe's teacher and first seed.
        output: Folder of the trials; finished ones in it are not run again.
        budget: "epochs=N" or "parameters=N"; None is the recipe's epochs.

    Raises:
        RecipeError: Nothing is left to rank, or the budget is another one.
        RunError: The folder holds trials of another recipe.
    """
    require_rankable(recipe, methods, output, budget)
    kind, value = read_budget(budget) or ("", 0.0)
    recipe = without_idle_losses(recipe, progress)  # before its losses are checked, and count as chosen
    if kind == "epochs":
        recipe = with_epochs(recipe, int(value))
    shared = SharedResources(teacher_folder=output / TEACHER)
    cells = comparison_cells(recipe, methods, 1, images_of=partial(images_of, shared=shared))
    cells = [cell for cell in cells if cell.with_teacher]
    classes, left_out = len(shared.classes(recipe)), dict[str, str]()
    if kind == "parameters":
        cells, left_out = within_parameters(cells, int(value), classes)
    candidates = _candidates(cells, classes, left_out)
    require_each_class(held_out(recipe), shared)
    # After what can be refused, so that a mistake does not claim the folder.
    claim(output, recipe)
    # A set: rounds of few epochs may be equal, and are run once.
    epochs = sorted({max(1, round(share * recipe.train.epochs)) for share in ROUNDS})
    # Cached: all trials have the same images, and a fingerprint reads every file.
    left, held_by = candidates, cache(partial(fingerprint_of, progress=progress))
    with resumable(output, "recommend"):
        # As long as the last round trains. A finished trial has left it in the folder.
        finished = next(output.glob("round-*/*/summary.json"), None)
        if finished is None:
            prepare_shared_teacher((held_out(one.cell.recipe) for one in candidates), progress, shared)
        for number, count in enumerate(epochs, 1):
            progress.say(
                f"round {number}/{len(epochs)}: {number_of(len(left), 'method')}, {number_of(count, 'epoch')} each"
            )
            for candidate in left:
                _try(candidate, count, output / f"round-{number}", finished, shared, held_by, progress)
            # Of equally good methods the smaller one comes first.
            left = sorted(left, key=lambda one: (-one.accuracies[-1], one.parameters))
            left = left[: max(FEWEST, (len(left) + 1) // 2)] if number < len(epochs) else left
    found = ranked(candidates, epochs) | {
        "recipe": recipe.name,
        "output": str(output),
        "data": recipe.data.source,
        "student": recipe.student.model,
        "teacher": recipe.teacher.model if recipe.teacher is not None else None,
        "left_out": left_out,
    }
    atomic_write.write_json(output / RECOMMENDATION, found)
    return found


def _candidates(cells: Sequence[Cell], classes: int, left_out: dict[str, str]) -> list[Candidate]:
    """Return the methods that fit their student; ``left_out`` learns why others do not."""
    found: list[Candidate] = []
    student = open_backbone(cells[0].recipe.student.model_copy(update={"init": None, "force_init": False}), classes)
    for cell in cells:
        method = cell.recipe.method
        parameters = trained_parameters(student, method.name, method.options)
        if parameters is None:
            left_out[cell.label] = f"{cell.label} does not fit {cell.recipe.student.model}"
        else:
            found.append(Candidate(cell, parameters, [], []))
    if not found:
        raise RecipeError(list(left_out.values()), "command line", do="name other methods: --methods")
    return found


def _try(
    candidate: Candidate,
    epochs: int,
    folder: Path,
    finished: Path | None,
    shared: SharedResources,
    held_by: Callable[[DataSpec], str],
    progress: Progress,
) -> None:
    cell = replace(candidate.cell, recipe=held_out(of_length(candidate.cell.recipe, epochs)))
    path = folder / cell.name
    # Before anything is written: a link could lead out of the folder.
    links.require_no_link(path)
    if not is_done(path, cell, held_by):
        if finished is not None:  # by an earlier command
            require_same_images(finished.parent, cell, held_by)
        run(cell.recipe, open_or_create(path, cell.recipe), Within(progress, cell.label), shared, resuming=True)
    # From its files, whether it ran now or earlier: a resumed command ranks by the same figures.
    summary, evidence = RunDir.open(path).summary(), read_evidence(path)
    if evidence is None:
        raise RunError(f"{path} has no answers.json", do="remove that folder: the trial is run again")
    candidate.accuracies.append(summary["student"]["accuracy"])
    answers_N = np.array(evidence.student.predictions)
    # -1 of an image that could not be read, as in the accuracy
    candidate.right.append((answers_N == np.array(evidence.labels))[answers_N >= 0])
    candidate.seconds += summary["seconds"]


def ranked(candidates: Sequence[Candidate], epochs: Sequence[int]) -> dict[str, Any]:
    """Return rows from the best to the worst, and which method to take.

    A method that left in an earlier round is expected to gain as much as those that went on did on average; the
    interval (Wilson, 95 %) is that of the held-out images alone. Two methods are told apart where the paired interval
    of their last common round leaves 0 out.
    """
    # Rounds count before accuracies: those after different numbers of epochs do not compare.
    order = sorted(candidates, key=lambda one: (-len(one.accuracies), -one.accuracies[-1], one.parameters))
    best, finalists = order[0], [one for one in order if len(one.accuracies) == len(order[0].accuracies)]
    rows: list[dict[str, Any]] = []
    for one in order:
        last = len(one.accuracies) - 1
        gain = float(np.mean([other.accuracies[-1] - other.accuracies[last] for other in finalists]))
        expected = min(1.0, max(0.0, one.accuracies[-1] + gain))
        # In the last round of the weaker one, where both had as many epochs; a trial has one seed, hence the axis.
        mean, low, high = paired(one.right[last][None], best.right[last][None])
        rows.append(
            {
                "method": one.cell.label,
                "parameters": one.parameters,
                "accuracies": one.accuracies,
                "epochs": list(epochs[: last + 1]),
                "expected": expected,
                "interval": list(wilson(expected, len(one.right[last]))),
                "measured": one in finalists,
                "to_best": {"mean": mean, "low": low, "high": high},
                "told_apart": high < 0,
                "seconds": one.seconds,
            }
        )
    alike = [row for row in rows if not row["told_apart"]]
    return {
        "rows": rows,
        "best": rows[0]["method"],
        "cheapest": min(alike, key=lambda row: row["parameters"])["method"],
        "cannot_tell": [row["method"] for row in alike[1:]],
        "held_out_images": len(best.right[0]),
        "seconds": sum(one.seconds for one in candidates),
    }
