"""Feature distillation behind pooling. B batch, D width (student and teacher differ)."""

from torch import Tensor
from torch.nn import functional as F

from remap.remapping.knowledge.features.terms import PooledTerm, ProjectedOptions, ProjectorOptions, distance, projector
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


class UnitFeature(PooledTerm):
    """Feature distillation of CLIP-KD (Yang et al. 2024, arXiv 2307.12732): mean (u_s - u_t)^2 over B * D numbers.

    u_s is the student's pooled feature behind the projector and u_t the teacher's, both of length 1, so that it is
    2 (1 - cosine) / D. In vision-language models the pooled feature is the embedding that is compared with words. The
    row's weight is the paper's.
    """

    class Config(ProjectorOptions):
        """Options."""

    config: Config
    name = "clip_feature"

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        self.projector = projector(config, *self.widths)

    def compare(self, ours_BD: Tensor, theirs_BD: Tensor, labels: Labels) -> Tensor:
        return F.mse_loss(F.normalize(self.projector(ours_BD), dim=1), F.normalize(theirs_BD, dim=1))
