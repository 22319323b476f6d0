"""BitFit (Ben-Zaken et al. 2022, arXiv 2106.10199): train the bias terms."""

from typing import Literal

from pydantic import Field
from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families.reading import norm_paths
from remap.errors import BackboneError
from remap.tuning.base import IN_PLACE, Attachment, Method, Options, names_where
from remap.tuning.parameter.norm import never_learns


class BitFit(Method):
    """Train every bias: parameters whose name ends in ``bias``.

    This takes in ``q_bias`` and ``v_bias`` and leaves out tables of relative positions. Counts on ViT-B/16: ``all``
    102,912, ``no_norm`` 83,712, ``blocks`` 101,376 (all biases inside the blocks). In networks with batch norm the
    biases are those of the norms, as their convolutions have none.
    """

    class Config(Options):
        biases: Literal["all", "no_norm", "blocks"] = Field(
            default="all", description="All, without norms, or inside blocks only."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        names = bias_parameters(model, anatomy)
        if self.config.biases == "no_norm":
            norms = norm_paths(model)
            names = [name for name in names if name.rpartition(".")[0] not in norms]
        elif self.config.biases == "blocks":
            blocks = tuple(f"{block.block}." for block in anatomy.blocks)
            names = [name for name in names if name.startswith(blocks)]
        if not names:
            raise BackboneError("this backbone has no biases of the chosen kind", given=self.config.biases)
        return Attachment(trainable=names, no_decay=names, fold=IN_PLACE)


def bias_parameters(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Return the names of all biases that can learn."""
    return names_where(model, anatomy, lambda name: name.endswith("bias") and not never_learns(name, anatomy))
