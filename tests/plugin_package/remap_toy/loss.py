"""The toy loss. B images, C classes."""

from collections.abc import Mapping

from torch import Tensor

from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm
from remap.remapping.signals import Signals
from remap.remapping.targets import LOGITS, logits_of
from remap.tuning.base import Options


class SquaredLogits(LossTerm):
    """Ba and Caruana 2014, arXiv 1312.6184: squared difference of the logits, mean over classes and images."""

    class Config(Options):
        """Options."""

        scale: float = 1.0

    config: Config
    classifier = "teacher"

    def target(self, teacher: Signals) -> dict[str, Tensor]:
        """Return the teacher's logits (B, C), which are cached when views are fixed."""
        return logits_of(teacher)

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Return the unweighted loss, a float32 scalar."""
        return self.config.scale * (student.logits_BC.float() - target[LOGITS]).square().mean()
