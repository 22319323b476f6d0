"""What the cells of a comparison share: data, views, teachers and their outputs, and how many cells run at once."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remap.errors import BackboneError, RecipeError, RemapError
from remap.io import atomic_write
from remap.pipeline.comparison_cells import Cell, teacher_key
from remap.pipeline.comparison_folder import TEACHER
from remap.progress import Progress, Silent
from remap.recipe.schema import Recipe
from remap.tuning import rows_of

if TYPE_CHECKING:
    from remap.backbones.anatomy import Anatomy
    from remap.pipeline.shared import SharedResources

AUTO = "auto"


def read_jobs(jobs: str, budget: tuple[str, float] | None) -> str:
    """Return how many cells are to run at once, checked: a number, or "auto"; 1 where each cell is given minutes.

    Raises:
        RecipeError: It is neither, or cells that share the machine would be given minutes.
    """
    if jobs != AUTO and not (jobs.isdecimal() and int(jobs) > 0):
        raise RecipeError([f"--jobs {jobs}: how many cells run at once (allowed: auto, or 1 and more)"], "command line")
    if budget is None or budget[0] != "minutes":
        return jobs
    # The epochs are measured with the machine free; cells side by side would take longer than their minutes.
    if jobs not in (AUTO, "1"):
        raise RecipeError(["--jobs: a cell that is given minutes has the machine to itself (--jobs 1)"], "command line")
    return "1"


def read_slurm(words: str) -> dict[str, Any]:
    """Read the words of --slurm, "KEY=VALUE,..."; whole numbers become numbers.

    Raises:
        RecipeError: A word is without "=".
    """
    pairs = [word.partition("=") for word in words.split(",")]
    for key, sign, _ in pairs:
        if not sign:
            raise RecipeError([f"--slurm: '{key}' has no value (write slurm_partition=NAME,...)"], "command line")
    return {key.strip(): int(value) if value.isdecimal() else value for key, _, value in pairs}


class Resources:
    """What the cells share: data and views all of them, teachers those whose recipes prepare them alike.

    Args:
        outputs: Where outputs of teachers are looked for and put by their key; None is a table of this object.
    """

    def __init__(
        self, recipe: Recipe, output: Path, progress: Progress, outputs: dict[tuple, Any] | None = None
    ) -> None:
        from remap.pipeline.shared import SharedResources

        self._outputs = {} if outputs is None else outputs

        self.recipe, self._output, self._progress, self._key = recipe, output, progress, teacher_key(recipe)
        self.first = SharedResources()
        self._by_folder: dict[Path, SharedResources] = {}

    def of(self, cell: Cell, folder: Path) -> "SharedResources":
        """Return what a cell shares with others whose teacher lies in the same folder."""
        from remap.pipeline.shared import SharedResources

        key = teacher_key(cell.recipe) if cell.recipe.teachers and cell.settings else self._key
        path = folder / (TEACHER if key == self._key else f"{TEACHER}{key}")
        if path not in self._by_folder:
            if key != self._key:  # by which a cell that is resumed alone knows its teacher
                atomic_write.make_folder(path)
            # The same tables for all: no folder is listed and no image is decoded twice.
            data = (self.first.data, self.first.value_ranges, self.first.views)
            self._by_folder[path] = SharedResources(*data, targets=self._outputs, teacher_folder=path)
        return self._by_folder[path]

    def images_of(self, recipe: Recipe) -> tuple[int, int]:
        """Return how many training images have a label, and how many an epoch has."""
        from remap.pipeline.labels_only import images_of

        return images_of(recipe, self.first)

    def _begun(self, cell: Cell) -> bool:
        return os.path.isfile(self._output / cell.name / "recipe.yaml")  # False also for names that no folder can have

    def with_possible_inits(self, cells: list[Cell], *, optional: bool) -> list[Cell]:
        """Return the cells whose students can start from the teacher's weights as named, before any is trained.

        Args:
            optional: Leave the others out, and say so.

        Raises:
            RemapError: The teacher cannot give a student its weights.
        """
        impossible: set[str] = set()
        # One cell of each label: whether the weights fit depends on neither objective nor seed.
        for cell in {cell.label: cell for cell in cells if cell.recipe.student.init is not None}.values():
            if self._begun(cell):  # it was possible when it was begun
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

    def with_fitting_methods(self, cells: list[Cell]) -> tuple[list[Cell], dict[str, str]]:
        """Return the cells whose methods fit their students, before any is trained; and by label why others do not.

        Raises:
            RecipeError: None fits.
        """
        left_out: dict[str, str] = {}
        students: dict[str, Anatomy] = {}
        for cell in {cell.label: cell for cell in cells}.values():
            spec = cell.recipe.student
            # One that was begun fits; one that is cut from the teacher is known once that is prepared.
            if spec.shrink is not None or self._begun(cell):
                continue
            from remap.runs.task import open_backbone
            from remap.tuning.attaching import require_fit

            spec = spec.model_copy(update={"init": None, "force_init": False})
            if repr(spec) not in students:
                students[repr(spec)] = open_backbone(spec, len(self.first.classes(cell.recipe))).anatomy
            try:
                for row in rows_of(cell.recipe.method.name):
                    require_fit(row, students[repr(spec)])
            except BackboneError as error:
                left_out[cell.label] = error.what + (f": {error.given}" if error.given else "")
                self._progress.say(f"{cell.label} is left out: {left_out[cell.label]}")
        fitting = [cell for cell in cells if cell.label not in left_out]
        if not fitting:
            raise RecipeError(list(left_out.values()), "command line", do="name other methods: --methods")
        return fitting, left_out
