"""What one pass over a split finds out of each image, and what that is worth, by the task of the labels.

Letters: B and N images, C classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from remap.data import CLASSES, METRIC

# The loss of an answer that is not a finite number.
MOST = 1e4


@dataclass(frozen=True)
class Evaluation:
    """Counts of one pass over a split, and of each image what all metrics are computed from; -1 where it was left out.

    Attributes:
        predictions_N: Its class as the network sees it.
        ranks_N: How many classes the network finds likelier than its label.
        confidences_N: Probability of the predicted class.
        losses_N: Cross-entropy, -log of its label's probability.
        metric: What ``merit`` is called.
    """

    correct: int
    count: int
    predictions_N: np.ndarray
    ranks_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    confidences_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    losses_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    metric: ClassVar[str] = METRIC[CLASSES]

    @property
    def accuracy(self) -> float:
        """Share of correct answers, from 0 to 1."""
        return self.correct / self.count if self.count else 0.0

    @property
    def merit(self) -> float:
        """The figure that networks are compared by, from 0 to 1."""
        return self.accuracy

    def of_class(self, label: int, labels: np.ndarray) -> tuple[int, float | None]:
        """Return how many images of a class could be read, and the merit of their answers; None without an image."""
        of_label_N = (self.predictions_N >= 0) & (labels == label)
        count = int(of_label_N.sum())
        return count, float((self.predictions_N[of_label_N] == label).mean()) if count else None

    def right_of(self, labels: np.ndarray) -> np.ndarray:
        """Return which images are answered right, by their labels: (N,) bool, as ``correct`` counts them."""
        # Not by rank: of equal logits two classes have rank 0, and one is the answer.
        return self.predictions_N == labels

    @property
    def loss(self) -> float:
        """Mean cross-entropy; 0 where no image was read."""
        # A sum of float32 over many images would lose digits.
        return float(self.losses_N[self.predictions_N >= 0].mean(dtype=np.float64)) if self.count else 0.0


class Scoring(ABC):
    """What is kept of each image. Images are the last dimension, and of an image all but one process keep the blank."""

    @abstractmethod
    def blank(self, images: int, classes: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return what stands for images that are left out, below all that is kept."""

    @abstractmethod
    def of(self, logits_BC: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return what is kept of some images, from float32 logits."""

    @abstractmethod
    def evaluation(self, answers: tuple[np.ndarray, ...], labels: np.ndarray) -> Evaluation:
        """Return the evaluation of all images."""


class ClassScoring(Scoring):
    """Keeps the class, its probability, and the rank and loss of the label."""

    def blank(self, images: int, classes: int, device: torch.device) -> tuple[Tensor, ...]:
        # No answer is below 0, so the largest over all processes is that of the one which saw the image.
        shape = (2, images)
        return torch.full(shape, -1, device=device), torch.full(shape, -1.0, dtype=torch.float32, device=device)

    def of(self, logits_BC: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        log_BC = logits_BC.log_softmax(dim=-1)
        losses_B1 = -log_BC.gather(1, labels[:, None])
        # The loss is the negative of an entry, to the bit, so the label itself does not count; but where nothing is
        # finite, everything does.
        ranks_B = (~(log_BC <= -losses_B1)).sum(dim=-1)
        # An answer that is not finite is as wrong as can be.
        scores_2B = torch.stack([log_BC.amax(dim=-1).exp().nan_to_num(0.0), losses_B1[:, 0].nan_to_num(MOST, MOST)])
        return torch.stack([logits_BC.argmax(dim=-1), ranks_B]), scores_2B

    def evaluation(self, answers: tuple[np.ndarray, ...], labels: np.ndarray) -> Evaluation:
        (classes, ranks_N), real_2N = answers
        seen = classes >= 0
        return Evaluation(int((classes == labels)[seen].sum()), int(seen.sum()), classes, ranks_N, *real_2N)
