"""What is equal in two finished runs and what differs, bit for bit, and possible reasons."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from remap.io import human_size
from remap.runs.environment import plain_environment
from remap.runs.run_dir import RunDir
from remap.runs.summary_schema import metric_of

_TASK = Path("task") / "task.safetensors"
# Entries of an environment that decide the last bits of sums.
_DECIDING = {
    "processes": "a different number of processes",
    "threads": "a different number of threads",
    "device": "a different device",
    "cpu_capability": "a different instruction set",
}


def compare(first: RunDir, second: RunDir) -> dict[str, Any]:
    """Return what is equal in two finished runs and what differs; see ``repeat``."""
    # Files may differ in metadata alone; tensors say by how much results differ.
    tensors = differing_tensors(first.path / _TASK, second.path / _TASK)
    before, after = first.summary(), second.summary()
    checks = [_file_check("task file", first.path / _TASK, second.path / _TASK)]
    pair = (first.path, second.path)
    for name in sorted(
        # Of both: a teacher that one of the runs lacks is a difference.
        {folder.name for path in pair for folder in path.glob("teacher*") if (folder / _TASK).is_file()}
    ):
        checks.append(_file_check(f"{name} file", *(path / name / _TASK for path in pair)))
    # The first number that differs tells where two runs parted.
    checks.append(_history_check(history(first), history(second)))
    for name, read in FIGURES.items():
        what, values = name.replace("accuracy", metric_of(before)), (read(before), read(after))
        # Not every run has every figure: no test images, no teacher.
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
        "outputs_on_disk": {"first": outputs_on_disk(before), "repeat": outputs_on_disk(after)},
    }


def history(run: RunDir) -> list[dict[str, Any]]:
    """Return the epochs of a run without their times."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in run.metrics()]


# Entries of a summary that have to be equal.
FIGURES = {
    "accuracy": lambda s: _accuracy(s["student"]),
    "accuracy on the test images": lambda s: s["student"].get("test_accuracy"),
    "accuracy by labels alone": lambda s: _accuracy(s["baseline"]) if "baseline" in s else None,
    "images": lambda s: s["data"]["fingerprint"],
    "backbone": lambda s: s["student"]["backbone_sha256"],
    "frozen weights": lambda s: s.get("frozen"),
    "teacher": lambda s: _without_outputs(s.get("teacher")),
    "more teachers": lambda s: s.get("more_teachers") and [*map(_without_outputs, s["more_teachers"])],
    # Faults during training: memory that ran out, numbers that were not finite.
    "accumulation": lambda s: s["faults"]["accumulation"],
    "skipped steps": lambda s: s["faults"]["skipped_steps"],
    "learning-rate factor": lambda s: f"{s['faults']['learning_rate_factor']:g}",
}


def _accuracy(student: dict[str, Any]) -> str | None:
    """Return it in words; None for a student without a classifier where there are no labels."""
    return None if student["accuracy"] is None else f"{student['accuracy']:.2%} ({student['correct']} correct)"


def _check(what: str, first: str, second: str, *, equal: bool) -> dict[str, Any]:
    return {"what": what, "first": first, "repeat": second, "equal": equal}


def _words(value: Any) -> str:
    """Return a figure as short text: hashes by their beginning, records by what names them."""
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
    sizes = [human_size.size(len(content)) if content else "-" for content in contents]
    return _check(what, *sizes, equal=contents[0] == contents[1])


def _history_check(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare histories; show the loss of the last epoch, or the first number that differs."""
    number, key = next(_differing_numbers(first, second), (min(len(first), len(second)) - 1, "loss"))
    told = [
        f"epoch {number + 1} of {len(rows)}: {key} {rows[number].get(key, '-')}" if rows else "no epoch"
        for rows in (first, second)
    ]
    return _check("history", *told, equal=first == second)


def _differing_numbers(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """Yield epochs, from 0, and names of numbers that differ, over the epochs that both histories have."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        for key in {**one, **other}:
            # An entry that is null differs from one that is missing.
            if (key in one, one.get(key)) != (key in other, other.get(key)):
                yield number, key


def differing_tensors(first: Path, second: Path) -> list[dict[str, Any]]:
    """Return tensors of two files that differ, and by how much; None where one is missing or shapes differ."""
    one, other = load(first.read_bytes()), load(second.read_bytes())
    found = []
    for name in sorted(one.keys() | other.keys()):
        if name in one and name in other and one[name].shape == other[name].shape:
            if not torch.equal(one[name], other[name]):
                # In float64, so that the difference itself is not rounded.
                largest = float((one[name].double() - other[name].double()).abs().max())
                found.append({"name": name, "largest_difference": largest})
        else:
            found.append({"name": name, "largest_difference": None})
    return found


def _surroundings(run: RunDir) -> dict[str, Any]:
    """Return the environment in which a run began, and what differed where it was resumed."""
    summary, record = run.summary(), run.environment()
    first = plain_environment(record)
    legs = {
        f"resumed {number}": {row["what"]: row["repeat"] for row in differing(first, plain_environment(leg))}
        for number, leg in enumerate(record.get("resumed", []), 1)
    }
    return first | legs | {"precision": summary["precision"], "kernels": summary.get("kernels", {})}


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return entries of two nested records that differ, as (what, first, repeat); "-" for a missing one."""
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


def changed_on_the_way(run: RunDir) -> list[str]:
    """Return as text what decides the last bits and differed between the parts of a resumed run."""
    record = run.environment()
    parts = [record, *record.get("resumed", [])]
    found = {name: list(dict.fromkeys(str(part[name]) for part in parts if name in part)) for name in _DECIDING}
    return [f"{_DECIDING[name]} ({', then '.join(values)})" for name, values in found.items() if len(values) > 1]


def outputs_on_disk(summary: dict[str, Any]) -> list[str]:
    """Return teachers whose outputs a run read from disk.

    Their last bits are those of the batches, threads and device that computed them, in this run or an earlier one.
    """
    teachers = [teacher or {} for teacher in (summary.get("teacher"), *summary.get("more_teachers", []))]
    return [str(teacher.get("model")) for teacher in teachers if teacher.get("outputs") == "disk"]


def _without_outputs(teacher: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a teacher is, and not where its outputs were kept."""
    return teacher and {key: value for key, value in teacher.items() if key != "outputs"}
