"""Partial fine-tuning (the baseline partial-k of Jia et al. 2022, arXiv 2203.12119): the last blocks train.

Letters: B batch, T tokens, D width.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, AttentionBlock, Block, module_at, rest_of_forward
from remap.backbones.block_reader import BlockReader, apart, reads_one_row
from remap.backbones.families.stages import StageBlock
from remap.backbones.typed import as_timm
from remap.errors import BackboneError
from remap.tuning.base import IN_PLACE, Attachment, Method, Options, names_where
from remap.tuning.dropout import drawn_rate
from remap.tuning.seam import BlockSeam


class Partial(Method):
    """Train the last ``num_blocks`` blocks, or chosen ones, and the final norm: k blocks + 2*D parameters.

    Of networks that are read by their stages, blocks are stages, with all that is behind the last one a part of it.
    """

    class Config(Options):
        num_blocks: int = Field(default=1, ge=1, description="Number of last blocks to train.")
        blocks: tuple[NonNegativeInt, ...] | None = Field(
            default=None, min_length=1, description="Blocks to train, counted from 0; null is the last num_blocks."
        )
        parts: Literal["all", "attention", "mlp"] = Field(
            default="all", description="Branch to train, with norm and LayerScale."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        chosen = self._blocks(anatomy)
        if anatomy.in_stages:
            return self._stages(model, anatomy, chosen)
        modules: list[str] = []
        tensors: list[str] = []
        for index in chosen:
            inside, scale = _part(anatomy.blocks[index], self.config.parts, anatomy)
            modules += inside
            tensors += scale
        if anatomy.final_norm is not None:
            modules.append(anatomy.final_norm)
        prefixes, exact = tuple(f"{path}." for path in modules), set(tensors)
        names = names_where(model, anatomy, lambda name: name.startswith(prefixes) or name in exact)
        one_row = chosen == [anatomy.depth - 1] and reads_one_row(anatomy)
        seam = ClassRowSeam(model, anatomy) if one_row else BlockSeam(model, anatomy, chosen[0])
        return Attachment(trainable=names, tuned_modules=modules, seam=seam, fold=IN_PLACE)

    def _stages(self, model: nn.Module, anatomy: Anatomy, chosen: list[int]) -> Attachment:
        names: set[str] = set()
        for block in (anatomy.blocks[index] for index in chosen):
            assert isinstance(block, StageBlock)
            _part(block, self.config.parts, anatomy)
            names.update(block.parameters)
        return Attachment(trainable=sorted(names), tuned_modules=_covered(model, names), fold=IN_PLACE)

    def _blocks(self, anatomy: Anatomy) -> list[int]:
        """Return the sorted indices of the chosen blocks."""
        if self.config.blocks is not None:
            chosen = sorted(set(self.config.blocks))
        else:
            chosen = list(range(anatomy.depth - self.config.num_blocks, anatomy.depth))
        if chosen[0] < 0 or chosen[-1] >= anatomy.depth:
            raise BackboneError(
                "partial must train blocks that this backbone does not have",
                given=f"{self.config.num_blocks} blocks" if self.config.blocks is None else f"blocks {chosen}",
                allowed=f"{anatomy.depth} blocks, 0 to {anatomy.depth - 1}",
            )
        return chosen


def _part(paths: Block, parts: str, anatomy: Anatomy) -> tuple[list[str], list[str]]:
    """Return the modules whose parameters train, and single tensors beside them."""
    if parts == "all":
        return [paths.block], []
    if not isinstance(paths, AttentionBlock):
        raise BackboneError(
            f"blocks of the family '{anatomy.family}' have no branch '{parts}'", given=parts, allowed="parts: all"
        )
    if parts == "attention":
        modules, scale = [paths.norm1, paths.attn, paths.attn_branch_end], paths.attn_scale
    else:
        modules, scale = [paths.norm2, paths.mlp, paths.mlp_branch_end], paths.mlp_scale
    return modules, [scale] if scale is not None else []


def _covered(model: nn.Module, names: set[str]) -> list[str]:
    """Return the outermost modules all of whose parameters are among ``names``, with some."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = [f"{path}.{name}" for name, _ in module.named_parameters()]
        within = path.startswith(tuple(f"{other}." for other in found))
        if path and inside and not within and names.issuperset(inside):
            found.append(path)
    return found


class ClassRowSeam(BlockSeam):
    """The last block alone is tuned and the classifier reads its class token: no other row of it is computed.

    The class token's query meets the normalised tokens themselves (``BlockReader``), so a token costs 2*H*D
    multiplications in place of the block's 12*D*D. Every parameter of the block is used, and has the gradient that
    the complete block would give it.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        super().__init__(model, anatomy, anatomy.depth - 1)
        self.reader = BlockReader(model, anatomy.attention_blocks[-1])
        self.block = module_at(model, anatomy.blocks[-1].block)

    def rest(self, kept: Mapping[str, Tensor], images_BCHW: Tensor | None, *, whole_blocks: bool) -> Tensor:
        if whole_blocks or _drops(self.block):
            return super().rest(kept, images_BCHW, whole_blocks=whole_blocks)
        row_B1D = apart(self.block, self.reader.class_row, kept["input"])
        features = rest_of_forward(self.model, self.anatomy, self.anatomy.depth, row_B1D)
        return as_timm(self.model).forward_head(features)


def _drops(block: nn.Module) -> bool:
    """Return whether dropout or drop-path is active: its masks are drawn for all rows."""
    return any(drawn_rate(module) > 0 for module in block.modules() if module.training)
