"""The toy method."""

from pydantic import Field
from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import IN_PLACE, Attachment, Method, Options, names_where


class FinalNorm(Method):
    """Train the norm after the last block."""

    class Config(Options):
        """Options."""

        bias: bool = Field(default=True, description="Train the bias too.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        """Train ``norm.weight`` and, by default, ``norm.bias``."""
        wanted = {"norm.weight", "norm.bias"} if self.config.bias else {"norm.weight"}
        return Attachment(trainable=names_where(model, anatomy, lambda name: name in wanted), fold=IN_PLACE)
