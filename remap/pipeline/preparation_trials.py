"""``teacher.prepare: auto``: a few ways are tried on held-out training images, and the teacher is tuned by the best."""

import shutil
from collections.abc import Generator, Mapping
from pathlib import Path

from remap.distributed.launch import accelerator
from remap.io.human_size import number_of
from remap.pipeline.nested_runs import open_or_create, require_unlinked
from remap.progress import Progress
from remap.recipe.schema import BASE_WIDTH, MethodSpec, Recipe
from remap.runs.run_dir import RunDir

# Share of the labelled training images that the ways are judged by.
HELD_OUT = 0.2
# Factor of the faster rate of ``full``: its default was chosen for students, which are not tuned to their limit.
FASTER = 5.0


def ways_to_prepare(tuning: Recipe) -> dict[str, Recipe]:
    """Return the recipes that are tried, by name; of equal ones the first is taken, so the cheapest come first.

    A head alone leaves weights as they are that know these images already; tuning all of them at two rates is for
    images that they do not know.

    Args:
        tuning: That of the method ``full`` (``teacher_tuning.teacher_recipe``); a rate that it names is the only one.
    """
    head = {"method": MethodSpec(name="linear"), "train": tuning.train.model_copy(update={"lr": None})}
    ways = {"linear": tuning.model_copy(update=head), "full": tuning}
    if tuning.train.lr is None:
        faster = {"base_lr": FASTER * tuning.learning_rate(BASE_WIDTH)}
        ways["full-fast"] = tuning.model_copy(update={"train": tuning.train.model_copy(update=faster)})
    return ways


def best_way(
    tuning: Recipe, folder: Path, title: str, progress: Progress
) -> Generator[tuple[str, RunDir, Recipe], None, Recipe]:
    """Yield the trials that have not ended: title, run directory and recipe, which the caller runs at once.

    Args:
        folder: Of the teacher; those of the trials lie beside it.

    Returns:
        The recipe of the best way, by all labelled images.
    """
    ways, accuracies = ways_to_prepare(tuning), dict[str, float]()
    progress.say(f"{title} is prepared in {number_of(len(ways), 'way')}, judged by held-out training images")
    for name, way in ways.items():
        place, trial = _beside(folder, name), _judged_by_held_out(way)
        require_unlinked(place)
        run_dir = open_or_create(place, trial)
        if not run_dir.is_done:
            yield f"{title}, {name}", run_dir, trial
        accuracies[name] = run_dir.summary()["student"]["accuracy"]
    best = max(accuracies, key=lambda name: accuracies[name])  # of equal ones the first
    progress.say(f"{title} is tuned by {best} (held-out training images: {_listed(accuracies)})")
    return ways[best]


def remove_trials(folder: Path) -> None:
    """Remove the trials of a teacher that is prepared: their weights are as large as its own."""
    if accelerator().is_main_process:
        for place in folder.parent.glob(_beside(folder, "*").name):
            shutil.rmtree(place, ignore_errors=True)


def _beside(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name}-trial-{name}")


def _judged_by_held_out(way: Recipe) -> Recipe:
    # A trial of a run that is itself judged by held-out images learns from as few, and is judged by the same.
    held_out = way.data.model_copy(update={"held_out": way.data.held_out or HELD_OUT, "selection": None})
    # Judged once, after the last epoch, which is always evaluated.
    last = {"keep": "last", "metric": "accuracy", "patience": None, "eval_every": way.train.epochs}
    return way.model_copy(update={"data": held_out, "train": way.train.model_copy(update=last)})


def _listed(accuracies: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in accuracies.items())
