"""The fields of summary.json that readers need, and a check of a summary from anywhere.

Imports no torch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from remap.data import CLASSES, METRIC
from remap.io.checked_json import is_count, is_number
from remap.runs.interval import Measured, wilson
from remap.runs.session_figures import sessions_problem

# More than any network has.
MOST_BLOCKS = 10_000
_MISSING = object()
# The entries of student.metrics, in words.
METRICS = {
    "top5": "top-5 accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1 (mean over classes)",
    "calibration_error": "calibration error",
    "teacher_agreement": "agreement with the teacher",
    "mAP": "mean average precision",
    "f1_micro": "F1 of all answers",
    "f1_macro": "F1 (mean over classes)",
    "exact_match": "all classes of an image right",
}


def metrics_in_words(metrics: Mapping[str, float], classes: int) -> dict[str, float]:
    """Return the metrics to show by their words; top-5 accuracy of five classes or fewer is always 100 %."""
    return {words: metrics[key] for key, words in METRICS.items() if key in metrics and (key != "top5" or classes > 5)}


def metric_of(summary: Mapping[str, Any]) -> str:
    """Return what the entries of a summary or comparison that are called accuracy are: "accuracy", or "mAP"."""
    return str(summary.get("metric", METRIC[CLASSES]))


def measured_of(summary: Mapping[str, Any], entry: Mapping[str, Any], name: str = "accuracy") -> Measured:
    """Return such a figure of a part of a summary, with its interval.

    Earlier versions stored none. That of an accuracy follows from the number of images, of mAP nothing is known.
    """
    ends = entry.get(name.replace("accuracy", "interval"))
    if ends is None and metric_of(summary) == METRIC[CLASSES]:
        ends = wilson(entry[name], summary["data"]["val_images"])
    return Measured(entry[name], *(ends or (0.0, 1.0)))


def _is_word(value: object) -> bool:
    return isinstance(value, str)


def _is_interval(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))


def _is_share(value: object) -> bool:
    """Whether it is an accuracy from 0 to 1, or None where there is nothing to judge by."""
    return value is None or (isinstance(value, int | float) and is_number(value) and 0 <= value <= 1)


def _is_count_or_none(value: object) -> bool:
    return value is None or is_count(value)


def _is_skipped(value: object) -> bool:
    """Whether it lists files with the reason why each was left out."""
    pairs = value if isinstance(value, list) else [None]
    return all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_word, pair)) for pair in pairs)


def _is_blocks(value: object) -> bool:
    """Whether it says which blocks were compared by which loss, and how many each network has."""
    if not isinstance(value, dict) or not isinstance(value.get("pairs"), dict):
        return False
    pairs = [pair for taught in value["pairs"].values() for pair in (taught if isinstance(taught, list) else [None])]
    depths: list[Any] = [value.get("student"), value.get("teacher")]
    # Each block is drawn.
    return all(is_count(depth) and depth < MOST_BLOCKS for depth in depths) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_count, pair)) for pair in pairs
    )


# What commands show of a summary: each entry and its check. Dots lead into nested objects.
_SUMMARY: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("run_dir", "method", "data.source", "student.model"), _is_word),
    **dict.fromkeys(("seconds", "train_seconds", "learning_rate"), is_number),
    "student.accuracy": _is_share,
    **dict.fromkeys(("data.classes", "data.train_images", "data.labeled_images", "data.val_images"), is_count),
    **dict.fromkeys(("student.trainable_parameters", "student.task_bytes"), is_count),
    "student.total_parameters": lambda value: is_count(value) and value != 0,
}
# Entries that some runs lack, or earlier versions.
_IF_THERE: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("student.correct", "peak_memory_bytes"), _is_count_or_none),
    "student.initial_accuracy": _is_share,
    "data.skipped": _is_skipped,
    "blocks": _is_blocks,
}
_TEACHER: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("model", "head"), _is_word),
    "total_parameters": is_count,
    "accuracy": _is_share,
}


_CHOICE: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("choice.keep", "choice.metric"), _is_word),
    "choice.best": is_number,
    **dict.fromkeys(("choice.images", "choice.best_epoch", "choice.kept_epoch", "choice.epochs_trained"), is_count),
}


def choice_in_words(summary: Mapping[str, Any]) -> str:
    """Say which epoch is the result: "best epoch 7 of 12 by accuracy on 36 held-out training images (91.7%)"."""
    choice = summary["choice"]
    name, best, trained = choice["metric"].replace("_", " "), choice["best"], choice["epochs_trained"]
    figure = f"{best:.4g}" if name == "loss" else f"{best:.1%}"
    text = f"best epoch {choice['best_epoch']} of {trained} by {name} on {choice['images']} held-out training images"
    text += f" ({figure})"
    if choice["kept_epoch"] != choice["best_epoch"]:
        text += "; the result is the last one (train.keep=best keeps the best)"
    planned = summary["epochs"]
    return text + (f"; stopped early, {planned} epochs were planned" if trained < planned else "")


def summary_problem(summary: object) -> str | None:
    """Return what is wrong with a summary; None if it can be shown."""
    if not isinstance(summary, dict):
        return "it is not a JSON object"
    problem = _problem(summary, _SUMMARY, "") or _problem(summary, _IF_THERE, "", needed=False)
    if problem is None and summary["student"]["accuracy"] is not None and summary["student"].get("correct") is None:
        problem = "it has no student.correct"
    if problem is None and not is_number(summary["student"].get("test_accuracy", 0)):
        problem = "student.test_accuracy is not a number"
    found = summary["student"].get("metrics", {}) if problem is None else {}
    if not isinstance(found, dict) or not all(map(is_number, found.values())):
        problem = "student.metrics is not an object of numbers"
    if problem is None and "baseline" in summary:
        problem = _problem(summary, {"baseline.accuracy": lambda value: value is not None and _is_share(value)}, "")
    if problem is None and "choice" in summary:
        problem = _problem(summary, {"epochs": is_count, **_CHOICE}, "")
    if problem is None and "sessions" in summary:
        problem = sessions_problem(summary["sessions"])
    more = summary.get("more_teachers", [])
    teachers = [("teacher", summary["teacher"])] if "teacher" in summary else []
    if not isinstance(more, list) or (more and not teachers):
        return "more_teachers is not a list of further teachers"
    teachers += [(f"more_teachers.{number}", teacher) for number, teacher in enumerate(more)]
    problems = [problem, *(_problem(teacher, _TEACHER, f"{name}.") for name, teacher in teachers)]
    if any(problems):
        return next(filter(None, problems))
    for name, part in [("student", summary["student"]), ("baseline", summary.get("baseline", {})), *teachers]:
        wrong = [key for key, value in part.items() if key.endswith("interval") and not _is_interval(value)]
        if wrong:
            return f"{name}.{wrong[0]} is not two numbers"
    return None


def _problem(
    record: object, kinds: Mapping[str, Callable[[object], bool]], prefix: str, *, needed: bool = True
) -> str | None:
    for name, fits in kinds.items():
        value: Any = record
        for key in name.split("."):
            value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
        if value is _MISSING and needed:
            return f"it has no {prefix}{name}"
        if value is not _MISSING and not fits(value):
            return f"{prefix}{name} is not what the summary of a run has there"
    return None
