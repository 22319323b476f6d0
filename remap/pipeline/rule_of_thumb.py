"""When a teacher pays: the advice for a run in which it does not. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from remap.io.human_size import number_of
from remap.recipe.schema import EMA, SELF
from remap.runs.interval import difference
from remap.runs.summary_schema import measured_of
from remap.tuning import rows_of

RULE = "a teacher pays most where few images have labels and many others have none (--unlabeled)"


def losing_case(summary: Mapping[str, Any]) -> str | None:
    """Return the line of a run whose teacher does not pay, and whether so few images can tell; else None."""
    advice = _advice(summary)
    return None if advice is None else advice + _chance(summary)


def _chance(summary: Mapping[str, Any]) -> str:
    """Return that the evaluation images do not tell what is compared apart; empty where they do."""
    other, name = summary.get("baseline"), "labels alone"
    if other is None:
        other, name = summary["teacher"], "its teacher"
    if None in (other["accuracy"], summary["student"]["accuracy"]):
        return ""
    low, high = difference(measured_of(summary, summary["student"]), measured_of(summary, other))
    images = number_of(summary["data"]["val_images"], "evaluation image")
    return f" (by chance, perhaps: {images} do not tell the student from {name})" if low <= 0 <= high else ""


def _advice(summary: Mapping[str, Any]) -> str | None:
    """Return one line for a run whose teacher is not better than its student, or that gained nothing by it; else None.

    Of a run without a baseline, which cannot tell, only what loses most often: prompts where all images have labels.
    """
    student, data, baseline = summary["student"]["accuracy"], summary["data"], summary.get("baseline")
    teachers = [summary[name] for name in ("teacher",) if name in summary] + summary.get("more_teachers", [])
    teachers = [one for one in teachers if not one["model"].startswith((f"{SELF} (", f"{EMA} ("))]
    judged = [one for one in teachers if one["accuracy"] is not None]
    if student is None or not judged or not data["labeled_images"]:  # without labels it can hardly be passed
        return None
    teacher = max(judged, key=lambda one: float(one["accuracy"]))
    if baseline is not None and student > baseline["accuracy"]:
        return None
    if teacher["accuracy"] <= student and student < 1.0:  # no teacher is better than that
        # A head alone was fitted, where tuning all of it may be better.
        tune = "tune it (--set teacher.prepare=auto)," if teacher.get("head") == "probe" else "prepare it"
        return (
            f"the teacher is not better than its student on these images ({teacher['accuracy']:.1%} and {student:.1%}):"
            f" {tune} for longer or with augmentation (teacher.epochs, data.augment), or take a better one; {RULE}"
        )
    prompts = any(row.category == "prompt" for row in rows_of(summary["method"]))
    if data["labeled_images"] == data["train_images"] and prompts:
        return f"with all labels, prompts seldom gain from a teacher: try lora or adaptformer; {RULE}"
    if baseline is None:
        return None
    if data["labeled_images"] < data["train_images"] / 2:
        return (
            "the teacher did not help here, though few images have labels: in as many steps labels alone see their"
            f" images more often than the {data['train_images']:,} of this run; give it more epochs (--epochs)"
        )
    return f"the teacher did not help here; {RULE}"
