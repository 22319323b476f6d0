"""The report of a run, from what its folder records."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remap.data import CLASSES, METRIC, metric_in
from remap.errors import RunError
from remap.io.human_size import part, size
from remap.io.names import plain
from remap.recipe import Recipe
from remap.recipe.in_words import losses_in_words
from remap.remapping.schedule import is_scheduled
from remap.report import figures
from remap.report.images import bins_of, class_rows, confused_pairs, confusion_counts, overlays, worst_images
from remap.report.page import count, percent, rows_of, write_page
from remap.runs.answers import read_evidence
from remap.runs.interval import Measured, difference
from remap.runs.run_dir import RunDir
from remap.runs.session_figures import FIGURES
from remap.runs.summary_schema import choice_in_words, measured_of, metric_of, metrics_in_words, summary_problem

# Above it, a matrix is no longer read, and the pairs that are most confused are listed.
MOST_CLASSES_IN_MATRIX = 20
# What ``train.fit`` finds a classifier by where it takes no steps.
_AT_ONCE = {"prototypes": "class means", "ridge": "ridge regression", "logistic": "logistic regression"}
_NOT_LOSSES = ("epoch", "seconds", *METRIC.values(), "val_ce", "val_bce", "selection")


def report_run(run: RunDir, *, pngs: bool = True) -> Path:
    """Write ``report.html`` into a finished run's folder, and the figures as PNG into ``report/``; return the page.

    Raises:
        RunError: The run has no result yet, or its records are damaged.
    """
    if not (run.path / "summary.json").is_file():
        ended, message = run.outcome()
        raise RunError(f"{run.path} has no result yet: it {ended}", given=message, do=run.resume_command())
    summary, recipe, history, evidence = run.summary(), run.recipe(), run.metrics(), read_evidence(run.path)
    problem = summary_problem(summary)
    if problem is not None:
        raise RunError(f"{run.path / 'summary.json'} cannot be shown: {problem}", do="name a run that `remap` finished")
    drawn = [*_curves(history)]
    if evidence is not None and not evidence.multilabel:
        if len(evidence.classes) <= MOST_CLASSES_IN_MATRIX:
            drawn.append(figures.confusion("confusion", evidence.classes, confusion_counts(evidence)))
        if bins_of(evidence.student, evidence.labels):
            drawn.append(figures.reliability("reliability", bins_of(evidence.student, evidence.labels)))
    if blocks := summary.get("blocks"):
        drawn.append(figures.blocks("blocks", blocks["pairs"], blocks["student"], blocks["teacher"]))
    return write_page(
        run.path,
        "run.html.j2",
        drawn,
        pngs=pngs,
        title=plain(run.path.resolve().name),
        answer=_answer(summary, recipe),
        bars=_bars(summary),
        tiles=_tiles(summary),
        curves=[one.name for one in drawn if one.name.startswith("curve-")],
        once=sum(metric_in(record) is not None for record in history) == 1,
        evidence=evidence,
        no_evidence=(
            "a backbone without a classifier answers with no class"
            if recipe.label_free
            else "no evaluation image has a label"
            if summary["student"]["accuracy"] is None
            else "`remap adapt` stores no answers to single images"
            if "adapted" in summary
            else "answers.json is not in this folder; earlier versions did not write it"
        ),
        calibration=summary["student"].get("metrics", {}).get("calibration_error"),
        classes=class_rows(evidence) if evidence is not None else [],
        metric=metric_of(summary),
        pairs=confused_pairs(evidence) if evidence is not None and not evidence.multilabel else [],
        worst=worst_images(evidence, run.path) if evidence is not None else [],
        overlays=overlays(evidence, run.path) if evidence is not None else [],
        sessions=_sessions(summary),
        facts=_facts(run, summary, recipe),
        repeats="adapted" not in summary,  # its recipe is that of the run before
        command=_text(run.path / "command.txt"),
        recipe=_text(run.path / "recipe.yaml"),
    )


def _text(path: Path) -> str:
    try:
        return plain(path.read_bytes()[:100_000].decode(errors="replace").strip(), keep="\n")
    except OSError:
        return "not recorded"


def _curves(history: list[dict[str, Any]]) -> list[figures.Drawing]:
    """Draw accuracy (or mAP), then each loss; beside the cross-entropy in training that on the evaluation images.

    An accuracy that was measured once is not a curve: the bars above show it.
    """
    if not history:
        return []

    def line(name: str, factor: float = 1.0) -> list[tuple[int, float]]:
        return [(record["epoch"], factor * record[name]) for record in history if name in record]

    drawn = []
    for name in METRIC.values():
        if len(line(name)) > 1:
            lines = {"evaluation": line(name, 100)}
            drawn.append(figures.curve("curve-accuracy", f"{name}, %", lines, percent=True))
    names = [name for name in dict.fromkeys(n for record in history for n in record) if name not in _NOT_LOSSES]
    for number, name in enumerate(name for name in names if not is_scheduled(name)):
        lines = {"training": line(name)}
        if name == "ce" and (evaluated := line("val_ce") or line("val_bce")):
            lines["evaluation"] = evaluated
        title = "loss (weighted sum)" if name == "loss" else name
        drawn.append(figures.curve(f"curve-{number}", title, lines))
    return drawn


def _answer(summary: dict[str, Any], recipe: Recipe) -> str:
    """Return what came out, in one paragraph."""
    student, data = summary["student"], summary["data"]
    share = part(student["trainable_parameters"], student["total_parameters"])
    who = (
        f"The student {student['model']}, tuned by {summary['method']} ({count(student['trainable_parameters'])} of"
        f" {count(student['total_parameters'])} parameters, {share})"
    )
    if recipe.label_free:
        text = f"{who}, learned from {data['train_images']:,} images without labels; the result is a backbone."
        if student["accuracy"] is not None:
            text += (
                f" A linear probe on its frozen features is right on {percent(student['accuracy'])} of the evaluation"
                f" images; before training it was {percent(student['initial_accuracy'])}."
            )
        return text
    accuracy, images = student["accuracy"], data["val_images"]
    if accuracy is None:
        return (
            f"{who}, learned from {data['train_images']:,} images without labels; there are no images with labels to"
            " evaluate it on (remap eval --data FOLDER does)."
        )
    ours, of_shares = measured_of(summary, student), metric_of(summary) == METRIC[CLASSES]
    what = f"has a mean average precision of {ours} on {images:,} evaluation images"
    if of_shares:
        what = f"is right on {student['correct']:,} of {images:,} evaluation images: {ours}"
    text = f"{who}, {what}, with the 95% interval."
    if "baseline" in summary:
        theirs = measured_of(summary, summary["baseline"])
        text += " " + _compared(ours, theirs, images, "the same student without a teacher")
    if "teacher" in summary and summary["teacher"]["accuracy"] is not None:
        text += " " + _compared(ours, measured_of(summary, summary["teacher"]), images, "its teacher")
    if "test_accuracy" in student:
        is_what = "it is right on" if of_shares else "it has one of"
        text += f" On the test images, looked at once, {is_what} {percent(student['test_accuracy'])}."
    return text


def _compared(ours: Measured, theirs: Measured, images: int, who: str) -> str:
    """Return how a figure compares with another one, and whether so few images can tell them apart."""
    low, high = difference(ours, theirs)
    gap = 100 * (ours.value - theirs.value)
    side = f"{abs(gap):.1f} points {'better than' if gap > 0 else 'below'}" if gap else "as good as"
    chance = f": {images:,} images do not tell the two apart" if low <= 0 <= high else ""
    return f"It is {side} {who} ({percent(theirs.value)}){chance}."


def _bars(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracies to compare, each with its interval."""
    student = summary["student"]
    teachers = [summary["teacher"], *summary.get("more_teachers", [])] if "teacher" in summary else []
    rows = [
        (f"teacher {number}" if len(teachers) > 1 else "teacher", teacher, "accuracy", "teacher")
        for number, teacher in enumerate(teachers, 1)
    ]
    rows.append(("student", student, "accuracy", "student"))
    if "baseline" in summary:
        rows.append(("labels only", summary["baseline"], "accuracy", "other"))
    rows.append(("before training", student, "initial_accuracy", "other"))
    found = [
        (name, kind, measured_of(summary, entry, key)) for name, entry, key, kind in rows if entry.get(key) is not None
    ]
    return [{"name": name, "kind": kind, "share": one.value, "interval": one[1:]} for name, kind, one in found]


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str]]:
    found = metrics_in_words(summary["student"].get("metrics", {}), summary["data"]["classes"])
    tiles = [(words, percent(share)) for words, share in found.items()]
    return [*tiles, ("saved size of the task", size(summary["student"]["task_bytes"]))]


