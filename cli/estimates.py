"""The tables of ``--dry-run``."""

from typing import Any

from remap.io.human_size import number_of, size
from remap_cli import console


def show(found: dict[str, Any]) -> None:
    """Print what a dry run found."""
    several = len(found["teachers"]) > 1
    teachers = [(f"teacher {n}" if several else "teacher", one) for n, one in enumerate(found["teachers"], 1)]
    rows = []
    for role, model in [*teachers, ("student", found["student"])]:
        counts = [console.count(model[f"{part}_parameters"]) for part in ("backbone", "head")]
        rows.append([role, _model(model), model["weights"], model["input_size"], *counts])
    console.table("Models", ["", "model", "weights", "pixels", "backbone", "head"], rows, right=(3, 4, 5))
    head = sum(row["parameters"] for row in found["trainable"] if row["part"] == "head")
    total = found["student"]["backbone_parameters"] + found["student"]["added_parameters"] + head
    rows = []
    for row in found["trainable"]:
        shapes, share = ", ".join(row["shapes"]), f"{row['parameters'] / total:.2%}"
        rows.append([row["part"], row["tensors"], shapes, f"{row['parameters']:,}", share])
    console.table(
        "Trained parameters", ["part", "tensors", "shapes", "parameters", "share"], rows, right=(1, 3, 4), wrap=(2,)
    )
    guess, data = found["estimate"], found["data"]
    if guess["steps"]:
        _terms(found)
    alone, trying = guess["baseline_seconds"], guess["trials_seconds"]
    steps = f"{number_of(guess['steps'], 'step')} of {guess['step_seconds']:.3g} s"
    time = f"{console.duration(guess['seconds'])} ({steps if guess['steps'] else 'no training steps'})"
    memory = f" (activations {size(guess['activation_bytes'])})" if guess["steps"] else ""
    labeled = "" if data["labeled_images"] == data["train_images"] else f", {data['labeled_images']} of them labelled"
    console.table(
        f"One batch of {data['source']} ({data['train_images']} training{labeled}, {data['val_images']} evaluation "
        f"images, {data['classes']} classes) on {found['device']} in {found['precision']}",
        ["estimated", "value"],
        [
            *([["learning rate", f"{found['learning_rate']:.3g}"]] if guess["steps"] else []),
            ["time", time],
            *([["preparing the teacher", f"{console.duration(guess['preparing_seconds'])} of it"]] if teachers else []),
            *([["trials (losses: auto)", f"{console.duration(trying)} of it"]] if trying else []),
            *([["labels only, to compare", f"{console.duration(alone)} of it (--no-baseline: none)"]] if alone else []),
            ["memory", f"{size(guess['memory_bytes'])}{memory}"],
            ["cached teacher outputs", _cached(found)],
            ["cached frozen features", size(guess["features_bytes"])],
            ["disk", _disk(guess)],
        ],
        wrap=(1,),
    )
    console.line("Nothing was trained or written.")


def _disk(guess: dict[str, Any]) -> str:
    more = guess["disk_bytes"] - guess["run_bytes"]
    what = "teachers and other runs" if guess.get("baseline_seconds") or guess.get("trials_seconds") else "teachers"
    teachers = f" + {size(more)} of {what}" if more else ""
    files = "checkpoints + task" if guess["steps"] else "task"
    return f"{size(guess['run_bytes'])} ({files}){teachers}; saved: {size(guess['task_bytes'])}"


def _model(model: dict[str, Any]) -> str:
    return f"{model['source']} = {model['model']}" if model.get("source") in ("self", "ema") else model["model"]


def _cached(found: dict[str, Any]) -> str:
    """Return where the outputs of each teacher are cached."""
    words = [
        f"{size(one['outputs_bytes'])} {'in memory' if one['outputs'] == 'memory' else 'on disk'}"
        if one["outputs"] in ("memory", "disk")
        else {"each step": "none: computed in every step", "not read": "none: no loss reads them"}[one["outputs"]]
        for one in found["teachers"]
    ]
    if len(words) > 1:
        words = [f"teacher {number} {word}" for number, word in enumerate(words, 1)]
    return ", ".join(words) or "there is no teacher"


def _terms(found: dict[str, Any]) -> None:
    """Print what each loss costs by itself, and which blocks it pairs."""
    rows = []
    for term in found["terms"]:
        pairs = ", ".join(f"{teacher} -> {student}" for student, teacher in term["blocks"])
        rows.append(
            [
                term["name"],
                f"{term['weight']:.3g}",
                f"{found['losses'][term['name']]:.4g}",
                f"{1000 * term['seconds']:.3g} ms",
                size(term["memory_bytes"]),
                size(term["cache_bytes"]) if term["cache_bytes"] else "-",
                pairs or "-",
            ]
        )
    console.table(
        "Losses: cost of each by itself in a step, and the teacher's outputs it reads (losses may share them)",
        ["loss", "weight", "value", "time", "memory", "cached", "blocks: teacher -> student"],
        rows,
        right=(1, 2, 3, 4, 5),
        wrap=(6,),
    )
    if any(term["blocks"] for term in found["terms"]):
        console.line("Blocks are counted from 0; the number after the last block is the output of the final norm.")
