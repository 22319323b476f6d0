"""The folder of a comparison: which recipe it is of, which of its runs are done, and the teacher they share."""

import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remap.data.fingerprint import fingerprint
from remap.errors import RemapError, RunError
from remap.io import atomic_write
from remap.io.checked_read import read_regular
from remap.io.links import require_no_link
from remap.io.names import plain
from remap.io.paths import absolute
from remap.pipeline.comparison_cells import ALONE, Cell, teacher_key
from remap.progress import Progress
from remap.recipe import dump, load_finished
from remap.recipe.in_words import losses_in_words
from remap.recipe.schema import DataSpec, MethodSpec, Recipe
from remap.runs.environment import command
from remap.runs.run_dir import RunDir
from remap.runs.run_records import JUDGED

# The file that names the recipe of a comparison, and the folders of the teacher that its runs share, and of trials.
MARKER, TEACHER, SEARCH = "compare-of.txt", "teacher", "search"
# What a recommendation writes at its end, into a folder that is otherwise that of a comparison.
RECOMMENDATION = "recommend.json"
# The command that was given last: it resumes the comparison. And the recipe, to name what another one differs in.
COMMAND, RECIPE = "command.txt", "compare-recipe.yaml"
# What is not done again for another recipe: finished runs and trials, and a teacher that is being tuned.
_BEGUN = (
    *("*/summary.json", f"{SEARCH}/*/summary.json", f"{SEARCH}/*/*/summary.json", "round-*/*/summary.json"),
    *(f"{TEACHER}*/recipe.yaml", f"{SEARCH}/{TEACHER}*/recipe.yaml"),
)
MOST_MARKER_BYTES, MOST_COMMAND_BYTES = 1000, 100_000
# Fields in which the cells of one comparison differ.
_OF_CELLS = (
    "name",
    "seed",
    "baseline",
    "method",
    "losses",
    "train.lr",
    "train.base_lr",
    "student.init",
    "student.force",
)


def shared_teacher(run: RunDir) -> Path | None:
    """Return where the teacher of a run's comparison is stored, or will be; None for a run that is not part of one.

    Repeats next to the runs of a comparison have their names and a suffix, and learn from the same teacher.
    """
    recipe, place = run.recipe(), Path(absolute(run.path))
    # No digit may follow: a run of seed 10 is not one of seed 1.
    is_part = place.name.startswith(recipe.method.name) and re.search(rf"-s{recipe.seed}(?!\d)", place.name)
    if not is_part or not (place.parent / MARKER).is_file():
        return None
    own = place.parent / f"{TEACHER}{teacher_key(recipe)}"
    return own if own.is_dir() else place.parent / TEACHER


def require_folder(output: Path) -> None:
    """Refuse what cannot be, or become, the folder of a comparison; whose it is shows later (``claim``).

    Raises:
        RunError: It is a run, or it or a path above it is a file.
    """
    if os.path.isfile(output / "recipe.yaml"):
        raise RunError(f"{output} is a run directory; nothing in it was touched", do="name another --output")
    there = next((path for path in (output, *output.parents) if os.path.lexists(path)), None)
    if there is not None and not os.path.isdir(there):
        given = "it is not a folder" if there == output else f"{there} is not a folder"
        raise RunError(f"{output} cannot be the folder of a comparison", given=given, do="name another --output")


def claim(output: Path, recipe: Recipe) -> None:
    """Claim the folder for one recipe, apart from method and number of seeds, once one of its runs is finished.

    Raises:
        RunError: It is a run, or holds other runs, or those of a recipe that differs elsewhere; all differences are
            named.
    """
    require_folder(output)
    atomic_write.make_folder(output)
    marker = output / MARKER
    # Always with the same method, so that methods can be added to a comparison.
    common = recipe.model_copy(update={"method": MethodSpec(name="linear")})
    digest = common.digest(places=False)
    if not os.path.lexists(marker) and (other := next(output.glob("*/recipe.yaml"), None)):
        raise RunError(
            f"{output} holds runs that are not part of a comparison; nothing in it was touched",
            given=str(other.parent),
            do="name another --output",
        )
    # lexists: a marker that is a broken link is not of this recipe, and is refused too.
    if os.path.lexists(marker) and (then := _recipe_in(marker)) != digest:
        # A folder whose first run failed may be claimed anew.
        if any(path for inside in _BEGUN for path in output.glob(inside)):
            cells = sorted(path.parent for path in output.glob("*/summary.json"))
            raise RunError(
                f"{output} holds a comparison of another recipe; nothing in it was touched",
                given=_differences(output, common, [path for path in cells if not path.name.startswith(TEACHER)]),
                do=f"name another --output, or repeat the options it was started with: {command_of(output)}",
            )
        if then:
            _remove_teachers(output)
    atomic_write.write_text(output / RECIPE, dump(common.model_copy(update={"data": common.data.written_out()})))
    atomic_write.write_text(marker, digest + "\n")
    atomic_write.write_bytes(output / COMMAND, f"{shlex.join(command())}\n".encode(errors="surrogateescape"))


