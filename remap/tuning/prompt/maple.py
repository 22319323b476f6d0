"""Prompts of both towers, those of the images maps of those of the words (MaPLe).

Letters: B images, C classes, M prompts of a block, D widths of the towers, E dimensions that images and texts share.
"""

from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, module_at
from remap.language.pair import require_language
from remap.tuning.base import Attachment, Edits, Method
from remap.tuning.prompt.context import ContextOptions, DeepContext
from remap.tuning.prompt.prompts import PromptOptions, weight_like
from remap.tuning.prompt.sequence_prompts import Prompts, attach_prompts
from remap.tuning.words import WordHead, in_place_of_head, insert_words


class ImagePrompts(Prompts):
    """Prompts of some blocks of an image tower, whose last ones go on through the blocks behind.

    Those of block 0 pass the norm in front of the blocks, where the patches pass it (CLIP), as in the authors' code.

    Args:
        first, end: The blocks with prompts of their own.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, count: int, end: int, *, first: int = 0) -> None:
        options, like = PromptOptions(num_prompts=count), weight_like(model, anatomy)
        super().__init__(anatomy, options, range(first, end), end - first, like)
        nn.init.normal_(self.prompts, std=0.02)
        # In a tuple: it is the backbone's. The other norms outside the blocks stand behind them.
        self._norms = tuple(module_at(model, path) for path in anatomy.embedding_norms if path == "norm_pre")

    def tokens(self, index: int) -> Tensor:
        prompts_MD = self.raw(index)
        for norm in self._norms if index == 0 else ():
            prompts_MD = norm.forward(prompts_MD)
        return prompts_MD

    def raw(self, index: int) -> Tensor:
        """Return the prompts (M, D) of a block, in front of a norm."""
        return super().tokens(index)


class MaPLe(Method):
    """Prompts of the words in the first blocks, and linear maps of them in the image tower.

    Khattak et al. 2023, arXiv 2210.03117, equations 3 to 8: depth * (M*D_t + D_t*D_v + D_v) parameters.

    The words become a classifier in the end; the image prompts stay in the tuned model.
    """

    class Config(ContextOptions):
        num_context: int = Field(default=2, ge=1, description="Prompts of a block, in either tower.")
        words: str | None = Field(
            default="a photo of a", description="Words in front of the name; the first num_context tokens are learned."
        )
        depth: int = Field(default=9, ge=1, description="First blocks with prompts of their own, at most all.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        words = DeepContext(model, anatomy, "maple", self.config, common_depth(self.config.depth, model, anatomy))
        return attach_both(Edits(model), anatomy, words, Coupled(model, anatomy, words))


class Coupled(ImagePrompts):
    """Image prompts that are linear maps of the words' prompts, one map a block."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, words: DeepContext) -> None:
        super().__init__(model, anatomy, words.count, len(words.deep) + 1)
        del self.prompts
        self._words = (words,)
        width = words.context.shape[-1]
        self.maps = nn.ModuleList(nn.Linear(width, anatomy.blocks[0].width) for _ in self.own)

    def raw(self, index: int) -> Tensor:
        return self.maps[index](self._words[0].of_block(index))


def common_depth(depth: int, model: nn.Module, anatomy: Anatomy) -> int:
    """Return a number of first blocks that both towers have."""
    return min(depth, anatomy.depth, require_language(model, "prompts of both towers").side.config.depth)


def attach_both(edits: Edits, anatomy: Anatomy, words: WordHead, prompts: ImagePrompts) -> Attachment:
    """Attach prompts of the words and of the image tower."""
    insert_words(edits, anatomy, words)
    attach_prompts(edits, anatomy, prompts)
    return in_place_of_head(edits, extra_tokens=prompts.length)
