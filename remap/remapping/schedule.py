"""How the weight or the temperature of a loss changes over a run. Imports no torch."""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What follows a loss's name in the metrics of a run.
WEIGHT, TEMPERATURE = ".weight", ".temperature"


class Schedule(BaseModel):
    """Factors of a number over a run: a linear warm-up from ``start`` to 1, then 1, or a cosine from 1 to ``end``.

    DKD's warm-up (Zhao et al. 2022, arXiv 2203.08679) is ``warmup_epochs: 20`` of the weight.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    warmup_epochs: float = Field(default=0.0, ge=0.0, description="Epochs of the linear warm-up.")
    start: float | None = Field(default=None, ge=0.0, description="Factor at the start of the warm-up; null is 0.")
    decay: Literal["none", "cosine"] = Field(default="none", description="What follows the warm-up.")
    end: float | None = Field(default=None, ge=0.0, description="Factor at the end of the cosine; null is 0.")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.start is not None and not self.warmup_epochs:
            raise ValueError("start is the factor at the start of the warm-up (set warmup_epochs)")
        if self.end is not None and self.decay == "none":
            raise ValueError("end is the factor at the end of the cosine (set decay: cosine)")
        return self

    @property
    def reaches_zero(self) -> bool:
        """Whether a factor is 0, which no temperature may be."""
        return bool(self.warmup_epochs and not self.start) or bool(self.decay == "cosine" and not self.end)

    def factor(self, update: int, steps_per_epoch: int, epochs: int) -> float:
        """Return the factor of an update, counted from 0 over the whole run."""
        warmup, total = round(self.warmup_epochs * steps_per_epoch), epochs * steps_per_epoch
        if update < warmup:
            start = self.start or 0.0
            # (update + 1): from 0, the first update would otherwise count nothing.
            return start + (1.0 - start) * (update + 1) / warmup
        if self.decay == "none":
            return 1.0
        end, progress = self.end or 0.0, (update - warmup) / max(1, total - 1 - warmup)
        return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def is_scheduled(name: str) -> bool:
    """Whether an entry of the metrics is a scheduled number, and not a loss."""
    return name.endswith((WEIGHT, TEMPERATURE))
