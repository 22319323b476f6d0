"""Predict files with a tuned student."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from remap.data.file_listing import list_folder
from remap.data.image_files import Skipped, counted, why_left_out, why_not_read
from remap.data.images import SUFFIXES, BadImage
from remap.errors import DataError
from remap.io.paths import expanded
from remap.pipeline.student_api import Student
from remap.progress import Progress


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one file with their probabilities; ``error`` says why there are none."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""


def image_files(words: Sequence[str]) -> tuple[list[Path], Skipped]:
    """Return the files to predict, and those left out of folders.

    Files are taken as they are named, even where there are none, which ``predict`` says.

    Raises:
        DataError: No word names anything, there is no image, or a folder cannot be listed.
    """
    found: list[Path] = []
    left_out: list[tuple[str, str]] = []
    for word in words:
        path = expanded(word)
        if os.path.isdir(path):
            reasons = {name: why_left_out(name) for name in list_folder(path).paths}
            found += sorted(path / name for name, reason in reasons.items() if reason is None)
            left_out += [(str(path / name), reason) for name, reason in reasons.items() if reason is not None]
        else:
            found.append(path)
    if found and not any(map(os.path.lexists, found)):
        raise DataError("no such file or folder", given=", ".join(words))
    if not found:
        given = ", ".join(words) + (f"; left out: {counted(left_out)}" if left_out else "")
        raise DataError("no images there", given=given, allowed=" ".join(SUFFIXES))
    return found, left_out


def predict(
    student: Student, paths: Sequence[Path], *, top: int, batch_size: int, progress: Progress
) -> Iterator[Prediction]:
    """Yield predictions in the order of ``paths``; for an unreadable file the reason instead."""
    # Asking for more classes than there are is not an error worth stopping for.
    top = min(top, len(student.classes))
    with progress.wait("predicting", len(paths)) as step:
        # Results are handed out batch by batch, so that memory does not grow with the files.
        for start in range(0, len(paths), batch_size):
            yield from _batch(student, paths[start : start + batch_size], top)
            step.advance(min(batch_size, len(paths) - start))


def _batch(student: Student, paths: Sequence[Path], top: int) -> list[Prediction]:
    views: list[np.ndarray] = []
    errors: dict[Path, str] = {}
    for path in paths:
        try:
            if reason := why_not_read(path.name):
                raise BadImage(reason, path)
            views.append(student.pixels(path))
        except BadImage as error:
            # One bad file must not end the prediction of the others.
            errors[path] = error.reason
    best: Iterator[tuple[list[float], list[int]]] = iter(())
    if views:
        logits = student.logits_of_views(torch.from_numpy(np.stack(views)))
        probabilities_BK, indices_BK = logits.softmax(dim=-1).topk(top, dim=-1)
        best = iter(zip(probabilities_BK.tolist(), indices_BK.tolist(), strict=True))
    rows = []
    for path in paths:
        if path in errors:
            rows.append(Prediction(str(path), error=errors[path]))
            continue
        probabilities, indices = next(best)
        pairs = zip(indices, probabilities, strict=True)
        rows.append(Prediction(str(path), tuple((student.classes[i], p) for i, p in pairs)))
    return rows
