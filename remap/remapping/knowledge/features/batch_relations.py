"""Relations between the images of a batch. B batch, D width (student and teacher may differ), A anchors.

They have no parameters and need no equal widths. Of a single image there is nothing to compare, and the loss is 0.
"""

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from remap.remapping.knowledge.features.terms import PooledTerm
from remap.remapping.labels import Labels
from remap.tuning.base import Options

# Squared distances below it count as none: the root has no gradient there.
TINY = 1e-12
# Two images whose squared distance is this part of their squared distances to the mean are at one place: float32 knows
# no direction between them.
NEAR = 1e-6
# Added to similarities in [0, 1] before they become probabilities: opposite features have a similarity of 0.
SIMILARITY_FLOOR = 1e-6
# Numbers that one group of anchors may hold in each of its tensors, about ten: 16 MiB each in float32.
ANCHOR_NUMBERS = 2**22


class BatchRelation(PooledTerm):
    """A term that compares how pooled features of a batch lie to each other."""

    def compare(self, ours_BD: Tensor, theirs_BD: Tensor, labels: Labels) -> Tensor:
        return 0.0 * ours_BD.sum() if len(ours_BD) < 2 else self.relate(ours_BD, theirs_BD)

    @abstractmethod
    def relate(self, ours_BD: Tensor, theirs_BD: Tensor) -> Tensor: ...


class Relational(BatchRelation):
    """Park et al. 2019 (RKD), arXiv 1904.05068: distances between two images and angles between three.

    Distances are divided by their mean over the batch; both are compared by the smooth L1 (knee at 1), mean over all
    B^2 pairs and B^3 triples. The paper's weights are 25 and 50: the row's weight and ``angle`` / ``distance`` = 2.
    Angles of B images are B^3 numbers. They are made for a group of anchors at a time and made again in the backward
    pass where the groups are several, so that memory stays at about ``ANCHOR_NUMBERS`` a tensor; ``angle: 0`` spares
    their time.
    """

    class Config(Options):
        distance: float = Field(default=1.0, ge=0.0, description="Weight of the distances between pairs.")
        angle: float = Field(default=2.0, ge=0.0, description="Weight of the angles in triples.")

    config: Config
    name = "rkd"

    def relate(self, ours_BD: Tensor, theirs_BD: Tensor) -> Tensor:
        ours_BB, theirs_BB = _gram(ours_BD), _gram(theirs_BD)
        loss = 0.0 * ours_BD.sum()
        if self.config.distance:
            gap = F.smooth_l1_loss(_relative_distances(ours_BB), _relative_distances(theirs_BB))
            loss = loss + self.config.distance * gap
        if self.config.angle:
            loss = loss + self.config.angle * _angle_gap(ours_BB, theirs_BB)
        return loss


class ProbabilisticTransfer(BatchRelation):
    """Passalis and Tefas 2018 (PKT), arXiv 1803.10837: which images are neighbours, as a distribution.

    p(j | i) is proportional to (cosine of i and j + 1) / 2; KL(teacher || student) of each image's distribution, mean
    over images. As in the paper, an image is not its own neighbour; with ``self_similarity`` it is, as in the authors'
    code and torchdistill, which both take the mean over B^2 entries instead, a B-th of ours.
    """

    class Config(Options):
        self_similarity: bool = Field(default=False, description="Count each image as a neighbour of itself.")

    config: Config
    name = "pkt"

    def relate(self, ours_BD: Tensor, theirs_BD: Tensor) -> Tensor:
        ours, theirs = (self._log_probabilities(one) for one in (ours_BD, theirs_BD))
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)

    def _log_probabilities(self, features_BD: Tensor) -> Tensor:
        unit_BD = F.normalize(features_BD, dim=1)
        similarity_BB = ((unit_BD @ unit_BD.mT + 1.0) / 2.0).clamp_min(0.0) + SIMILARITY_FLOOR
        if self.config.self_similarity:
            return (similarity_BB / similarity_BB.sum(dim=1, keepdim=True)).log()
        itself = torch.eye(len(features_BD), dtype=torch.bool, device=features_BD.device)
        similarity_BB = similarity_BB.masked_fill(itself, 0.0)
        # A logarithm of 0 on both sides takes the diagonal out of the divergence.
        return (similarity_BB / similarity_BB.sum(dim=1, keepdim=True)).masked_fill(itself, 1.0).log()


