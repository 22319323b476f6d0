"""Figures of merit against torchmetrics."""

import numpy as np
import pytest
import torch

from remap.engine.evaluation import Evaluation
from remap.engine.metrics import metrics


@pytest.fixture(scope="module")
def answers() -> tuple[torch.Tensor, np.ndarray, Evaluation]:
    """Logits of 60 images of 8 classes, one of which has no image; two images were left out."""
    draws = torch.Generator().manual_seed(0)
    logits_NC = torch.randn(60, 8, generator=draws) * 2
    labels_N = torch.randint(0, 7, (60,), generator=draws).numpy()
    logits_NC[torch.arange(30), labels_N[:30]] += 3
    found = logits_NC.softmax(dim=1)
    true_N = logits_NC[torch.arange(60), labels_N]
    predictions_N, seen_N = logits_NC.argmax(dim=1).numpy(), np.arange(60) >= 2
    evaluation = Evaluation(
        int((predictions_N == labels_N)[seen_N].sum()),
        58,
        np.where(seen_N, predictions_N, -1),
        np.where(seen_N, (logits_NC > true_N[:, None]).sum(dim=1).numpy(), -1),
        np.where(seen_N, found.amax(dim=1).numpy(), -1).astype(np.float32),
        np.zeros(60, np.float32),
    )
    return logits_NC[2:], labels_N, evaluation


@pytest.mark.slow
def test_metrics_are_those_of_torchmetrics(answers: tuple[torch.Tensor, np.ndarray, Evaluation]) -> None:
    of = pytest.importorskip("torchmetrics.functional.classification")
    logits_NC, labels_N, evaluation = answers
    labels, found = torch.from_numpy(labels_N[2:]), metrics(evaluation, labels_N)
    wanted = {
        "top5": of.multiclass_accuracy(logits_NC, labels, 8, average="micro", top_k=5),
        "balanced_accuracy": of.multiclass_recall(logits_NC, labels, 8, average="none")[:7].mean(),
        "f1": of.multiclass_f1_score(logits_NC, labels, 8, average="macro"),
        "calibration_error": of.multiclass_calibration_error(logits_NC, labels, 8, n_bins=15),
    }
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, abs=1e-6)


def test_metrics_of_four_images_by_hand() -> None:
    """Labels 0 0 1 1, answers 0 1 1 1: recalls 1/2 and 1, F1 2/3 and 4/5; the teacher names 0 0 1 and skips one."""
    labels_N = np.array([0, 0, 1, 1])
    sure_N = np.array([0.9, 0.6, 0.7, 1.0], np.float32)
    found = Evaluation(3, 4, np.array([0, 1, 1, 1]), np.array([0, 1, 0, 0]), sure_N, np.zeros(4))
    teacher = Evaluation(3, 3, np.array([0, 0, 1, -1]))
    assert metrics(found, labels_N, teacher) == pytest.approx(
        {
            "top5": 1.0,
            "balanced_accuracy": 0.75,
            "f1": (2 / 3 + 4 / 5) / 2,
            "calibration_error": (0.1 + 0.6 + 0.3 + 0.0) / 4,  # each in a bin of its own
            "teacher_agreement": 2 / 3,
        },
        abs=1e-6,
    )


def test_no_image_that_could_be_read_has_no_metrics() -> None:
    assert metrics(Evaluation(0, 0, np.array([-1])), np.array([0])) == {}
