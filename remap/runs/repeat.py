"""Run a finished run again and compare: the same recipe, seed and images should give the same bits."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from remap import files
from remap.bench import Bench
from remap.data.contents import fingerprint
from remap.engine.launch import accelerator
from remap.errors import DataError, Interrupted, RunError
from remap.outside import absolute, expanded
from remap.progress import Progress, Silent
from remap.recipe import Recipe
from remap.running import run as go_on
from remap.running import start
from remap.runs.compare import shared_teacher
from remap.runs.environment import plain_environment
from remap.runs.rundir import RunDir, next_path
from remap.runs.task import load_task

_TASK = Path("task") / "task.safetensors"
# What of an environment decides the last bits of sums.
_DECIDING = {
    "processes": "another number of processes",
    "threads": "another number of threads",
    "device": "another device",
    "cpu_capability": "another instruction set",
}


def repeat(
    path: Path, output: Path | None = None, workers: int | None = None, progress: Progress = Silent()
) -> dict[str, Any]:
    """Run a finished run's recipe again, in a new run directory; the first one is only read.

    Args:
        output: The run directory to make, by default the next number beside the first; a repeat that was interrupted
            goes on.
        workers: Decoding threads; they change no result.

    Returns:
        run, repeat, equal, checks (what, first, repeat, equal), tensors that differ (name, largest_difference), what
        differs in the environment (what, first, repeat), and changed_on_the_way (first, repeat): what decides the last
        bits and was not the same in all parts of a resumed run. Empty on processes that are not the main one.

    Raises:
        RunError: It is unfinished, damaged or was made by another number of processes.
        DataError: Its images are gone or have changed.
    """
    run = RunDir.open(path)
    _require_whole(run)
    recipe, summary = run.recipe(), run.summary()
    _require_figures(run, summary)
    _require_processes(run, summary["processes"])
    if recipe.train.processes is not None:  # it may have been resumed with another number
        recipe = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"processes": summary["processes"]})}
        )
    if workers is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    target = _target(run, recipe, output)
    bench = Bench(teacher_folder=_prepared_teacher(run))
    _require_same_images(run, recipe, bench, summary["data"]["fingerprint"], progress)
    _say_what_decides(run, progress)
    with progress.wait("comparing the frozen weights with those of the run"):
        load_task(run.path)  # refuses a backbone that is not the run's
    try:
        if not os.path.isfile(target / "recipe.yaml"):
            start(recipe, target, progress, bench)
        elif not RunDir.open(target).is_done:
            go_on(recipe, RunDir.open(target), progress, bench, resuming=True)
    except Interrupted as error:
        command = f"remap repeat {run.path} --output {target}"
        raise Interrupted(
            error.what, exit_code=error.exit_code, do=f"go on with: {command}", at_once=error.at_once
        ) from error
    return compare(run, RunDir.open(target)) if accelerator().is_main_process else {}


def _require_whole(run: RunDir) -> None:
    """Something to compare with."""
    if not run.is_done:
        ended, message = run.became()
        raise RunError(
            f"{run.path} has no result that could be compared: it {ended}",
            given=message,
            do=f"finish it first: remap {'distill' if run.recipe().teacher else 'tune'} --resume {run.path}",
        )


def _require_figures(run: RunDir, summary: dict[str, Any]) -> None:
    """What is compared in the end has to be there before hours of training."""
    try:
        counts = summary["data"]
        for read in (lambda s: int(s["processes"]), lambda s: s["precision"], *_FIGURES.values()):
            read(summary)
        _ = counts["labeled_images"], counts["val_images"]
        history(run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        lacking = isinstance(error, KeyError)
        command = "distill" if run.recipe().teacher else "tune"
        raise RunError(
            f"{run.path} holds no figures of this version of remap",
            given=f"summary.json has no {error}" if lacking else "summary.json holds something else where figures are",
            do=f"run it anew, then repeat that: remap {command} --recipe {run.path / 'recipe.yaml'}",
        ) from error


def _require_processes(run: RunDir, wanted: int) -> None:
    running = accelerator().num_processes
    if running != wanted:
        raise RunError(
            f"{run.path} was made by {wanted} process(es), and a repeat needs as many",
            given=f"{running} process(es)",
            do=f"`remap repeat {run.path}` without a launcher starts as many",
        )


def changed_on_the_way(run: RunDir) -> list[str]:
    """What decides the last bits and was not the same in all parts of a resumed run, in words."""
    record = run.environment()
    parts = [record, *record.get("resumed", [])]
    found = {name: list(dict.fromkeys(str(part[name]) for part in parts if name in part)) for name in _DECIDING}
    return [f"{_DECIDING[name]} ({', then '.join(values)})" for name, values in found.items() if len(values) > 1]


def _say_what_decides(run: RunDir, progress: Progress) -> None:
    """Sums are split over threads and processes, so that their numbers decide the last bits."""
    changed = changed_on_the_way(run)
    if changed:
        progress.say(
            f"{run.path} was resumed with {' and '.join(changed)}, which decides the last bits of sums: a repeat, made"
            " with one of them all along, cannot be expected to be equal bit for bit"
        )
    own, theirs = torch.get_num_threads(), run.environment().get("threads", "?")
    if own != theirs:
        progress.say(f"PyTorch has {own} thread(s) here and had {theirs} in {run.path}: last bits may differ")


def _target(run: RunDir, recipe: Recipe, output: Path | None) -> Path:
    """Where to run; refuses the first run's own folder, and a folder of another run."""
    if output is None:
        path = run.path if run.path.name not in ("", "..") else Path(absolute(run.path))  # `.` has no name
        return next_path(path.parent, f"{path.name}-repeat")
    target = expanded(output)
    if Path(absolute(target)).is_relative_to(absolute(run.path)):
        raise RunError(
            "a repeat does not go into the run that it repeats", given=str(target), do="choose another --output"
        )
    if os.path.isfile(target / "recipe.yaml") and RunDir.open(target).recipe().digest() != recipe.digest():
        raise RunError(f"{target} is a run of another recipe; nothing in it was touched", do="choose another --output")
    return target


