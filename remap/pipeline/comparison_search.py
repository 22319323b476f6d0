"""Learning rate and weight decay of each cell, by as many trials, on training images that are held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remap.errors import RecipeError, RunError
from remap.io.versions import install_command
from remap.pipeline.comparison_cells import Cell
from remap.pipeline.comparison_folder import is_done, require_same_images
from remap.progress import Progress, Within
from remap.recipe.schema import BASE_WIDTH, DataSpec, Recipe
from remap.runs.run_dir import RunDir

if TYPE_CHECKING:
    from remap.pipeline.shared import SharedResources

# Share of the labelled training images that trials are judged by.
HELD_OUT = 0.2
# Factors of the learning rate, and weight decays, that are tried.
RATES, DECAYS = (0.1, 10.0), (1e-6, 1e-1)


@dataclass(frozen=True)
class Search:
    """How many trials each cell gets, by which sampler of Optuna."""

    trials: int
    sampler: str = "tpe"

    @staticmethod
    def read(text: str | None) -> "Search | None":
        """Read "20" or "random:20".

        Raises:
            RecipeError: It is neither.
        """
        if text is None:
            return None
        sampler, colon, count = text.rpartition(":")
        if (sampler or "tpe") not in ("tpe", "random") or bool(colon) != bool(sampler) or not count.isdecimal():
            raise RecipeError([f"--search {text}: write a number of trials: 20, or random:20"], "command line")
        if int(count) < 1:
            raise RecipeError([f"--search {text}: at least one trial"], "command line")
        return Search(int(count), sampler or "tpe")


def require_searchable(recipe: Recipe, trials: str = "--search") -> None:
    """Refuse trials, of a search or of what is named, where images are held out already.

    Raises:
        RecipeError: What else holds images out.
    """
    others = {"data.held_out": recipe.data.held_out, "teacher.calibrate": any(one.calibrate for one in recipe.teachers)}
    for name in [name for name, given in others.items() if given]:
        raise RecipeError([f"{trials}: {name} holds training images out already (leave it out)"], recipe.name)


def searched(
    cells: Sequence[Cell],
    search: Search,
    folder: Path,
    shared_by: Callable[[Cell, Path], "SharedResources"],
    held_by: Callable[[DataSpec], str],
    progress: Progress,
) -> tuple[list[Cell], dict[str, dict[str, Any]]]:
    """Return the cells with the learning rate and weight decay that were best in the trials, and what was found.

    Each method and loss set is searched by itself, with the first seed; all its seeds use what was best. The first
    trial is the declared default. The evaluation images are not looked at.
    """
    # A finished trial has left its teacher in the folder.
    fresh = [cell for cell in cells if not any((folder / cell.group).glob("*/summary.json"))]
    judge_teachers(fresh, folder, shared_by, progress, held_out)
    best: dict[str, tuple[dict[str, float], float]] = {}
    for cell in cells:
        if cell.group not in best:
            best[cell.group] = _best(cell, search, folder, shared_by, held_by, progress)
    found = [replace(cell, recipe=_tried(cell.recipe, best[cell.group][0])) for cell in cells]
    return found, {group: {**values, "held_out_accuracy": accuracy} for group, (values, accuracy) in best.items()}


def judge_teachers(
    cells: Sequence[Cell],
    folder: Path,
    shared_by: Callable[[Cell, Path], "SharedResources"],
    progress: Progress,
    recipe_of: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> None:
    """Prepare and judge each teacher of these cells once, in this process.

    Raises:
        TrainingError: A teacher is too weak.
    """
    by_teacher: dict[int, tuple[SharedResources, list[Cell]]] = {}
    for cell in cells:
        if cell.with_teacher:
            shared = shared_by(cell, folder)
            by_teacher.setdefault(id(shared), (shared, []))[1].append(cell)
    for shared, taught in by_teacher.values():
        from remap.pipeline.build_cache import prepare_shared_teacher

        prepare_shared_teacher((recipe_of(cell.recipe) for cell in taught), progress, shared)


def _best(
    cell: Cell,
    search: Search,
    folder: Path,
    shared_by: Callable[[Cell, Path], "SharedResources"],
    held_by: Callable[[DataSpec], str],
    progress: Progress,
) -> tuple[dict[str, float], float]:
    from remap.pipeline.nested_runs import open_or_create
    from remap.pipeline.run import run

    study = _study(search, cell.recipe)
    finished = next((folder / cell.group).glob("*/summary.json"), None)
    results: list[tuple[float, dict[str, float]]] = []
    for number in range(search.trials):
        trial = study.ask()
        values = {"learning_rate_factor": trial.suggest_float("learning_rate_factor", *RATES, log=True)}
        # A logarithmic range holds no 0: a cell without weight decay stays without.
        if cell.recipe.train.weight_decay:
            values["weight_decay"] = trial.suggest_float("weight_decay", *DECAYS, log=True)
        one = replace(cell, recipe=held_out(_tried(cell.recipe, values)))
        path = folder / cell.group / f"{number:03d}"
        # Asked again in the same order and told the same answers, the sampler names the same values.
        if not is_done(path, one, held_by):
            if finished is not None:  # by an earlier command
                require_same_images(finished.parent, one, held_by)
            title = f"search {cell.group} {number + 1}/{search.trials}"
            run_dir, shared = open_or_create(path, one.recipe), shared_by(cell, folder)
            run(one.recipe, run_dir, Within(progress, title), shared, resuming=True)
        accuracy = RunDir.open(path).summary()["student"]["accuracy"]
        study.tell(trial, accuracy)
        results.append((accuracy, values))
    accuracy, values = max(results, key=lambda result: result[0])  # of equal ones the first
    return values, accuracy


def _study(search: Search, recipe: Recipe) -> Any:
    try:
        import optuna
    except ImportError:
        do = install_command("search")
        raise RunError("--search needs Optuna, which is not installed", do=do) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study = optuna.create_study(direction="maximize", sampler=kinds[search.sampler](seed=recipe.seed))
    # Into the range of the trials, which a declared value may lie outside of.
    decay = min(max(recipe.train.weight_decay, DECAYS[0]), DECAYS[1])
    study.enqueue_trial({"learning_rate_factor": 1.0, **({"weight_decay": decay} if recipe.train.weight_decay else {})})
    return study


def _tried(recipe: Recipe, values: dict[str, float]) -> Recipe:
    train, factor = recipe.train, values["learning_rate_factor"]
    rate = {"base_lr": recipe.learning_rate(BASE_WIDTH) * factor} if train.lr is None else {"lr": train.lr * factor}
    decay = values.get("weight_decay", train.weight_decay)
    return recipe.model_copy(update={"train": train.model_copy(update={**rate, "weight_decay": decay})})


def held_out(recipe: Recipe) -> Recipe:
    """Return the recipe of a trial, judged by training images that are held out."""
    # On a few held-out images no teacher is clearly above chance; the cells themselves ask on all evaluation images.
    teachers = tuple(spec.model_copy(update={"allow_weak": True}) for spec in recipe.teachers)
    data = recipe.data.model_copy(update={"held_out": HELD_OUT})
    train = recipe.train.model_copy(update={"track": ()})  # the cells are logged, their trials are not
    return recipe.model_copy(update={"data": data, "teachers": teachers, "train": train})
