"""BitFit (Ben-Zaken et al. 2022, arXiv 2106.10199): train the bias terms."""

from typing import Literal

from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import Attached, Method, Options, names_where


class BitFit(Method):
    """Train every parameter whose name ends in ``bias``.

    Counts on ViT-B/16: ``all`` 102,912, ``no_norm`` 83,712, ``blocks`` 101,376 (all biases inside the blocks).
    """

    class Config(Options):
        """Which biases: ``all``, ``no_norm`` (those of norms stay frozen) or ``blocks`` (inside the blocks only)."""

        biases: Literal["all", "no_norm", "blocks"] = "all"

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        norms = tuple(f"{name}." for name, module in model.named_modules() if _is_norm(module))
        blocks = tuple(f"{block.block}." for block in anatomy.blocks)

        def chosen(name: str, parameter: nn.Parameter) -> bool:
            if not name.endswith("bias"):
                return False
            if self.config.biases == "no_norm":
                return not name.startswith(norms)
            return self.config.biases == "all" or name.startswith(blocks)

        names = names_where(model, anatomy, chosen)
        if not names:
            raise BackboneError("this backbone has no biases of the chosen kind", given=self.config.biases)
        return Attached(model, anatomy, trainable=names, no_decay=names, mergeable=True, trains_backbone=False)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
