"""Losses of torchdistill behind our interface: the only place that imports it. B batch, C classes, D width.

torchdistill's mid-level losses read what hooks collected: ``{module path: {"input" | "output": tensor}}``, one
dictionary a network. Here a loss is built by class (no configuration file, no registry) and is given our signals
under one made-up path. Losses that compute something else than their paper are refused, with the reason.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torchdistill.losses.mid_level import ATLoss, DISTLoss, PKTLoss, RKDLoss, SKDInstanceLoss

from remap.remapping.knowledge.features.terms import TokenTerm, pooled
from remap.remapping.knowledge.logits.distillation import LogitsTerm, answer_to_teacher
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.remapping.signals import Needs, Signals, float32_region
from remap.remapping.targets import LOGITS, POOLED, logits_of, pooled_of
from remap.tuning.base import Options

PATH = "signal"
PLACE = {"path": PATH, "io": "output"}
OUTPUT_OF_BOTH = {
    "student_module_path": PATH,
    "student_module_io": "output",
    "teacher_module_path": PATH,
    "teacher_module_io": "output",
}

LossName = Literal["ATLoss", "DISTLoss", "PKTLoss", "RKDLoss", "SKDInstanceLoss"]
Signal = Literal["logits", "pooled", "tokens"]
Scalar = bool | int | float | str


@dataclass(frozen=True)
class Bridged:
    """A class that runs on our signals and is right.

    Attributes:
        wiring: Arguments that say where its tensors are; not the user's to choose.
        defaults: For arguments to which torchdistill gives no default.
        least: Images that a batch must have; of fewer the loss is 0.
    """

    kind: type[nn.Module]
    signals: tuple[Signal, ...]
    wiring: Mapping[str, Any]
    defaults: Mapping[str, Scalar] = field(default_factory=dict)
    least: int = 1

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the options."""
        parameters = inspect.signature(self.kind).parameters.values()
        return tuple(p.name for p in parameters if p.kind != p.VAR_KEYWORD and p.name not in self.wiring)

    def build(self, options: Mapping[str, Scalar]) -> nn.Module:
        return self.kind(**self.wiring, **{**self.defaults, **options})


BRIDGED: dict[LossName, Bridged] = {
    "ATLoss": Bridged(ATLoss, ("tokens",), {"at_pairs": {"only": {"student": PLACE, "teacher": PLACE}}}),
    "DISTLoss": Bridged(DISTLoss, ("logits",), OUTPUT_OF_BOTH),
    "PKTLoss": Bridged(PKTLoss, ("pooled", "logits"), OUTPUT_OF_BOTH),
    "RKDLoss": Bridged(
        RKDLoss,
        ("pooled", "logits"),
        {"student_output_path": PATH, "teacher_output_path": PATH},
        {"dist_factor": 1.0, "angle_factor": 2.0, "reduction": "mean"},
        least=2,
    ),
    "SKDInstanceLoss": Bridged(SKDInstanceLoss, ("logits",), OUTPUT_OF_BOTH),
}

_ADDED = "it reads the outputs of layers that torchdistill adds to both networks"
REFUSED = {
    "AffinityLoss": _ADDED,
    "AltActTransferLoss": f"{_ADDED}; tokens and fitnet have a projector",
    "AuxSSKDLoss": "it trains on four rotations of each image",
    "CCKDLoss": f"{_ADDED}; use rkd, pkt or spkd",
    "CRDLoss": "it keeps a memory of the training set, and draws from it by an attribute that does not exist "
    "(self.prob); use crd",
    "ChSimLoss": _ADDED,
    "DISTPlusLoss": "it adds correlations that should be large as a loss that should be small; use dist",
    "FSPLoss": "it needs two equally wide places in both networks",
    "FTLoss": _ADDED,
    "HierarchicalContextLoss": _ADDED,
    "KDLoss": "without the labels' part (alpha) it leaves out temperature^2 and beta; use kd",
    "KTALoss": _ADDED,
    "LogitStdKDLoss": "without the labels' part (alpha) it leaves out temperature^2 and beta; use logit_std",
    "PADL2Loss": _ADDED,
    "RegularizationLoss": "it compares nothing with a teacher",
    "SKDDirectionLoss": "its gradient is not a number where student and teacher agree (the root of 0)",
    "SPKDLoss": "it divides rows of the Gram matrix by the sum of magnitudes, the paper by the length; use spkd",
    "SRDLoss": _ADDED,
    "SSKDLoss": "it trains on four rotations of each image",
    "VIDLoss": _ADDED,
}


