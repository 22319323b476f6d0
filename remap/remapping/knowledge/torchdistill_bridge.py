"""Losses of torchdistill behind our interface: the only place that imports it. B batch, C classes.

torchdistill's mid-level losses read what hooks collected: ``{module path: {"input" | "output": tensor}}``, one
dictionary a network. Here a loss is built by class (no configuration file, no name lookup) and is given our signals
under one made-up path.
"""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn
from torchdistill.losses.mid_level import DISTLoss

from remap.remapping.items import LOGITS, logits_of
from remap.remapping.knowledge.logits.plain import answer_to_teacher
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Pair
from remap.remapping.signals import Signals, float32_region
from remap.tuning.base import Options

LOGITS_PATH = "logits"
LOGITS_OF_BOTH = {
    "student_module_path": LOGITS_PATH,
    "student_module_io": "output",
    "teacher_module_path": LOGITS_PATH,
    "teacher_module_io": "output",
}


class LogitsBridge(LossTerm):
    """A mid-level loss of torchdistill that reads the logits of both networks, computed in float32.

    Args:
        loss: Built with ``LOGITS_OF_BOTH`` as its module paths; called with (student io, teacher io, labels).
    """

    def __init__(self, pair: Pair, config: Options, loss: nn.Module) -> None:
        super().__init__(pair, config)
        self.loss = loss

    def target(self, teacher: Signals) -> dict[str, Tensor]:
        return logits_of(teacher)

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        logits_BC = answer_to_teacher(student)
        with float32_region(logits_BC):
            return self.loss(_logits_io(logits_BC), _logits_io(target[LOGITS]), labels.main_B)


class Dist(LogitsBridge):
    """Huang et al. 2022, arXiv 2205.10536: match relations instead of probabilities.

    ``beta`` * (1 - correlation across classes, mean over images) + ``gamma`` * (1 - correlation across the images of
    the batch, mean over classes), both times ``tau`` squared, of softmax(logits / tau). The square is in the authors'
    code and in torchdistill, not in the paper. The second part needs a batch of several images: for one image it is
    the constant ``gamma``.
    """

    class Config(Options):
        """Options: weight across classes, weight across images, temperature."""

        beta: float = Field(default=1.0, ge=0.0)
        gamma: float = Field(default=1.0, ge=0.0)
        tau: float = Field(default=1.0, gt=0.0)

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        loss = DISTLoss(**LOGITS_OF_BOTH, beta=config.beta, gamma=config.gamma, tau=config.tau)
        super().__init__(pair, config, loss)


def _logits_io(logits_BC: Tensor) -> dict[str, dict[str, Tensor]]:
    return {LOGITS_PATH: {"output": logits_BC.float()}}
