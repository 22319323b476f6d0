"""``remap repeat``: run a run again and compare."""

import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from remap.io.checked_json import read_json
from remap.io.paths import expanded
from remap_cli import console, launch
from remap_cli import options as opt

# How many differing tensors and packages are listed; --json has them all.
SHOWN = 8
# Exit code of a repeat that ran and is not equal; 1 is a bug, 2 a mistake, 3 a lost process.
DIFFERS = 4
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Checks that say why others may differ.
MEMORY, SKIPPED = "accumulation", ("skipped steps", "learning-rate factor")


def repeat(
    run: Annotated[Path, typer.Argument(help="A finished run directory.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Run directory to make.", show_default="RUN-repeat-001")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads; they change no result.", show_default="the run's own")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Run a finished run's recipe again and compare, bit for bit.

    Starts as many processes as the run had.

    Exit code 0: equal. 2: it could not be repeated. 4: it ran, and something differs.
    """
    opt.require_there(run)
    if not launch.has_launcher():
        _take_threads_of(expanded(run))
    processes = _processes(expanded(run))
    start = f"torchrun --nproc-per-node {processes} -m remap_cli repeat {shlex.quote(str(run))}"
    launch.require_few(processes, run, do=f"start them yourself: {start}")
    launch.start_processes(processes)
    from remap.pipeline.repeat import repeat as run_again

    with console.Reporter(quiet=not launch.is_first()) as progress:
        found = run_again(run, output, workers, progress)
    if not launch.is_first():
        return
    console.emit(found) if as_json else _show(found)
    if not found["equal"]:
        raise typer.Exit(DIFFERS)


def _recorded(file: Path, key: str) -> Any:
    """Return one entry of a run's record, or None; errors in it are left to its reader."""
    try:
        return read_json(file)[key]
    except (ValueError, KeyError, TypeError):
        return None


def _processes(run: Path) -> int | None:
    found = _recorded(run / "summary.json", "processes")
    return found if isinstance(found, int) and found > 0 else None


def _take_threads_of(run: Path) -> None:
    """Set the run's numbers of threads, which decide the order of sums; libraries read them when they are loaded."""
    variables = _recorded(run / "environment.json", "variables")
    if not isinstance(variables, dict):
        return
    for name in THREADS:
        wanted = variables.get(name)
        if wanted == os.environ.get(name):
            continue
        if wanted is None:
            del os.environ[name]
            console.note(f"{name} is unset, as in {run}")
        elif isinstance(wanted, str) and re.fullmatch("[0-9]{1,5}", wanted) and int(wanted) <= launch.most_unasked():
            os.environ[name] = wanted
            console.note(f"{name}={wanted}, as in {run}")


def _show(found: dict[str, Any]) -> None:
    rows = [[c["what"], c["first"], c["repeat"], "equal" if c["equal"] else "differs"] for c in found["checks"]]
    console.table(f"{found['run']}, repeated in {found['repeat']}", ["", "first", "repeat", ""], rows, wrap=(1, 2))
    tensors = [[row["name"], _largest(row["largest_difference"])] for row in found["tensors"]]
    environment = [[row["what"], row["first"], row["repeat"]] for row in found["environment"]]
    for title, columns, rows in (
        ("tensors that differ", ["tensor", "largest difference"], tensors),
        ("environment", ["", "first", "repeat"], environment),
    ):
        more = f" ({len(rows) - SHOWN} more: --json)" if len(rows) > SHOWN else ""
        if rows:
            console.table(title + more, columns, rows[:SHOWN], wrap=(0, 1, 2))
    console.line(sentence(found))


def sentence(found: dict[str, Any]) -> str:
    """Return whether it repeated, and possible reasons if not."""
    where = "the environment is the same" if not found["environment"] else "the environment differs"
    if found["equal"]:
        return f"It repeated bit for bit; {where}."
    wrong = [check["what"] for check in found["checks"] if not check["equal"]]
    sizes = [t["largest_difference"] for t in found["tensors"] if t["largest_difference"] is not None]
    by = f" (weights by at most {max(sizes):.2g})" if sizes else ""
    why = ["memory ran out, and one of the runs took its steps in more parts"] if MEMORY in wrong else []
    why += ["numbers that were not finite made them skip other steps"] if any(n in wrong for n in SKIPPED) else []
    for which, name in (("first", "the first run"), ("repeat", "the repeat")):
        changed = found["changed_on_the_way"][which]
        why += [f"{name} was resumed with {' and '.join(changed)}, which decides last bits"] if changed else []
        read = found["outputs_on_disk"][which]
        last = "on disk, with the last bits of the machine that computed them"
        why += [f"{name} read outputs of {' and '.join(read)} {last}"] if read else []
    return (
        f"It did not repeat bit for bit: {', '.join(wrong)} {'differs' if len(wrong) == 1 else 'differ'}{by}; "
        f"{'; '.join([*why, where])}."
    )


def _largest(value: float | None) -> str:
    return "other shape, or missing" if value is None else f"{value:.3g}"
