"""What is known of the images of a batch: their classes, mixed or missing. B batch, C classes."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Labels:
    """Labels of a batch.

    Attributes:
        classes_B: Class of each image, int64; -1 where it has no label. Where an image has any number of classes,
            multi-hot (B, C), int8, and -1 in all of its row; ``other_B`` likewise.
        other_B: Class of the image that was mixed into it (mixup, CutMix), -1 without a label; None where nothing is
            mixed.
        share_B: How much of each image is its own, float32 in [0, 1]; None where nothing is mixed.
        labeled: Share of all training images (not of this batch) whose label is known; of mixed ones, both labels.
        weights_C: What an image of each class counts in a loss on labels, float32; None counts them alike. Where an
            image has any number of classes, what a yes counts beside a no.
    """

    classes_B: Tensor
    other_B: Tensor | None = None
    share_B: Tensor | None = None
    labeled: float = 1.0
    weights_C: Tensor | None = None

    @property
    def known_B(self) -> Tensor:
        """Whether the label is known; of a mixed image, both labels."""
        known = _known(self.classes_B)
        return known if self.other_B is None else known & _known(self.other_B)

    @property
    def main_B(self) -> Tensor:
        """One class an image: of a mixed one that with the larger share; 0 stands in where none is known."""
        return self._larger_share_B().clamp_min(0)

    def main_or(self, guess_B: Tensor) -> Tensor:
        """Return one class an image: of a mixed one that with the larger share; ``guess_B`` where it is not known."""
        main = self._larger_share_B()
        return torch.where(main >= 0, main, guess_B)

    def _larger_share_B(self) -> Tensor:
        if self.other_B is None or self.share_B is None:
            return self.classes_B
        return torch.where(self.share_B >= 0.5, self.classes_B, self.other_B)

    def probabilities_BC(self, num_classes: int) -> Tensor:
        """Return the label as a distribution, or as one for each class, float32; rows without one mean nothing."""
        own = _probabilities(self.classes_B, num_classes)
        if self.other_B is None or self.share_B is None:
            return own
        other = _probabilities(self.other_B, num_classes)
        share = self.share_B[:, None]
        return share * own + (1.0 - share) * other

    def mean(self, losses_B: Tensor) -> Tensor:
        """Return the mean of a loss over labelled images.

        Where some training images have no label, the sum over those that have one is divided by how many a batch of
        this size has on average. So the expected value is the mean over labelled images, and the parts of a batch on
        several processes add up.
        """
        if self.labeled == 1.0:
            return losses_B.mean()
        expected = losses_B.shape[0] * max(self.labeled, torch.finfo(torch.float32).tiny)
        return torch.where(self.known_B, losses_B, 0.0).sum() / expected


def _known(classes: Tensor) -> Tensor:
    return (classes if classes.ndim == 1 else classes[:, 0]) >= 0


def _probabilities(classes: Tensor, num_classes: int) -> Tensor:
    known = classes.clamp_min(0)
    return (F.one_hot(known, num_classes) if classes.ndim == 1 else known).float()
