"""Feature distillation behind pooling. B batch, D width (student and teacher differ)."""

from torch import Tensor

from remap.remapping.knowledge.features.terms import PooledTerm, ProjectedOptions, distance, projector
from remap.remapping.labels import Labels
from remap.remapping.normalization import TargetNorm
from remap.remapping.objective import Pair
from remap.remapping.targets import POOLED


class PooledFeature(PooledTerm):
    """Miles et al. 2024 (VkD), arXiv 2403.06213: project the student's pooled feature onto the teacher's.

    The pooled feature is what enters the classifier. The teacher's is layer-normed without affine, which takes its
    scale and offset out, or normalised by statistics of training images (``TargetNorm``); the student's goes through
    the projector only. Matching after pooling and at the end of the network is deliberate: tokens of early and late
    blocks of a wide teacher are more than a narrow student can hold.
    """

    class Config(ProjectedOptions):
        """Options."""

    config: Config
    name = "feature"

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        self.projector = projector(config, *self.widths)
        self.norm = TargetNorm(config.normalize, self.widths[1])

    def normalizers(self) -> dict[str, TargetNorm]:
        return {POOLED: self.norm}

    def compare(self, ours_BD: Tensor, theirs_BD: Tensor, labels: Labels) -> Tensor:
        return distance(self.config.loss, self.projector(ours_BD), self.norm(theirs_BD))
