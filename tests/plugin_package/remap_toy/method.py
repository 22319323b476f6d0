"""The toy method."""

from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import Attached, Method, Options, names_where


class FinalNorm(Method):
    """Train the norm behind the last block."""

    class Config(Options):
        """Options."""

        bias: bool = True

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        """Train ``norm.weight`` and, by default, ``norm.bias``."""
        wanted = {"norm.weight", "norm.bias"} if self.config.bias else {"norm.weight"}
        names = names_where(model, anatomy, lambda name, _: name in wanted)
        return Attached(model, anatomy, trainable=names, no_decay=names, mergeable=True)
