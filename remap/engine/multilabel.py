"""Evaluation where an image has any number of classes: average precision, and F1 of the classes that are named.

A class is named from a probability of 0.5 on, so from a logit of 0 on. A few lines of numpy, as
``remap.engine.metrics``; the tests compare them with scikit-learn and torchmetrics. Letters: N images, C classes.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from remap.data import METRIC, MULTILABEL
from remap.engine.evaluation import MOST, Evaluation, Scoring

# Draws of the bootstrap; of so many answers or more, a fifth of them: of 400,000, one takes 15 ms.
DRAWS, LARGE = 1000, 200_000


@dataclass(frozen=True)
class SetEvaluation(Evaluation):
    """``correct`` counts the images whose classes are named exactly; ``predictions_N`` is 0, or -1 where left out.

    Attributes:
        losses_N: Binary cross-entropy, mean over classes.
        scores_NC: Logits.
        labels_NC: Multi-hot.
    """

    scores_NC: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    labels_NC: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int8))
    metric: ClassVar[str] = METRIC[MULTILABEL]

    @property
    def merit(self) -> float:
        """Mean average precision over the classes of which there is an image; 0 where there is none."""
        known_C = [one for one in self.precision_C if one is not None]
        return float(np.mean(known_C)) if known_C else 0.0

    def right_of(self, labels: np.ndarray) -> np.ndarray:
        """Return of which images all classes are named, and no other."""
        return (self.predictions_N >= 0) & (self.named_NC == (labels == 1)).all(axis=1)

    def of_class(self, label: int, labels: np.ndarray) -> tuple[int, float | None]:
        return int((labels[self.predictions_N >= 0, label] == 1).sum()), self.precision_C[label]

    @cached_property
    def precision_C(self) -> list[float | None]:
        """Average precision of each class, over the images that could be read; None without an image of the class."""
        seen_N = self.predictions_N >= 0
        columns = zip(self.scores_NC[seen_N].T, self.labels_NC[seen_N].T == 1, strict=True)
        return [average_precision(scores_N, has_N) if has_N.any() else None for scores_N, has_N in columns]

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of ``merit`` by the percentile bootstrap (Efron 1979)."""
        low, high = map(float, np.percentile(self.draws_K, (2.5, 97.5))) if len(self.draws_K) else (0.0, 1.0)
        return min(low, self.merit), max(high, self.merit)

    @cached_property
    def draws_K(self) -> np.ndarray:
        """``merit`` on K draws of as many images with replacement; none where no image has a class.

        The same images every time, so that networks which saw the same ones can be compared draw by draw. A draw
        without an image of a class leaves it out.
        """
        seen_N = self.predictions_N >= 0
        scores_CN, has_CN = self.scores_NC[seen_N].T, self.labels_NC[seen_N].T == 1
        scores_CN, has_CN = scores_CN[has_CN.any(1)], has_CN[has_CN.any(1)]
        if not len(has_CN):
            return np.zeros(0)
        draws = DRAWS if scores_CN.size < LARGE else DRAWS // 5
        order_CN = np.argsort(-scores_CN, axis=1, kind="stable")
        scores_CN, has_CN = (np.take_along_axis(rows, order_CN, 1) for rows in (scores_CN, has_CN))
        # Images of equal scores share a threshold: the precision at the last of them counts for each.
        ends = np.append(np.diff(scores_CN, axis=1) != 0, np.ones((len(has_CN), 1), bool), axis=1)
        count = has_CN.shape[1]
        last_CN = np.minimum.accumulate(np.where(ends, np.arange(count), count)[:, ::-1], axis=1)[:, ::-1]
        generator, found = np.random.default_rng(0), []
        for _ in range(draws):
            # How often each image is drawn, in the order of scores: so all draws share one sorting.
            times_CN = np.bincount(generator.integers(count, size=count), minlength=count)[order_CN]
            hits_CN = times_CN * has_CN
            # Before the first image that is drawn there are no hits: 1 avoids 0 / 0.
            precision_CN = hits_CN.cumsum(1) / np.maximum(times_CN.cumsum(1), 1)
            total_C = hits_CN.sum(1)
            sums_C = (hits_CN * np.take_along_axis(precision_CN, last_CN, 1)).sum(1)
            found.append(float((sums_C[total_C > 0] / total_C[total_C > 0]).mean()) if total_C.any() else 0.0)
        return np.array(found)

    @property
    def named_NC(self) -> np.ndarray:
        """Which classes are named, of the images that could be read."""
        return self.scores_NC >= 0

    def metrics(self, teacher: Evaluation | None = None) -> dict[str, float]:
        """Return shares from 0 to 1, over the images that could be read; empty where there are none.

        Returns:
            mAP; f1_micro (of all answers) and f1_macro (mean over classes that an image has or is said to have);
            exact_match (images whose classes are named exactly), and teacher_agreement (how often both say the same
            of a class) where there is a teacher.
        """
        seen_N = self.predictions_N >= 0
        if not seen_N.any():
            return {}
        named, has = self.named_NC[seen_N], self.labels_NC[seen_N] == 1
        both_C, either_C = (named & has).sum(0), named.sum(0) + has.sum(0)
        known_C = either_C > 0
        figures = {
            MAP: self.merit,
            "f1_micro": float(2 * both_C.sum() / max(1, either_C.sum())),
            "f1_macro": float((2 * both_C[known_C] / either_C[known_C]).mean()) if known_C.any() else 0.0,
            "exact_match": self.accuracy,
        }
        if isinstance(teacher, SetEvaluation) and (seen_N & (teacher.predictions_N >= 0)).any():
            alike_NC = (self.named_NC == teacher.named_NC)[seen_N & (teacher.predictions_N >= 0)]
            figures["teacher_agreement"] = float(alike_NC.mean())
        return figures