def _sessions(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Return the table of a run that extends others, and figures of it; None of other runs."""
    if "sessions" not in summary:
        return None
    found, errors = summary["sessions"], summary["sessions"]["calibration_error"]
    figures = {name.replace("_", " "): found[name] for name in FIGURES}
    figures |= {f"calibration error, {name} images": errors[name] for name in ("old", "new")}
    names = [plain(", ".join(one["classes"])[:60]) or "the same classes" for one in found["sessions"]]
    kept = [size(one["bytes"]) for one in found["sessions"]]
    rows = list(zip(names, kept, found["accuracy"], strict=True))
    return {"rows": rows, "tiles": [(name, percent(share)) for name, share in figures.items() if share is not None]}


def _facts(run: RunDir, summary: dict[str, Any], recipe: Recipe) -> dict[str, list[tuple[str, str]]]:
    """Return lists of facts by title; what an old or damaged record lacks is left out."""
    data, environment = summary["data"], run.environment()
    skipped = Counter(reason for _, reason in data.get("skipped", []))
    get: Callable[[str], Any] = summary.get
    adapted, by_steps = get("adapted"), recipe.train.by_steps
    at_once = _AT_ONCE.get(recipe.train.fit)
    how = None if by_steps else f"classifier by {at_once}" if at_once else "no training"
    how = f"{adapted['run']}, adapted by {adapted['by']}" if adapted else how
    own_steps = by_steps and not adapted
    facts: dict[str, dict[str, Any]] = {
        "Data": {
            "images": data["source"],
            "classes": data.get("classes"),
            "training images": f"{data['train_images']:,}, {data['labeled_images']:,} of them with labels",
            "evaluation images": f"{data['val_images']:,}",
            "split": data.get("split"),
            "left out": ", ".join(f"{number} ({reason})" for reason, number in skipped.items()) or "nothing",
            "fingerprint": str(data.get("fingerprint", ""))[:16] or None,
        },
        "Training": {
            "teacher": summary["teacher"]["model"] if "teacher" in summary else "none",
            "head of the teacher": summary["teacher"]["head"] if "teacher" in summary else None,
            "how": how,
            "losses": losses_in_words(recipe.losses, "×") if own_steps else None,
            "epochs": get("epochs") if by_steps else None,
            "result": choice_in_words(summary) if "choice" in summary else None,
            "running average": get("ema"),
            "batch size": recipe.train.batch_size if own_steps else None,
            "learning rate": f"{summary['learning_rate']:g}" if by_steps and summary["learning_rate"] else None,
            "seed": get("seed"),
            "time": f"{summary['train_seconds']:.0f} s of training, {summary['seconds']:.0f} s in all",
            "peak memory": size(get("peak_memory_bytes")) if get("peak_memory_bytes") else None,
        },
        "Environment": {
            "device": get("device"),
            "processes": get("processes"),
            "precision": get("precision"),
            "processor": environment.get("cpu"),
            "system": environment.get("system"),
            "Python": environment.get("python"),
            **{name: (environment.get("packages") or {}).get(name) for name in ("torch", "timm", "peft")},
            "remap": environment.get("remap"),
            "date": environment.get("time"),
        },
    }
    return {title: rows_of(values) for title, values in facts.items()}
