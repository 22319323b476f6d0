"""Export a tuned student: write it, check it on images, describe it, and only then let it appear."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from remap.backbones.model_folder import require_free
from remap.errors import DiskFull, RunError, naming
from remap.exporting import FORMATS
from remap.exporting.check import Comparison, bytes_below, bytes_of, compare, require_equal, student_answer
from remap.exporting.format import ExportOptions, Format
from remap.exporting.int8 import quantise, require_gate, require_labels
from remap.exporting.model_card import SCRIPT, model_card
from remap.exporting.task_source import TaskSource
from remap.io import atomic_write
from remap.io.checked_json import read_run_json
from remap.io.disk_space import FULL, MAKE_ROOM
from remap.io.links import files_below
from remap.io.names import plain
from remap.io.paths import expanded
from remap.progress import Progress, Silent

# What tells an export from any other folder; it holds what the card says, for programs.
RECORD, CARD = "export.json", "README.md"


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        output: Its folder.
        file: What other programs load: a file in it, or the folder.
        comparison: None where nothing here can run it.
        record: What ``export.json`` holds.
    """

    output: Path
    file: Path
    comparison: Comparison | None
    record: dict[str, Any]


def export_student(
    run: str | Path,
    to: str,
    output: str | Path | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Exported:
    """Export the student of a run directory (or of a copy of its task folder).

    Args:
        run: The run directory or task folder.
        to: A format, see ``remap export --help``.
        output: The folder to make; None is ``export/FORMAT`` in the run.
        force: Replace an earlier export of that name; nothing else is ever replaced.
        options: The fields of ``ExportOptions``.

    Raises:
        RemapError: The format does not fit the method, a package is missing, the output is there already, or the
            export does not answer as the student does; nothing is left then.
    """
    chosen, progress = ExportOptions.of(options), progress or Silent()
    row = FORMATS.row(to)
    chosen.require_fit(row)
    form: Format = row.load()(row)
    form.require_packages()
    source = TaskSource(run)
    if chosen.int8 is not None:
        source.tuned.require_one_class("--int8, which is judged by the accuracy of each class,")
        source.require_images()
    if row.folded:
        source.require_mergeable()
    output = source.path / "export" / to if output is None else expanded(output)
    with making(output, force) as folder:
        with progress.wait(f"writing {to}"):
            facts = form.write(source, folder, chosen)
        comparison = None
        if (answer := form.open(source, folder, chosen)) is not None:
            with progress.wait("checking the export on images"):
                images, student = source.images(chosen.images), student_answer(source, chosen)
                if chosen.int8 is not None:
                    require_labels(images)  # before hours of rounding
                size = bytes_of(source.tuned.model)
                comparison = compare(
                    student, answer, images, (size, bytes_below(folder / form.file)), source.cut(chosen.softmax)
                )
            require_equal(comparison, to)
            if chosen.int8 is not None:
                quantise(source, folder / form.file, chosen, progress)
                with progress.wait("checking the int8 file on images"):
                    answer = form.open(source, folder, chosen) or answer
                    comparison = compare(student, answer, images, (size, bytes_below(folder / form.file)))
                    report = require_gate(source, answer, images, chosen)
                facts = facts | {"int8": {"kind": chosen.int8, **report.to_dict()}}
        usage = form.usage(source, chosen)
        if usage:
            atomic_write.write_text(folder / SCRIPT, usage)
        files = sorted(file.relative_to(folder).as_posix() for file in files_below(folder))
        record = source.facts | facts | {"format": to, "comparison": comparison and comparison.to_dict()}
        record["files"] = sorted({*files, CARD, RECORD})
        card = model_card(source, row, record, usage)
        atomic_write.write_text(folder / CARD, card)
        atomic_write.write_json(folder / RECORD, record)
    return Exported(output, output / form.file, comparison, record)


@contextmanager
def making(output: Path, force: bool) -> Iterator[Path]:
    """Let a folder appear complete or not at all: yield the temporary one to fill; an empty one may be there."""
    _put_back(output)
    earlier = (output / RECORD).is_file() and not output.is_symlink()
    if earlier and not force:
        raise RunError(f"{output} is there already", do="choose another --output, or replace that export with --force")
    if earlier:
        _require_own(output)
    elif force and os.path.lexists(output) and not atomic_write.is_empty(output):
        raise RunError(
            f"{output} is there already", given="--force replaces exports alone", do="choose another --output"
        )
    else:
        require_free(output)
    atomic_write.make_folder(output.parent)
    try:
        with _replacing(output) if earlier else atomic_write.new_folder(output, last=RECORD) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        known = error if isinstance(error, OSError) else OSError()
        kind, do = (DiskFull, MAKE_ROOM) if known.errno in FULL else (RunError, "choose another --output")
        raise kind(f"cannot write {output}: {known.strerror or error}", do=do) from error


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Yield the path of a folder to fill, which takes the place of an earlier export at the end."""
    place = Path(os.path.abspath(output))  # "." has no name
    temporary, old = (place.with_name(f".{place.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        with naming(output, temporary):
            yield temporary
        _require_own(output)  # again: making an export may take an hour
        os.replace(place, old)
        try:
            os.replace(temporary, place)
        except BaseException:
            os.replace(old, place)
            raise
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _put_back(output: Path) -> None:
    """Finish what a process that was killed while it replaced an export left: the earlier one goes back, or goes.

    What a process that runs is replacing stays as it is.
    """
    place = Path(os.path.abspath(output))
    for end in ("old", "tmp"):
        for left in sorted(place.parent.glob(f".{glob.escape(place.name)}.*.{end}")):
            writer = left.name.removeprefix(f".{place.name}.").removesuffix(f".{end}")
            if not writer.isdecimal() or left.is_symlink() or _runs(int(writer)):
                continue
            if end == "old" and not os.path.lexists(place):
                os.rename(left, place)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _require_own(output: Path) -> None:
    """Refuse to replace an export in which there are other files than it was written with.

    Raises:
        RunError: Names some of them.
    """
    record = read_run_json(output / RECORD)
    written = {*map(str, record.get("files") or [])} if isinstance(record, dict) else set()
    others = sorted({file.relative_to(output).as_posix() for file in files_below(output)} - written)
    if others:
        raise RunError(
            f"{output} holds files that the export did not write",
            given=plain(", ".join(others[:5]) + (", ..." if len(others) > 5 else "")),
            do="move them away, or choose another --output",
        )