def run(loss: nn.Module, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
    """Call a loss of torchdistill with one tensor of each network, in float32."""
    with float32_region(student):
        return loss({PATH: {"output": student.float()}}, {PATH: {"output": teacher.float()}}, targets)


class Dist(LogitsTerm):
    """Huang et al. 2022, arXiv 2205.10536: match relations instead of probabilities.

    ``beta`` * (1 - correlation across classes, mean over images) + ``gamma`` * (1 - correlation across the images of
    the batch, mean over classes), both times ``tau`` squared, of softmax(logits / tau). The square is in the authors'
    code and in torchdistill, not in the paper. The second part needs a batch of several images: for one image it is
    the constant ``gamma``.
    """

    class Config(Options):
        beta: float = Field(default=1.0, ge=0.0, description="Weight of the correlation across classes, per image.")
        gamma: float = Field(default=1.0, ge=0.0, description="Weight of the correlation across images, per class.")
        tau: float = Field(default=1.0, gt=0.0, description="Temperature; divides the logits of both networks.")

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        self.loss = DISTLoss(**OUTPUT_OF_BOTH, beta=config.beta, gamma=config.gamma, tau=config.tau)

    @classmethod
    def temperatures_of(cls, config: Options) -> dict[str, Any]:
        return {"tau": cast(Dist.Config, config).tau}

    def scale_temperature(self, factor: float) -> None:
        super().scale_temperature(factor)
        self.loss.tau = self.config.tau

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        return run(self.loss, student_BC, teacher_BC, labels.main_B)


class Torchdistill(TokenTerm):
    """A mid-level loss of torchdistill 1.1.5 (Matsubara 2020, arXiv 2011.12913) by its class name.

    ATLoss (attention of activations) is given tokens as maps (B, D, h, w) on the student's grid: of tokens (B, N, D)
    it would sum over the wrong dimension. They are those of the last blocks, in front of the final norm, which would
    make all tokens about equally strong. The other losses get (B, C) logits or (B, D) pooled features.
    """

    class Config(Options):
        loss: LossName = Field(default="RKDLoss", description="Class name of torchdistill's loss.")
        signal: Signal = Field(default="pooled", description="Signal that the loss reads.")
        options: dict[str, Scalar] = Field(
            default_factory=dict, description="Arguments of the class, except module paths."
        )

        @field_validator("loss", mode="before")
        @classmethod
        def _not_refused(cls, value: Any) -> Any:
            if isinstance(value, str) and value in REFUSED:
                allowed = ", ".join(get_args(LossName))
                raise ValueError(f"torchdistill's {value} is not run here: {REFUSED[value]} (allowed: {allowed})")
            return value

        @model_validator(mode="after")
        def _runs(self) -> "Torchdistill.Config":
            known = BRIDGED[self.loss]
            if self.signal not in known.signals:
                raise ValueError(
                    f"{self.loss} cannot read signal '{self.signal}' (allowed: {', '.join(known.signals)})"
                )
            unknown = [name for name in self.options if name not in known.arguments]
            if unknown:
                listed = ", ".join(known.arguments) or "none"
                raise ValueError(f"torchdistill's {self.loss} has no option '{unknown[0]}' (allowed: {listed})")
            _try_out(known, self.options, self.signal)
            return self

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        teacher = pair.known_teacher("torchdistill")
        reads_tokens = config.signal == "tokens"
        super().__init__(pair, config, ((pair.student.depth - 1, teacher.depth - 1),) if reads_tokens else ())
        if config.signal == "logits":
            self.classifier = "teacher"
        self.known = BRIDGED[config.loss]
        self.loss = self.known.build(config.options)

    def reads(self, blocks: frozenset[int]) -> Needs:
        return Needs(pooled=self.config.signal == "pooled") | super().reads(blocks)

    @torch.no_grad()
    def target(self, teacher: Signals) -> dict[str, Tensor]:
        if self.config.signal == "logits":
            return logits_of(teacher)
        return pooled_of(teacher) if self.config.signal == "pooled" else super().target(teacher)

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        if self.config.signal == "logits":
            theirs = target[LOGITS]
            ours = answer_to_teacher(student)[:, : theirs.shape[1]]  # as LogitsTerm: it may know the first classes only
        elif self.config.signal == "pooled":
            ours, theirs = pooled(student), target[POOLED]
        else:
            ((s, t),) = self.blocks
            grid = self.grid(s)
            ours, theirs = (
                patches_BND.mT.unflatten(2, grid)
                for patches_BND in (student.tokens[s].patches_BND, target[self.item(s, t)])
            )
        if len(ours) < self.known.least:
            return 0.0 * ours.float().sum()
        return run(self.loss, ours, theirs)


def _try_out(known: Bridged, options: Mapping[str, Scalar], signal: Signal) -> None:
    """Run a loss on a few numbers, so that a wrong value is found before training.

    Raises:
        ValueError: It fails, or gives something else than one finite number.
    """
    shape = (3, 2, 2, 2) if signal == "tokens" else (3, 4)
    numbers = torch.arange(24, dtype=torch.float32)
    student, teacher = ((scale * numbers).sin()[: torch.Size(shape).numel()].reshape(shape) for scale in (1.0, 1.7))
    what = f"torchdistill's {known.kind.__name__}"
    given = ", ".join(f"{name}: {value}" for name, value in options.items())
    try:
        value = run(known.build(options), student, teacher)
    except Exception as error:
        raise ValueError(f"{what} does not run with options {given} ({' '.join(str(error).split())})") from error
    if value.shape != () or not torch.isfinite(value):
        raise ValueError(f"{what} gives no finite number with options {given}")
