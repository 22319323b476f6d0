"""The line that a run prints in which a teacher does not pay."""

from typing import Any

import pytest

from remap.pipeline.rule_of_thumb import losing_case


@pytest.mark.parametrize(
    ("method", "teacher", "student", "alone", "labeled", "says"),
    [
        ("lora", 0.833, 0.869, 0.887, 100, "the teacher is not better than its student"),  # CIFAR-10, 60 epochs
        ("vpt_deep", 0.833, 0.637, 0.668, 100, "with all labels, prompts seldom gain"),
        ("vpt_deep", 0.833, 0.637, None, 100, "with all labels, prompts seldom gain"),
        ("bitfit", 0.833, 0.747, 0.761, 100, "the teacher did not help here"),
        ("lora", 0.955, 0.725, 0.769, 20, "the teacher did not help here, though few images have labels"),
        ("lora", 0.943, 0.798, 0.549, 20, None),
        ("hira", 0.927, 0.954, 0.811, 10, None),  # digits: better than its teacher, and by far better by it
        ("hira", 0.927, 0.954, None, 10, "the teacher is not better than its student"),
        ("vpt_deep", 0.943, 0.798, None, 20, None),
        ("lora", 1.0, 1.0, None, 20, None),  # no teacher is better than that
    ],
)
def test_it_speaks_where_the_teacher_loses_and_nowhere_else(
    method: str, teacher: float, student: float, alone: float | None, labeled: int, says: str | None
) -> None:
    summary: dict[str, Any] = {
        "method": method,
        "student": {"accuracy": student},
        "teacher": {"model": "mini_teacher", "accuracy": teacher},
        "data": {"labeled_images": labeled, "train_images": 100, "val_images": 10_000},
    }
    if alone is not None:
        summary["baseline"] = {"accuracy": alone}
    found = losing_case(summary)
    assert found is None if says is None else found is not None and found.startswith(says)
    assert "by chance" not in (found or "")


@pytest.mark.parametrize(("alone", "who"), [(0.9, "labels alone"), (None, "its teacher")])
def test_it_says_where_so_few_images_cannot_tell(alone: float | None, who: str) -> None:
    """One image of 30 lies well within the interval of a share of 0.9 (Newcombe 1998)."""
    summary: dict[str, Any] = {
        "method": "lora",
        "student": {"accuracy": 26 / 30},
        "teacher": {"model": "mini_teacher", "accuracy": 25 / 30},
        "data": {"labeled_images": 60, "train_images": 60, "val_images": 30},
    }
    if alone is not None:
        summary["baseline"] = {"accuracy": alone}
    found = losing_case(summary)
    assert found is not None and found.endswith(
        f"(by chance, perhaps: 30 evaluation images do not tell the student from {who})"
    )


def test_it_says_nothing_of_a_teacher_made_of_the_student() -> None:
    summary = {
        "method": "lora",
        "student": {"accuracy": 0.9},
        "teacher": {"model": "self (mini_student)", "accuracy": 0.5},
        "data": {"labeled_images": 9, "train_images": 9},
    }
    assert losing_case(summary) is None


@pytest.mark.parametrize(
    ("head", "says"), [("probe", "tune it (--set teacher.prepare=auto)"), ("full", "prepare it for longer")]
)
def test_a_teacher_that_was_tuned_is_not_to_be_tuned(head: str, says: str) -> None:
    summary = {
        "method": "lora",
        "student": {"accuracy": 0.9},
        "teacher": {"model": "mini_teacher", "accuracy": 0.8, "head": head},
        "baseline": {"accuracy": 0.95},
        "data": {"labeled_images": 100, "train_images": 100, "val_images": 10_000},
    }
    assert f": {says}" in (losing_case(summary) or "")
