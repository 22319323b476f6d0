"""Figures of merit of an evaluation.

A few lines of numpy each: torchmetrics, which the tests compare them with, takes seconds to import and memory for
classes squared.
"""

import numpy as np

from remap.engine.evaluation import Evaluation
from remap.engine.multilabel import SetEvaluation

# Bins of the expected calibration error, as in Guo et al. 2017 (arXiv 1706.04599).
BINS = 15


def metrics(found: Evaluation, labels_N: np.ndarray, teacher: Evaluation | None = None) -> dict[str, float]:
    """Return shares from 0 to 1, over the images that could be read; empty where there are none.

    Returns:
        top5 (of five classes or fewer it is 1), balanced_accuracy (mean over classes of the share that is right), f1
        (mean over classes), calibration_error (expected, over 15 bins of confidence), and teacher_agreement (how often
        both name the same class) where there is a teacher. Classes without an image count in no mean, but f1 counts
        those that were predicted. Of several classes an image, ``SetEvaluation.metrics``.
    """
    if isinstance(found, SetEvaluation):
        return found.metrics(teacher)
    seen_N = found.predictions_N >= 0
    if not seen_N.any():
        return {}
    predictions_N, labels_N, confidences_N = found.predictions_N[seen_N], labels_N[seen_N], found.confidences_N[seen_N]
    right_N = predictions_N == labels_N
    # The last classes may be missing in the labels or in the predictions.
    classes = int(max(predictions_N.max(), labels_N.max())) + 1
    images_C, predicted_C = (np.bincount(rows, minlength=classes) for rows in (labels_N, predictions_N))
    right_C = np.bincount(labels_N[right_N], minlength=classes)
    either_C = images_C + predicted_C
    figures = {
        "top5": float((found.ranks_N[seen_N] < 5).mean()),
        "balanced_accuracy": float((right_C[images_C > 0] / images_C[images_C > 0]).mean()),
        "f1": float((2 * right_C[either_C > 0] / either_C[either_C > 0]).mean()),
        "calibration_error": calibration_error(confidences_N, right_N),
    }
    both_N = seen_N & (teacher.predictions_N >= 0) if teacher is not None else seen_N
    if teacher is not None and both_N.any():
        figures["teacher_agreement"] = float((found.predictions_N == teacher.predictions_N)[both_N].mean())
    return figures


def calibration_error(confidences_N: np.ndarray, right_N: np.ndarray) -> float:
    """Return sum over bins of |share that is right - mean confidence|, weighted by their images."""
    # A confidence of 1 is in the last bin.
    bins_N = np.minimum((confidences_N * BINS).astype(int), BINS - 1)
    # |mean - mean| times the images of a bin is |sum - sum|, so images need not be counted.
    surplus = np.bincount(bins_N, weights=right_N - confidences_N.astype(np.float64))
    return float(np.abs(surplus).sum() / len(bins_N))
