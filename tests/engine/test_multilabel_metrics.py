"""Metrics of several classes an image, against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torchmetrics.functional.classification import multilabel_average_precision

from remap.engine import multilabel
from remap.engine.evaluation import Evaluation
from remap.engine.metrics import metrics
from remap.engine.multilabel import SetEvaluation, SetScoring, average_precision, base_rate
from remap.engine.selection import selection_metric

DRAWS = np.random.default_rng(0)
# Rounded, so that images tie; no image has the last class.
LOGITS = DRAWS.standard_normal((50, 5)).round(1).astype(np.float32)
SETS = (DRAWS.random((50, 5)) < (0.5, 0.3, 0.2, 0.05, 0.0)).astype(np.int8)


def evaluated(logits: np.ndarray = LOGITS, sets: np.ndarray = SETS, left_out: int = 0) -> Evaluation:
    scoring = SetScoring()
    (answers,) = scoring.blank(len(sets), sets.shape[1], torch.device("cpu"))
    (rows,) = scoring.of(torch.tensor(logits[left_out:]), torch.tensor(sets[left_out:]))
    answers[:, left_out:] = rows
    return scoring.evaluation((answers.numpy(),), sets)


def test_average_precision_is_that_of_scikit_learn() -> None:
    for label in range(4):
        expected = average_precision_score(SETS[:, label], LOGITS[:, label])
        assert average_precision(LOGITS[:, label], SETS[:, label] == 1) == pytest.approx(expected, abs=1e-12)


def test_all_metrics_are_those_of_the_libraries() -> None:
    found, named = metrics(evaluated(), SETS), LOGITS >= 0
    assert (LOGITS == 0).any(), "a probability of 0.5, from which on a class is named"
    of_torchmetrics = multilabel_average_precision(torch.tensor(LOGITS[:, :4]), torch.tensor(SETS[:, :4]).int(), 4)
    assert found["mAP"] == pytest.approx(float(of_torchmetrics), abs=1e-6)
    assert found["f1_micro"] == pytest.approx(f1_score(SETS, named, average="micro"))
    assert found["f1_macro"] == pytest.approx(f1_score(SETS, named, average="macro"))
    assert found["exact_match"] == pytest.approx((named == SETS).all(axis=1).mean())


def test_the_interval_is_of_images_drawn_with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draw against scikit-learn, with how often an image was drawn as its weight."""
    monkeypatch.setattr(multilabel, "DRAWS", 20)
    found, draws, expected = evaluated(left_out=10), np.random.default_rng(0), []
    for _ in range(20):
        times = np.bincount(draws.integers(40, size=40), minlength=40)
        known = [label for label in range(4) if (times * SETS[10:, label]).any()]
        pairs = [(SETS[10:, label], LOGITS[10:, label]) for label in known]
        expected.append(np.mean([average_precision_score(*pair, sample_weight=times) for pair in pairs]))
    assert isinstance(found, SetEvaluation)
    assert found.draws_K == pytest.approx(np.array(expected), abs=1e-9)
    assert found.interval() == pytest.approx(tuple(np.percentile(expected, (2.5, 97.5))), abs=1e-9)


def test_few_images_give_an_interval_all_the_same() -> None:
    """A ranking without a mistake has none in any draw; of no image, nothing is known."""
    perfect, nothing = evaluated(SETS - 0.5), evaluated(LOGITS, np.zeros_like(SETS))
    assert isinstance(perfect, SetEvaluation) and isinstance(nothing, SetEvaluation)
    assert perfect.interval() == (1.0, 1.0) and nothing.interval() == (0.0, 1.0)


def test_what_is_left_out_counts_nothing() -> None:
    found = evaluated(left_out=10)
    rest = evaluated(LOGITS[10:], SETS[10:])
    assert found.count == 40 and metrics(found, SETS) == metrics(rest, SETS[10:])
    assert found.loss == pytest.approx(rest.loss) and (found.predictions_N[:10] == -1).all()


def test_metrics_choose_an_epoch() -> None:
    found = evaluated()
    assert selection_metric("mAP", found, SETS) == found.merit
    assert selection_metric("f1_micro", found, SETS) == metrics(found, SETS)["f1_micro"]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(LOGITS), torch.tensor(SETS).float())
    assert selection_metric("loss", found, SETS) == pytest.approx(float(expected))


def test_agreement_counts_each_class_of_each_image() -> None:
    other = LOGITS.copy()
    other[:10] *= -1
    changed = (LOGITS[:10] != 0).sum()
    assert metrics(evaluated(), SETS, evaluated(other))["teacher_agreement"] == pytest.approx(1 - changed / LOGITS.size)


def test_an_answer_that_is_not_finite_is_as_wrong_as_can_be() -> None:
    logits = LOGITS.copy()
    logits[0] = float("nan")
    found = evaluated(logits)
    assert np.isfinite(found.merit) and not found.right_of(found.labels_NC)[0] and found.losses_N[0] == 1e4


def test_chance_is_the_mean_share_of_the_classes_that_there_are() -> None:
    assert base_rate(SETS) == pytest.approx(SETS.mean(axis=0)[:4].mean())
