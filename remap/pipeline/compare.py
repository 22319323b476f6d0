"""Compare methods with the same data, teacher, budget and seeds; every cell is a run directory like any other."""

import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remap.errors import Interrupted, RemapError, RunError
from remap.io import atomic_write, links
from remap.pipeline.comparison_budget import read_budget, with_epochs, within_minutes, within_parameters
from remap.pipeline.comparison_cells import DEFAULT_METHODS, Cell, comparison_cells, split_word, teacher_key
from remap.pipeline.comparison_files import write_tables
from remap.pipeline.comparison_folder import TEACHER, claim, fingerprint_of, is_done
from remap.pipeline.comparison_search import FOLDER as SEARCH
from remap.pipeline.comparison_search import Search, require_searchable, searched
from remap.pipeline.comparison_table import tabulate
from remap.pipeline.objective import without_idle_losses
from remap.progress import CELLS, Progress, Silent
from remap.recipe.checks import require_held_out_once
from remap.recipe.schema import Recipe
from remap.recipe.train_checks import require_rate
from remap.runs.run_dir import RunDir

if TYPE_CHECKING:
    from remap.pipeline.shared import SharedResources


@dataclass(frozen=True)
class Plan:
    """What a comparison does besides running each method with and without the teacher.

    Attributes:
        sweeps: ``KEY=V1,V2`` each; see ``comparison_cells``.
        loss_sets: Objectives with the teacher, as words.
        budget: "epochs=N", "minutes=N" of training each, or "parameters=N"; None is the recipe's epochs.
        search: Trials of learning rate and weight decay for each method and loss set: "20" or "random:20".
    """

    sweeps: Sequence[str] = ()
    loss_sets: Sequence[str] = ()
    budget: str | None = None
    search: str | None = None


def compare(
    recipe: Recipe, methods: Sequence[str], seeds: int, output: Path, progress: Progress, plan: Plan = Plan()
) -> dict[str, Any]:
    """Run what is missing and tabulate.

    Args:
        output: Folder of the comparison; finished runs in it are not run again.

    Returns:
        The content of compare.json.

    Raises:
        RunError: The folder holds another comparison, or the recipe is without labels.
        RecipeError: The plan cannot be carried out.
    """
    require_comparable(recipe, methods)
    budget, search = read_budget(plan.budget), Search.read(plan.search)
    if search is not None:
        require_searchable(recipe)
    recipe = without_idle_losses(recipe, progress)
    if budget is not None and budget[0] == "epochs":
        recipe = with_epochs(recipe, int(budget[1]))
    resources = _Resources(recipe, output, progress)
    cells = comparison_cells(recipe, methods, seeds, plan.sweeps, plan.loss_sets, resources.images_of)
    cells = resources.with_possible_inits(cells, optional=tuple(methods) == DEFAULT_METHODS)
    left_out: dict[str, str] = {}
    if budget is not None and budget[0] == "parameters":
        cells, left_out = within_parameters(cells, int(budget[1]), len(resources.first.classes(recipe)))
    claim(output, recipe)
    if budget is not None and budget[0] == "minutes":
        cells = within_minutes(cells, budget[1], output, progress)
    held_by = cache(partial(fingerprint_of, progress=progress))
    found: dict[str, dict[str, Any]] = {}
    with resumable(output):
        if search is not None:
            cells, found = searched(cells, search, output / SEARCH, resources.of, held_by, progress)
        unique = {cell.name: cell for cell in cells}
        missing = [cell for cell in unique.values() if not is_done(output / cell.name, cell, held_by)]
        if missing:
            _run(missing, output, resources, progress)
    # Read from the run directories, also for cells that were run now.
    table = tabulate(recipe, cells, output) | {"budget": plan.budget, "search": found, "left_out": left_out}
    write_tables(table, output)
    return table


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


