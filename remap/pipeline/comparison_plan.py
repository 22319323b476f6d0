"""What a comparison is to do, and what shows that it cannot be done before PyTorch and the images are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remap.distributed import launcher_env
from remap.errors import RecipeError, RunError
from remap.pipeline.comparison_budget import read_budget, with_epochs
from remap.pipeline.comparison_cells import DEFAULT_METHODS, comparison_cells, split_word
from remap.pipeline.comparison_folder import require_folder
from remap.pipeline.comparison_resources import read_jobs, read_slurm
from remap.pipeline.comparison_search import Search, require_searchable
from remap.pipeline.comparison_sweeps import read_sweeps
from remap.recipe.checks import require_held_out_once
from remap.recipe.schema import Recipe
from remap.recipe.train_checks import require_no_processes, require_rate

# What `remap recommend` ranks if no methods are named: those of a comparison, on the student's own weights.
RANKED = tuple(word for word in DEFAULT_METHODS if split_word(word)[1] is None)


@dataclass(frozen=True)
class Plan:
    """What a comparison does besides running each method with and without the teacher.

    Attributes:
        sweeps: ``KEY=V1,V2`` each; see ``comparison_cells``.
        loss_sets: Objectives with the teacher, as words.
        budget: "epochs=N", "minutes=N" of training each, or "parameters=N"; None is the recipe's epochs.
        search: Trials of learning rate and weight decay for each method and loss set: "20" or "random:20".
        jobs: How many cells run at once: a number, or "auto" by cores, GPUs and memory.
        slurm: Parameters of submitit, to run the cells as a SLURM job array; None runs them on this machine.
    """

    sweeps: Sequence[str] = ()
    loss_sets: Sequence[str] = ()
    budget: str | None = None
    search: str | None = None
    jobs: str = "1"
    slurm: str | None = None


def require_no_launcher() -> None:
    """Refuse several processes: cells share data and teacher in one, and several would each prepare them.

    Raises:
        RunError: A launcher has started several.
    """
    if (count := launcher_env.number("WORLD_SIZE", 1)) > 1:
        raise RunError(
            "a comparison runs its cells one after the other in one process",
            given=f"{count} processes",
            do="call remap compare without a launcher; --jobs runs cells side by side, --slurm on many machines",
        )


def require_possible(recipe: Recipe, methods: Sequence[str], seeds: int, output: Path, plan: Plan) -> None:
    """Refuse what the options, the recipe and the folder show to be impossible. No images are looked at.

    Raises:
        RunError: The folder cannot be one of a comparison, or the recipe cannot be compared.
        RecipeError: The plan cannot be carried out.
    """
    require_folder(output)
    require_no_launcher()
    require_no_processes(recipe, "remap compare")
    require_comparable(recipe, methods)
    if seeds < 1:
        raise RecipeError([f"seeds: {seeds} runs of each cell leave nothing to compare (one or more)"], recipe.name)
    budget = read_budget(plan.budget)
    read_jobs(plan.jobs, budget)
    if budget is not None and budget[0] == "minutes" and "train.epochs" in read_sweeps(plan.sweeps):
        raise RecipeError([f"--sweep train.epochs: the epochs follow from the budget {plan.budget}"], "command line")
    if plan.slurm is not None:
        read_slurm(plan.slurm)
    if Search.read(plan.search) is not None:
        require_searchable(recipe)
    if budget is not None and budget[0] == "epochs":
        recipe = with_epochs(recipe, int(budget[1]))
    comparison_cells(recipe, methods, seeds, plan.sweeps, plan.loss_sets)


def require_rankable(recipe: Recipe, methods: Sequence[str], output: Path, budget: str | None) -> None:
    """Do what ``require_possible`` does, for methods that are ranked by short runs.

    Raises:
        RunError: The folder cannot be one of trials, or the recipe cannot be compared.
        RecipeError: There is one method alone, or more than one class an image, or another part of the images is held
            out, or the budget is another one.
    """
    require_folder(output)
    if recipe.data.multilabel:
        raise RecipeError(
            ["task: multilabel: methods are ranked for one class an image (remap compare takes it)"], recipe.name
        )
    require_no_processes(recipe, "remap recommend")
    require_comparable(recipe, methods)
    require_searchable(recipe, "remap recommend")
    kind, value = read_budget(budget) or ("", 0.0)
    if kind == "minutes":
        line = f"--budget {budget}: not a budget of this command (write epochs=N or parameters=N)"
        raise RecipeError([line], "command line")
    if len(set(methods)) < 2:
        line = f"--methods {','.join(methods)}: one method has no other to be ranked with"
        raise RecipeError([line], "command line", do="name two or more, or train it: remap distill")
    comparison_cells(with_epochs(recipe, int(value)) if kind == "epochs" else recipe, methods, 1)


def require_comparable(recipe: Recipe, methods: Sequence[str]) -> None:
    """Refuse recipes whose methods cannot be held against each other.

    Raises:
        RunError: They learn no classes, choose their losses, or have a student or teacher that not all can have.
    """
    if recipe.label_free:
        raise RunError(
            "a comparison is with students that learn from labels alone, and these losses teach no classes",
            given=", ".join(loss.name for loss in recipe.losses),
            do="add a loss on labels or logits (ce, kd), or run each method by `remap distill`",
        )
    if recipe.data.source is None:
        raise RunError(
            "a comparison is with students that learn from labels alone, and there are no labelled images",
            do="name some: --data FOLDER, or run each method by `remap distill`",
        )
    if recipe.choose_losses:
        raise RunError(
            "a comparison is of one objective, and losses: auto chooses one for each run",
            do="name the losses: --losses ce,kd",
        )
    joint = any(spec.joint for spec in recipe.teachers)
    if joint and {split_word(word)[0] for word in methods} != {"slad"}:
        raise RunError(
            "a joint teacher shares adapters with slad alone",
            given=f"teacher.joint=true, methods {', '.join(methods)}",
            do="compare slad (--methods slad), or leave teacher.joint out",
        )
    require_held_out_once(recipe)
    require_rate(recipe)
    if recipe.student.shrink is not None:
        raise RunError(
            "a comparison needs a student that exists without the teacher",
            given=recipe.student.model,
            do="cut it once with `remap shrink`, then name its folder: --student local-dir:FOLDER",
        )