class SimilarityPreserving(BatchRelation):
    """Tung and Mori 2019 (SPKD), arXiv 1907.09682, Eq. 1 to 4: the Gram matrix of the batch, rows of length 1.

    Squared Frobenius norm of the difference, divided by B^2; the row's weight is the paper's gamma.
    """

    name = "spkd"

    def relate(self, ours_BD: Tensor, theirs_BD: Tensor) -> Tensor:
        ours_BB, theirs_BB = (F.normalize(one @ one.mT, dim=1) for one in (ours_BD, theirs_BD))
        return F.mse_loss(ours_BB, theirs_BB)


def _gram(features_BD: Tensor) -> Tensor:
    """Return products of all pairs (B, B) around the mean: what follows from them loses fewer digits there."""
    centred_BD = features_BD - features_BD.mean(dim=0).detach()
    return centred_BD @ centred_BD.mT


def _relative_distances(gram_BB: Tensor) -> Tensor:
    """Return distances of all pairs over their mean (B, B). Pairs at one place have no gradient."""
    square_B = gram_BB.diagonal()
    squared_BB = (square_B[:, None] + square_B[None, :] - 2.0 * gram_BB).clamp_min(TINY)
    itself = torch.eye(len(gram_BB), dtype=torch.bool, device=gram_BB.device)
    distance_BB = squared_BB.sqrt().masked_fill(itself, 0.0)
    pairs = len(gram_BB) * (len(gram_BB) - 1)
    return distance_BB * pairs / distance_BB.sum()


def _inverse_distances(gram_BB: Tensor) -> Tensor:
    """Return one over the distance of all pairs (B, B); 0, without a gradient, for pairs at one place."""
    square_B = gram_BB.diagonal()
    sum_BB = square_B[:, None] + square_B[None, :]
    squared_BB = sum_BB - 2.0 * gram_BB
    near_BB = squared_BB <= NEAR * sum_BB + TINY
    return squared_BB.masked_fill(near_BB, 1.0).rsqrt().masked_fill(near_BB, 0.0)


def _angle_gap(ours_BB: Tensor, theirs_BB: Tensor) -> Tensor:
    """Return the smooth L1 between cosines of all angles, mean over (anchor, image, image) triples."""
    count = len(ours_BB)
    group = max(1, ANCHOR_NUMBERS // count**2)
    given = (ours_BB, _inverse_distances(ours_BB), theirs_BB, _inverse_distances(theirs_BB))
    if group >= count:
        return _angle_sum(*given, 0, count) / count**3
    sums = [
        checkpoint(_angle_sum, *given, start, start + group, use_reentrant=False, preserve_rng_state=False)
        for start in range(0, count, group)
    ]
    return torch.stack(sums).sum() / count**3


def _angle_sum(
    ours_BB: Tensor, our_inverse_BB: Tensor, theirs_BB: Tensor, their_inverse_BB: Tensor, start: int, stop: int
) -> Tensor:
    ours_ABB = _angles(ours_BB, our_inverse_BB, start, stop)
    return F.smooth_l1_loss(ours_ABB, _angles(theirs_BB, their_inverse_BB, start, stop), reduction="sum")


def _angles(gram_BB: Tensor, inverse_BB: Tensor, start: int, stop: int) -> Tensor:
    """Return cosines (A, B, B) of the angles at images ``start`` to ``stop`` between all pairs; 0 where a side is 0.

    (x_i - x_j) . (x_k - x_j) = g_ik - g_ij - g_jk + g_jj for the anchor j: B^3 sums instead of B^3 D products.
    """
    row_AB, inverse_AB = gram_BB[start:stop], inverse_BB[start:stop]
    own_A11 = gram_BB.diagonal()[start:stop, None, None]
    product_ABB = gram_BB - row_AB[:, :, None] - row_AB[:, None, :] + own_A11
    return product_ABB * inverse_AB[:, :, None] * inverse_AB[:, None, :]
