"""A teacher that is trained along with the student, by adapters that share a part with the student's."""

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from remap.engine.teacher import Teacher
from remap.network import Network
from remap.remapping.knowledge.logits.distillation import CrossEntropy
from remap.remapping.labels import Labels
from remap.remapping.objective import Objective, Pair
from remap.remapping.signals import Signals


class JointTeacher(Teacher):
    """Learns from the labels by cross-entropy, with its own adapters and head and what it shares with the student.

    The student's losses read its outputs of the same step and send no gradient back: the teacher learns from the
    student through the shared parameters alone.

    Args:
        network: Tuned; frozen but for its adapters and head.
        student: Whose parameters are not counted as the teacher's.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        number: int,
        accelerator: Accelerator,
        *,
        bf16: bool,
        student: Network,
    ) -> None:
        super().__init__(network, objective, number, accelerator, bf16=bf16)
        self.labels_term = CrossEntropy(Pair(network.anatomy, None, len(network.classes or ())), CrossEntropy.Config())
        shared = {id(parameter) for parameter in student.model.parameters()}
        # Shared cores are listed by the student: twice, the optimiser would hold them under two names.
        self._own = {f"teacher{number}.{name}": p for name, p in network.trained.items() if id(p) not in shared}
        self._signals: Signals | None = None

    def targets(self, images_BCHW: Tensor, indices_B: np.ndarray, view: int) -> dict[str, Tensor]:
        # With a graph, unlike other teachers' signals: ``learn`` goes back through it.
        self._signals = self.runner(images_BCHW.to(self.device))
        return self.objective.targets(self._signals, self.number)

    def learn(self, labels: Labels, share: float) -> None:
        assert self._signals is not None
        loss = self.labels_term(self._signals, {}, labels)
        self._signals = None  # else the graph would hold all activations until the next batch
        if loss.requires_grad:  # not without a single label
            # At once, before the student runs: so one graph is in memory at a time.
            (loss * share).backward()

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._own
