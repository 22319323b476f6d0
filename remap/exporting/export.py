"""Export a tuned student: write it, check it on images, describe it, and only then let it appear."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remap.backbones.model_folder import require_free
from remap.errors import DiskFull, RunError
from remap.exporting import FORMATS
from remap.exporting.check import Comparison, compare, require_equal
from remap.exporting.format import ExportOptions, Format
from remap.exporting.int8 import quantise, require_gate
from remap.exporting.model_card import model_card
from remap.exporting.task_source import TaskSource
from remap.io import atomic_write
from remap.io.disk_space import FULL, MAKE_ROOM
from remap.io.paths import expanded
from remap.progress import Progress, Silent

# What tells an export from any other folder; it holds what the card says, for programs.
RECORD = "export.json"


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
    chosen, progress = ExportOptions(**options), progress or Silent()
    row = FORMATS.row(to)
    chosen.require_fit(row)
    form: Format = row.load()(row)
    form.require_packages()
    source = TaskSource(run)
    if row.folded:
        source.require_mergeable()
    output = source.path / "export" / to if output is None else expanded(output)
    with _making(output, force) as folder:
        with progress.wait(f"writing {to}"):
            facts = form.write(source, folder, chosen)
        comparison = None
        if (answer := form.open(source, folder, chosen)) is not None:
            with progress.wait("checking the export on images"):
                images = source.images(chosen.images)
                comparison = compare(source, folder, answer, chosen, images, form.file)
            require_equal(comparison, to)
            if chosen.int8 is not None:
                with progress.wait("quantising to 8 bits"):
                    quantise(source, folder / form.file, chosen)
                    answer = form.open(source, folder, chosen) or answer
                    comparison = compare(source, folder, answer, chosen, images, form.file)
                    report = require_gate(source, answer, images, chosen)
                facts = facts | {"int8": {"kind": chosen.int8, **report.to_dict()}}
        record = source.facts | facts | {"format": to, "comparison": comparison and comparison.to_dict()}
        card = model_card(source, row, record, form.usage(source, chosen))
        atomic_write.write_text(folder / "README.md", card)
        atomic_write.write_json(folder / RECORD, record)
    return Exported(output, output / form.file, comparison, record)


@contextmanager
def _making(output: Path, force: bool) -> Iterator[Path]:
    """Let a folder appear complete or not at all: yield the temporary one to fill."""
    earlier = (output / RECORD).is_file() and not output.is_symlink()
    if earlier and not force:
        raise RunError(f"{output} is there already", do="choose another --output, or replace that export with --force")
    if not earlier:
        require_free(output)
    atomic_write.make_folder(output.parent)
    temporary, old = (output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        yield temporary
        if output.is_dir():
            os.replace(output, old)
        os.replace(temporary, output)
    except OSError as error:
        kind, do = (DiskFull, MAKE_ROOM) if error.errno in FULL else (RunError, "choose another --output")
        raise kind(f"cannot write {output}: {error.strerror or error}", do=do) from error
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