class _Resources:
    """What the cells share: data and views all of them, teachers those whose recipes prepare them alike."""

    def __init__(self, recipe: Recipe, output: Path, progress: Progress) -> None:
        from remap.pipeline.shared import SharedResources

        self._output, self._progress, self._key = output, progress, teacher_key(recipe)
        self.first = SharedResources()
        self._by_folder: dict[Path, SharedResources] = {}

    def of(self, cell: Cell, folder: Path) -> "SharedResources":
        """Return what a cell shares with others whose teacher lies in the same folder."""
        from remap.distributed.launch import require_one_process
        from remap.pipeline.shared import SharedResources

        # Cells share data and teacher in one process; several would each prepare them.
        require_one_process(
            "a comparison runs its cells one after the other in one process",
            "call remap compare without a launcher; the cells of several folders may run side by side",
        )
        key = teacher_key(cell.recipe) if cell.recipe.teachers and cell.settings else self._key
        path = folder / (TEACHER if key == self._key else f"{TEACHER}{key}")
        if path not in self._by_folder:
            if key != self._key:  # by which a cell that is resumed alone knows its teacher
                atomic_write.make_folder(path)
            data = (self.first.data, self.first.value_ranges, self.first.views)
            self._by_folder[path] = SharedResources(*data, teacher_folder=path)
        return self._by_folder[path]

    def images_of(self, recipe: Recipe) -> tuple[int, int]:
        """Return how many training images have a label, and how many an epoch has."""
        from remap.pipeline.labels_only import images_of

        return images_of(recipe, self.first)

    def with_possible_inits(self, cells: list[Cell], *, optional: bool) -> list[Cell]:
        """Return the cells whose students can start from the teacher's weights as named, before any is trained.

        Args:
            optional: Leave the others out, and say so.

        Raises:
            RemapError: The teacher cannot give a student its weights.
        """
        impossible: set[str] = set()
        for cell in {cell.label: cell for cell in cells if cell.recipe.student.init is not None}.values():
            if (self._output / cell.name / "recipe.yaml").is_file():  # it was possible when it was begun
                continue
            from remap.pipeline.init_student import init_from_teacher
            from remap.runs.task import open_backbone

            try:
                student = open_backbone(cell.recipe.student, len(self.first.classes(cell.recipe)))
                init_from_teacher(student, cell.recipe, self.first, Silent())
            except RemapError as error:
                if not optional:
                    raise
                self._progress.say(f"{cell.label} is left out: {error.what}")
                impossible.add(cell.label)
        return [cell for cell in cells if cell.label not in impossible]


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Say of an interruption how the comparison goes on."""
    try:
        yield
    except Interrupted as error:
        command = f"remap compare ... --output {shlex.quote(str(output))}"
        do = f"resume with the options it was started with: {command}; finished runs are not run again"
        raise Interrupted(error.what, exit_code=error.exit_code, do=do, at_once=error.at_once) from error


def _run(missing: list[Cell], output: Path, resources: _Resources, progress: Progress) -> None:
    # Imported here, so that a finished comparison is shown without loading torch.
    from remap.distributed.device_memory import reset_peak
    from remap.distributed.launch import accelerator
    from remap.pipeline.run import run

    missing = sorted(missing, key=lambda cell: not cell.with_teacher)  # a weak teacher is found before any training
    left = [resources.first.training_steps(cell.recipe) for cell in missing]
    with progress.wait(CELLS, len(missing)) as cells:
        cells.advance(0, **{cell.name: math.nan for cell in missing})
        for number, cell in enumerate(missing, 1):
            path = output / cell.name
            progress.say(f"[{number}/{len(missing)}] {cell.name}")
            links.require_no_link(path)
            shared = resources.of(cell, output)
            # An interrupted cell continues from its checkpoint.
            resuming = (path / "recipe.yaml").is_file()
            run_dir = RunDir.open(path) if resuming else RunDir.create(path, cell.recipe)
            reset_peak(accelerator().device)
            after = sum(left[number:])
            found = run(cell.recipe, run_dir, progress, shared, resuming=resuming, steps_after=after)
            cells.advance(1, **{cell.name: found.summary["student"]["accuracy"]})