def command_of(output: Path) -> str:
    """Return the command that made a comparison, as its folder has it."""
    try:
        return plain(read_regular(output / COMMAND, MOST_COMMAND_BYTES).decode(errors="replace").strip())
    except OSError:  # of an earlier version
        return f"remap compare ... --output {shlex.quote(plain(str(output)))}"


def _remove_teachers(output: Path) -> None:
    """Remove teachers that were prepared and judged for another recipe: they would teach this one."""
    for folder in (*output.glob(f"{TEACHER}*"), *output.glob(f"{SEARCH}/{TEACHER}*")):
        if not any((folder / name).exists() for name in ("task", JUDGED)):  # a folder of the user's
            continue
        for path in (folder, *folder.parents[: len(folder.relative_to(output).parts) - 1]):
            require_no_link(path)
        try:
            shutil.rmtree(folder)
        except OSError as error:
            do = "remove it, or name another --output"
            raise RunError(f"cannot remove {folder}: {error.strerror}", do=do) from error


def _differences(output: Path, recipe: Recipe, runs: Sequence[Path]) -> str | None:
    """Return the fields that differ from those of a comparison.

    Args:
        recipe: With the method that stands for all of them.
        runs: Finished cells of a folder of an earlier version, which has no recipe of its own.
    """
    of_cells: tuple[str, ...] = ()
    try:
        made = load_finished(output / RECIPE)  # no method of it is run
    except RemapError:
        taught = [path for path in runs if f"-{ALONE}-" not in path.name]  # says most
        try:
            made = RunDir((taught or [*runs])[0]).recipe()
        except (IndexError, RemapError):
            return None
        of_cells = _OF_CELLS if made.teachers else (*_OF_CELLS, "teacher")
    now, then = map(_values, (recipe, made))
    differing = [key for key in sorted({*now, *then}) if now.get(key) != then.get(key) and not key.startswith(of_cells)]
    return plain("; ".join(f"{key}: {now.get(key)} now, {then.get(key)} then" for key in differing)) or None


def _values(recipe: Recipe) -> dict[str, Any]:
    """Return the fields as they are compared and shown; a rate that is the method's own is none."""
    values = _flat(recipe.written_out().model_dump(mode="json")) | {"train.base_lr": recipe.train.base_lr}
    values["data.depth"] = values["data.depth"] or 1  # null means 1
    return values | {"losses": losses_in_words(recipe.losses) or "none"}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, one in value.items() for k, v in _flat(one, f"{key}.{name}" if key else name).items()}


def _recipe_in(marker: Path) -> str:
    """Return the recipe digest in a marker; empty for what is not a marker."""
    try:
        return read_regular(marker, MOST_MARKER_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def is_done(path: Path, cell: Cell, held_by: Callable[[DataSpec], str]) -> bool:
    """Return whether a cell has its result; where its images have moved, they have to be the same ones.

    Args:
        held_by: Returns the fingerprint of the images at the paths that a recipe names.
    """
    if not (path / "recipe.yaml").is_file():
        return False
    run_dir = RunDir.open(path)
    made = run_dir.recipe()
    # Without paths: images may have been moved since.
    if made.digest(places=False) != cell.recipe.digest(places=False):
        raise RunError(
            f"{path} was made with other settings; nothing in it was touched",
            do="name another --output, or remove that folder",
        )
    if not run_dir.is_complete:
        if made.digest() != cell.recipe.digest():
            raise RunError(
                f"{path} was begun with images at another path; nothing in it was touched",
                given=f"{_places(cell.recipe)} now, {_places(made)} then",
                do=f"if they have moved, write the new place into {path / 'recipe.yaml'} (source, val_source and"
                " unlabeled, under data); else name another --output",
            )
        return False
    summary = run_dir.summary()
    # The digest with paths differs where images moved; then their content decides.
    moved = summary.get("digest") != cell.recipe.digest()
    if moved and summary["data"].get("fingerprint") != held_by(cell.recipe.data):
        raise RunError(
            f"{path} was made with other images; nothing in it was touched",
            given=f"{_places(cell.recipe)} now, {_places(made)} then",
            do="name another --output, or the images that it was made with",
        )
    return True


def require_same_images(path: Path, cell: Cell, held_by: Callable[[DataSpec], str]) -> None:
    """Refuse to train beside a finished run whose images have changed since.

    Args:
        cell: A cell on the images of that run.
        held_by: As for ``is_done``.

    Raises:
        RunError: They are others now.
    """
    then = RunDir.open(path).summary()["data"].get("fingerprint")
    if then is not None and then != held_by(cell.recipe.data):
        raise RunError(
            f"the images have changed since {path} was trained on them; nothing was trained now",
            given=_places(cell.recipe),
            do="name another --output for the images as they are now, or bring back those of that run",
        )


def _places(recipe: Recipe) -> str:
    data = recipe.written_out().data
    places = (data.source, data.val_source, data.unlabeled, data.target)
    return " and ".join(place for place in places if place is not None)


def fingerprint_of(data: DataSpec, progress: Progress) -> str:
    """Return the fingerprint of the images that a recipe names."""
    from remap.pipeline.shared import SharedResources

    return fingerprint(SharedResources().index(data), progress, data.workers)
