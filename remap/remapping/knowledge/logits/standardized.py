"""Standardised logits in front of another loss. B batch, C classes; all in float32."""

from typing import Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from remap.registry import did_you_mean
from remap.remapping import LOSSES
from remap.remapping.knowledge.logits.distillation import LogitsTerm
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.tuning.base import Options

BASE_TEMPERATURE = 2.0
EPSILON = 1e-7


class LogitStandardization(LogitsTerm):
    """Sun et al. 2024, arXiv 2403.01427: z-score each image's logits of both networks, then distil as usual.

    The student has to get the teacher's logits right only up to a shift and its own positive factor for each
    image. z = (x - mean) / (std + 1e-7) over the classes, with the unbiased standard deviation (C - 1) of the authors'
    code. The loss behind it has a temperature of 2 unless its options give another.

    The default weight of 9 is the authors' for kd, with the labels' cross-entropy at 1: the value is small, since
    z-scores divided by 2 are all near each other. For mlkd they standardise the instance level alone; here all levels
    read the same logits. As on their own, dist and mlkd compare the images of a batch with each other.
    """

    class Config(Options):
        of: Literal["kd", "dkd", "nkd", "dist", "mlkd"] = Field(default="kd", description="Loss on the z-scores.")
        options: dict[str, Any] = Field(
            default_factory=dict,
            validate_default=True,
            description="Options of that loss; temperature is 2 unless given.",
        )

        @field_validator("options")
        @classmethod
        def _all_options_of_the_loss(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
            """Check them against the loss's own class, and write its defaults out."""
            if "of" not in info.data:  # not a loss at all, and reported as that
                return given
            config = LOSSES.load(info.data["of"]).Config
            known = tuple(config.model_fields)
            for name in given:
                if name not in known:
                    hint = f"{did_you_mean(name, known)} (allowed: {', '.join(known)})"
                    raise ValueError(f"{info.data['of']} has no option '{name}'{hint}")
            base = {name: BASE_TEMPERATURE for name in ("temperature", "tau") if name in known}
            return config(**{**base, **given}).model_dump(mode="json")

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        kind: type[LogitsTerm] = LOSSES.load(config.of)
        self.inner = kind(pair, kind.Config(**config.options))

    @classmethod
    def temperatures_of(cls, config: Options) -> dict[str, Any]:
        config = cast(LogitStandardization.Config, config)
        kind: type[LogitsTerm] = LOSSES.load(config.of)
        return kind.temperatures_of(kind.Config(**config.options))

    def scale_temperature(self, factor: float) -> None:
        self.inner.scale_temperature(factor)
        self.config = self.config.model_copy(update={"options": self.inner.config.model_dump(mode="json")})

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        return self.inner.compare(standardized(student_BC), standardized(teacher_BC), labels)


def standardized(logits_BC: Tensor) -> Tensor:
    """Return each row with mean 0 and unbiased standard deviation 1; a row of equal logits becomes zeros."""
    x_BC = logits_BC.float()
    x_BC = x_BC - x_BC.mean(dim=-1, keepdim=True)
    return x_BC / (x_BC.std(dim=-1, keepdim=True) + EPSILON)