def _prepared_teacher(run: RunDir) -> Path | None:
    """That of the run's comparison, if it is there: a repeat makes nothing in the comparison."""
    folder = shared_teacher(run)
    return folder if folder is not None and any(folder.parent.glob(f"{folder.name}*/task/task.json")) else None


def _require_same_images(run: RunDir, recipe: Recipe, bench: Bench, wanted: str, progress: Progress) -> None:
    with run.images():
        data = bench.index(recipe.data)
    found = fingerprint(data, progress, recipe.data.workers)
    if found == wanted:
        return
    counts = run.summary()["data"]
    raise DataError(
        f"the images are not those of {run.path}: names, labels or the content of files have changed",
        given=f"fingerprint {found[:16]}, {len(data.train)} training and {len(data.val)} evaluation images",
        allowed=f"{wanted[:16]}, {counts['labeled_images']} training and {counts['val_images']} evaluation images used",
        do="bring the images back that the run was made with; its recipe.yaml names their place",
    )


def compare(first: RunDir, second: RunDir) -> dict[str, Any]:
    """What is equal in two finished runs, and what is not; see ``repeat``."""
    tensors = differing_tensors(first.path / _TASK, second.path / _TASK)
    before, after = first.summary(), second.summary()
    checks = [_file_check("task file", first.path / _TASK, second.path / _TASK)]
    pair = (first.path, second.path)
    for name in sorted(
        {folder.name for path in pair for folder in path.glob("teacher*") if (folder / _TASK).is_file()}
    ):
        checks.append(_file_check(f"{name} file", *(path / name / _TASK for path in pair)))
    checks.append(_history_check(history(first), history(second)))
    for what, read in _FIGURES.items():
        values = read(before), read(after)
        if values != (None, None):
            checks.append(_check(what, *map(_words, values), equal=values[0] == values[1]))
    return {
        "run": str(first.path),
        "repeat": str(second.path),
        "equal": all(check["equal"] for check in checks),
        "checks": checks,
        "tensors": tensors,
        "environment": differing(_surroundings(first), _surroundings(second)),
        "changed_on_the_way": {"first": changed_on_the_way(first), "repeat": changed_on_the_way(second)},
    }