MAP = SetEvaluation.metric


class SetScoring(Scoring):
    """Keeps the loss and the logits of each image."""

    def blank(self, images: int, classes: int, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.full((1 + classes, images), float("-inf"), device=device),)  # any finite number may be a logit

    def of(self, logits_BC: Tensor, labels_BC: Tensor) -> tuple[Tensor, ...]:
        wanted_BC = labels_BC.float()
        losses_B = F.binary_cross_entropy_with_logits(logits_BC, wanted_BC, reduction="none").mean(dim=1)
        # An answer that is not finite is as wrong as can be.
        wrong_BC = torch.where(wanted_BC == 1, -MOST, MOST)
        logits_BC = torch.where(logits_BC.isfinite(), logits_BC, wrong_BC)
        return (torch.cat([losses_B.nan_to_num(MOST, MOST)[None], logits_BC.T]),)

    def evaluation(self, answers: tuple[np.ndarray, ...], labels: np.ndarray) -> Evaluation:
        losses_N, scores_NC = answers[0][0], answers[0][1:].T
        seen_N = losses_N >= 0
        # ``right_of`` tells what is right, and needs the object: so ``correct`` comes second.
        found = SetEvaluation(0, int(seen_N.sum()), np.where(seen_N, 0, -1), scores_NC=scores_NC, labels_NC=labels)
        return replace(found, correct=int(found.right_of(labels).sum()), losses_N=np.where(seen_N, losses_N, -1.0))


def average_precision(scores_N: np.ndarray, has_N: np.ndarray) -> float:
    """Return sum over thresholds of (recall - recall before) * precision; images of equal scores share a threshold."""
    order = np.argsort(-scores_N, kind="stable")
    ends_K = np.flatnonzero(np.append(np.diff(scores_N[order]) != 0, True))
    true_K = np.cumsum(has_N[order])[ends_K]
    return float((np.diff(true_K, prepend=0) * true_K / (ends_K + 1)).sum() / has_N.sum())


def base_rate(labels_NC: np.ndarray) -> float:
    """Return the mean average precision of chance: the share of images of a class, mean over classes with an image."""
    shares_C = (labels_NC == 1).mean(axis=0)
    return float(shares_C[shares_C > 0].mean()) if (shares_C > 0).any() else 0.0
