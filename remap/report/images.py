"""What a report says of the evaluation images: classes, pairs that are confused, calibration, pictures."""

from collections import Counter
from pathlib import Path
from typing import Any

from remap.report.page import picture
from remap.runs.answers import Answers, Evidence
from remap.runs.interval import wilson

# Rows of a table; more are not read.
MOST_CLASSES, MOST_PAIRS, BINS = 50, 15, 15


def _one(column: list[Any]) -> list[Any]:
    """Return labels or answers of one class an image."""
    return column


def confusion_counts(evidence: Evidence) -> list[list[int]]:
    """Return how many images of each class (row) were given each answer (column)."""
    found = Counter(zip(_one(evidence.labels), _one(evidence.student.predictions), strict=True))
    classes = range(len(evidence.classes))
    return [[found[row, column] for column in classes] for row in classes]


def confused_pairs(evidence: Evidence) -> list[dict[str, Any]]:
    """Return the wrong answers that were given most often, with how often the teacher gave them too."""
    teacher = _one(evidence.teacher.predictions) if evidence.teacher else None
    rows = enumerate(zip(_one(evidence.labels), _one(evidence.student.predictions), strict=True))
    wrong = [(index, pair) for index, pair in rows if pair[1] not in (pair[0], -1)]
    counts = Counter(pair for _, pair in wrong)
    images = Counter(_one(evidence.labels))
    return [
        {
            "label": evidence.classes[label],
            "answer": evidence.classes[answer],
            "count": count,
            "share": count / images[label],
            "teacher": None
            if teacher is None
            else sum(teacher[i] == answer for i, pair in wrong if pair == (label, answer)),
        }
        for (label, answer), count in counts.most_common(MOST_PAIRS)
    ]


def class_rows(evidence: Evidence) -> list[dict[str, Any]]:
    """Return the least accurate classes first: images, accuracy with interval, the teacher's, the usual mistake."""
    if evidence.student.precision is not None:
        return _precision_rows(evidence, evidence.student.precision)
    rows: list[dict[str, Any]] = []
    answered = _one(evidence.student.predictions)
    for label, name in enumerate(evidence.classes):
        chosen = [i for i, one in enumerate(_one(evidence.labels)) if one == label and answered[i] >= 0]
        if not chosen:
            continue
        answers = Counter(answered[i] for i in chosen)
        share = answers[label] / len(chosen)
        mistakes = Counter({answer: number for answer, number in answers.items() if answer != label})
        usual = mistakes.most_common(1)
        teacher = evidence.teacher and sum(_one(evidence.teacher.predictions)[i] == label for i in chosen) / len(chosen)
        rows.append(
            {
                "name": name,
                "images": len(chosen),
                "share": share,
                "interval": wilson(share, len(chosen)),
                "teacher": teacher,
                "mistake": f"{evidence.classes[usual[0][0]]} ({usual[0][1]})" if usual else "",
            }
        )
    return sorted(rows, key=lambda row: row["share"])[:MOST_CLASSES]


def _precision_rows(evidence: Evidence, precision: list[float | None]) -> list[dict[str, Any]]:
    images = Counter(label for labels in evidence.labels if isinstance(labels, list) for label in labels)
    teacher = evidence.teacher.precision if evidence.teacher else None
    rows: list[dict[str, Any]] = [
        {"name": name, "images": images[label], "share": share, "interval": None, "teacher": teacher and teacher[label]}
        for label, (name, share) in enumerate(zip(evidence.classes, precision, strict=True))
        if share is not None
    ]
    return sorted(rows, key=lambda row: row["share"])[:MOST_CLASSES]


def bins_of(answers: Answers, labels: list[Any]) -> list[tuple[float, float, int]]:
    """Return mean confidence, share that is right and number of images, of each bin of confidence that has any."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for answer, confidence, label in zip(_one(answers.predictions), _one(answers.confidences), labels, strict=True):
        if answer >= 0:
            bins.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, answer == label))
    columns = [tuple(zip(*rows, strict=True)) for _, rows in sorted(bins.items())]
    return [(sum(sure) / len(sure), sum(right) / len(right), len(sure)) for sure, right in columns]


def worst_images(evidence: Evidence, run: Path) -> list[dict[str, Any]]:
    """Return the images answered wrong whose label the student finds least likely, with both networks' answers."""
    found, wrong = [], set(evidence.wrong)  # earlier versions stored pictures of others too
    for index in evidence.worst:
        uri = picture(run, f"image-{index}.jpg")
        if uri is not None and index in wrong:
            found.append(
                {
                    "uri": uri,
                    "name": evidence.names[index],
                    "label": evidence.label_of(index),
                    "student": _said(evidence, evidence.student, index),
                    "teacher": evidence.teacher and _said(evidence, evidence.teacher, index),
                }
            )
    return found


def _said(evidence: Evidence, answers: Answers, index: int) -> dict[str, Any] | None:
    """Return what is said of an image: its classes, how sure the least sure is, and whether all are right."""
    named = answers.of(index)
    if named is None:
        return None
    name = ", ".join(evidence.classes[label] for label, _ in named) or "none"
    right = answers.predictions[index] == evidence.labels[index]
    return {"name": name, "confidence": min((sure for _, sure in named), default=None), "right": right}


def overlays(evidence: Evidence, run: Path) -> list[dict[str, Any]]:
    """Return each image with where the networks look; those whose pictures are gone are left out."""
    found = []
    for index in evidence.attention.images:
        names = [f"image-{index}.jpg", *(f"attention-{index}-{name}.jpg" for name in evidence.attention.blocks)]
        uris = [picture(run, name) for name in names]
        if None not in uris:
            found.append(
                {"label": evidence.label_of(index), "uris": uris, "student": _said(evidence, evidence.student, index)}
            )
    return found
