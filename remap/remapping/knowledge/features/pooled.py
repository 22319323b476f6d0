"""Feature distillation behind pooling. B batch, D width (student and teacher differ)."""

from collections.abc import Mapping

from torch import Tensor

from remap.remapping.knowledge.features.terms import PooledTerm, ProjectedOptions, distance, pooled, projector
from remap.remapping.labels import Labels
from remap.remapping.normalization import TargetNorm
from remap.remapping.objective import Pair
from remap.remapping.signals import Signals, float32_region
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

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        width = pair.known_teacher("feature").width
        self.projector = projector(config, pair.student.width, width)
        self.norm = TargetNorm(config.normalize, width)

    def normalizers(self) -> dict[str, TargetNorm]:
        return {POOLED: self.norm}

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        pooled_BD = pooled(student)
        with float32_region(pooled_BD):
            return distance(self.config.loss, self.projector(pooled_BD), self.norm(target[POOLED].float()))
