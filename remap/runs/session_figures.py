"""Figures of a run that was extended, from what each session's run answers on the images of each. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from remap.io.checked_json import is_count, is_number

Row = Sequence[float | None]
FIGURES = ("overall", "last", "average", "forgetting", "backward_transfer", "forward_transfer")


def figures(accuracy: Sequence[Row], *, same_classes: bool) -> dict[str, float | None]:
    """Return what a matrix of accuracies says: row t is the run after session t, column j the images of session j.

    Row t has t + 1 columns; of sessions with the same classes one more, where a row was measured on the next one. None
    is an accuracy that could not be measured, which leaves its session out.

    Returns:
        last: Mean of the last row.
        average: Mean of that over all rows (Rebuffi et al. 2017, arXiv 1611.07725).
        forgetting: Mean over earlier sessions of the best accuracy before minus the last (Chaudhry et al. 2018, arXiv
            1801.10112).
        backward_transfer: Mean over earlier sessions of the last accuracy minus that right after the session
            (Lopez-Paz and Ranzato 2017, arXiv 1706.08840).
        forward_transfer: Mean accuracy on a session by the run before it; None where its classes were unknown then.
    """
    last = list(accuracy[-1][: len(accuracy)])
    forgotten, gained = [], []
    for session, now in enumerate(last[:-1]):
        seen = [row[session] for row in accuracy[session:-1] if row[session] is not None]
        if now is None or not seen:
            continue
        forgotten.append(max(share for share in seen if share is not None) - now)
        right_after = accuracy[session][session]
        if right_after is not None:
            gained.append(now - right_after)
    ahead = [row[at + 1] for at, row in enumerate(accuracy) if same_classes and len(row) > at + 1]
    return {
        "last": mean(last),
        "average": mean([mean(row[: at + 1]) for at, row in enumerate(accuracy)]),
        "forgetting": mean(forgotten),
        "backward_transfer": mean(gained),
        "forward_transfer": mean(ahead),
    }


def mean(values: Row) -> float | None:
    """Return the mean of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def is_matrix(value: Any) -> bool:
    """Whether a value from a file is such a matrix, of one row a session."""
    return isinstance(value, list) and all(
        isinstance(row, list) and at < len(row) <= at + 2 and all(map(_is_share, row)) for at, row in enumerate(value)
    )


def sessions_problem(found: Any) -> str | None:
    """Return what is wrong with the sessions of a summary; None if they can be shown."""
    if not isinstance(found, dict) or not is_matrix(found.get("accuracy")):
        return "sessions.accuracy is not a matrix of shares"
    errors, rows = found.get("calibration_error"), found.get("sessions")
    if not isinstance(errors, dict) or not all(is_number_or_none(errors.get(name, "")) for name in ("old", "new")):
        return "sessions.calibration_error is not that of old and new images"
    if not all(is_number_or_none(found.get(name, "")) for name in FIGURES):
        return "sessions has figures that are not numbers"
    if not isinstance(rows, list) or len(rows) != len(found["accuracy"]) or not all(map(_is_session, rows)):
        return "sessions.sessions is not a list of one session for each row"
    return None


def is_number_or_none(value: Any) -> bool:
    """Whether a value is a number, or None where there is nothing to count."""
    return value is None or is_number(value)


def _is_share(value: Any) -> bool:
    return value is None or (is_number(value) and 0 <= value <= 1)


def _is_session(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("classes"), list) or not is_count(row.get("bytes")):
        return False
    return all(isinstance(name, str) for name in row["classes"])
