"""What answers.json holds is checked in one look at each image."""

import pytest

from remap.runs.answers import Answers, Evidence


def test_the_check_looks_at_all_labels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once an image was minutes of a run with 50,000 evaluation images."""
    looks, look = list[int](), Evidence.multilabel.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Evidence, "multilabel", property(lambda self: looks.append(1) or look(self)))
    student = Answers(predictions=[0] * 9, confidences=[0.5] * 9, losses=[1.0] * 9)
    evidence = Evidence(classes=["a", "b"], names=["x"] * 9, labels=[1] * 9, student=student, teacher=student)
    assert len(looks) == 1 and evidence.wrong == list(range(9))