def history(run: RunDir) -> list[dict[str, Any]]:
    """The epochs of a run without their times."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.metrics()]


# What of a summary has to be equal.
_FIGURES = {
    "accuracy": lambda s: f"{s['student']['accuracy']:.2%} ({s['student']['correct']} correct)",
    "accuracy on the test folder": lambda s: s["student"].get("test_accuracy"),
    "images": lambda s: s["data"]["fingerprint"],
    "backbone": lambda s: s["student"]["backbone_sha256"],
    "frozen weights": lambda s: s.get("frozen"),
    "teacher": lambda s: s.get("teacher"),
    "more teachers": lambda s: s.get("more_teachers"),
    # What a run met on the way: memory that ran out, numbers that were not finite.
    "accumulation": lambda s: s["faults"]["accumulation"],
    "skipped steps": lambda s: s["faults"]["skipped_steps"],
    "learning-rate factor": lambda s: f"{s['faults']['learning_rate_factor']:g}",
}


def _check(what: str, first: str, second: str, *, equal: bool) -> dict[str, Any]:
    return {"what": what, "first": first, "repeat": second, "equal": equal}


def _words(value: Any) -> str:
    """A figure in a few words: hashes by their beginning, records by what names them."""
    if isinstance(value, dict):
        known = [value.get(key) for key in ("sha256", "backbone_sha256", "accuracy")]
        return ", ".join(_words(one) for one in known if one is not None)
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    if isinstance(value, float):
        return f"{value:.2%}"
    return "-" if value is None else value[:16] if isinstance(value, str) and len(value) == 64 else str(value)


def _file_check(what: str, first: Path, second: Path) -> dict[str, Any]:
    contents = [path.read_bytes() if path.is_file() else b"" for path in (first, second)]
    sizes = [files.size(len(content)) if content else "-" for content in contents]
    return _check(what, *sizes, equal=contents[0] == contents[1])


def _history_check(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """The last epoch, or the first one that differs."""
    pairs = list(zip(first, second, strict=False))
    number = next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs) - 1)
    told = [
        f"epoch {number + 1} of {len(rows)}: loss {rows[number].get('loss', float('nan')):.9g}"
        for rows in (first, second)
    ]
    return _check("history", *told, equal=first == second)


def differing_tensors(first: Path, second: Path) -> list[dict[str, Any]]:
    """Tensors of two safetensors files that are not equal, by how much; None where one lacks it or shapes differ."""
    one, other = load(first.read_bytes()), load(second.read_bytes())
    found = []
    for name in sorted(one.keys() | other.keys()):
        if name in one and name in other and one[name].shape == other[name].shape:
            if not torch.equal(one[name], other[name]):
                largest = float((one[name].double() - other[name].double()).abs().max())
                found.append({"name": name, "largest_difference": largest})
        else:
            found.append({"name": name, "largest_difference": None})
    return found


def _surroundings(run: RunDir) -> dict[str, Any]:
    """The environment that a run began in, and what was another one where it went on."""
    summary, record = run.summary(), run.environment()
    first = plain_environment(record)
    legs = {
        f"resumed {number}": {row["what"]: row["repeat"] for row in differing(first, plain_environment(leg))}
        for number, leg in enumerate(record.get("resumed", []), 1)
    }
    return first | legs | {"precision": summary["precision"]}


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, str]]:
    """Entries of two nested records that are not equal, as (what, first, repeat); "-" where there is none."""
    one, other = dict(_flat(first)), dict(_flat(second))
    names = [*one, *(name for name in other if name not in one)]
    pairs = ((name, one.get(name, "-"), other.get(name, "-")) for name in names)
    return [{"what": name, "first": a, "repeat": b} for name, a, b in pairs if a != b]


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
