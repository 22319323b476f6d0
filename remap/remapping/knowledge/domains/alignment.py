"""How far the pooled features of two domains lie apart. S images with labels, T without, D width.

Without two images of each domain there is nothing to compare, and the loss is 0.
"""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from remap.remapping.knowledge.features.terms import pooled
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm
from remap.remapping.signals import Needs, Signals, float32_region

# Bandwidths of the kernels, as multiples of the median squared distance.
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Alignment(LossTerm):
    """A term that compares the images of a batch that have labels with those that have none."""

    uses_teacher = False
    compares_domains = True

    def reads(self, blocks: frozenset[int]) -> Needs:
        return Needs(pooled=True)

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        features_BD, of_target_B = pooled(student), labels.classes_B < 0
        source_SD, target_TD = features_BD[~of_target_B], features_BD[of_target_B]
        if min(len(source_SD), len(target_TD)) < 2:
            return 0.0 * features_BD.sum()
        with float32_region(features_BD):
            return self.compare(source_SD, target_TD)

    @abstractmethod
    def compare(self, source_SD: Tensor, target_TD: Tensor) -> Tensor: ...


class Coral(Alignment):
    """Sun and Saenko 2016 (Deep CORAL), arXiv 1607.01719, Eq. 1 to 3: covariances (n - 1), squared norm over 4 D^2.

    Means are not compared.
    """

    def compare(self, source_SD: Tensor, target_TD: Tensor) -> Tensor:
        gap_DD = source_SD.mT.cov() - target_TD.mT.cov()
        return gap_DD.square().sum() / (4 * len(gap_DD) ** 2)


class MeanDiscrepancy(Alignment):
    """Long et al. 2015 (DAN), arXiv 1502.02791, Eq. 1 and 2: squared maximum mean discrepancy, all pairs of the batch.

    The kernel is the mean of five Gaussians exp(-|x - y|^2 / b), with b from a quarter of to four times the median
    squared distance between different images of the batch, which has no gradient. Pairs of an image with itself count,
    so that the estimate is never negative (the paper's, linear in the number of images, can be).
    """

    def compare(self, source_SD: Tensor, target_TD: Tensor) -> Tensor:
        features_BD, split = torch.cat([source_SD, target_TD]), len(source_SD)
        # Not by cdist, whose gradient at a distance of 0 is not finite under its root.
        square_B1 = features_BD.square().sum(dim=1, keepdim=True)
        squared_BB = (square_B1 + square_B1.mT - 2.0 * features_BD @ features_BD.mT).clamp_min(0.0)
        apart_BB = ~torch.eye(len(features_BD), dtype=torch.bool, device=features_BD.device)
        median = squared_BB.detach()[apart_BB].median().clamp_min(torch.finfo(torch.float32).tiny)
        kernel_BB = torch.stack([(-squared_BB / (median * factor)).exp() for factor in BANDWIDTHS]).mean(dim=0)
        within = kernel_BB[:split, :split].mean() + kernel_BB[split:, split:].mean()
        return within - 2.0 * kernel_BB[:split, split:].mean()
