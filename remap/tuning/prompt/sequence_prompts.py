"""Prompts as tokens of a sequence model, with the hooks that its blocks get.

Letters: B batch, T tokens of the backbone (prefix and patches), P prefix tokens, N patches, p prompts, D width,
(h, w) patch size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, admit_tokens
from remap.tuning.base import Edits
from remap.tuning.dropout import SampleDropout
from remap.tuning.prompt.prompts import CARRIED, PATH, PromptOptions, carried, patch_bound, weight_like


class Prompts(nn.Module):
    """The prompts of a sequence model and the hooks its blocks get.

    A prompt exists inside a block only: ``put_in`` adds the prompts to a block's input and ``take_out`` cuts them
    from its output, so pooling, the final norm and ``forward_intermediates`` see the tokens they always see.

    Prompts that outlive their block cross to the next one as an attribute of the token tensor. That ties them to one
    forward pass: a block that gradient checkpointing runs again, after any number of other forward passes, gets
    the same input tensor and so the same prompts, and nothing stays behind in the model to be copied or saved.

    The hooks are partials of bound methods, which ``copy.deepcopy`` binds to the copied module.

    Args:
        own: Blocks with prompts of their own. Those behind get the outputs of the block before.
        sets: Sets of prompts: one for each block of ``own``, or 1 for all of them.
        embedding: The frozen module that embeds images, for prompts in pixels.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        config: PromptOptions,
        own: range,
        sets: int,
        like: Tensor,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prefix, self.depth, self.own, self.sets = anatomy.num_prefix_tokens, anatomy.depth, own, sets
        self.image_size, self.patch_size, self.grid = anatomy.image_size, anatomy.patch_size, anatomy.grid
        # In a tuple: the embedding is the backbone's and must not be registered here as well.
        self._embedding: tuple[nn.Module, ...] = () if embedding is None else (embedding,)
        # Tokens in front of those that prompts are added to.
        self.skipped = 0 if config.place == "add_all" else self.prefix
        added = self.prefix + anatomy.num_patches - self.skipped
        self.length = added if config.added else config.num_prompts
        width = config.projection or anatomy.width
        shape = (width,) if embedding is None else (next(embedding.parameters()).shape[1], *self.patch_size)
        self.prompts = nn.Parameter(torch.empty(sets, self.length, *shape, device=like.device, dtype=like.dtype))
        self.dropouts = nn.ModuleList(SampleDropout(config.dropout, site) for site in range(len(own)))
        bound = patch_bound(anatomy, width)
        nn.init.uniform_(self.prompts, -bound, bound)
        self.projection: nn.Module = nn.Identity()
        if config.projection is not None:
            linear = nn.Linear(width, anatomy.width, device=like.device, dtype=like.dtype)
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            self.projection = linear
        self.idle = False

    def tokens(self, index: int) -> Tensor:
        """Return (p, D), the prompts of block ``index``."""
        stored = self.prompts[(index - self.own.start) if self.sets > 1 else 0]
        return self._embedded(stored) if self._embedding else self.projection(stored)

    def for_batch(self, index: int, dropout: nn.Module, like: Tensor) -> Tensor:
        """Return (B, p, D), with dropout."""
        return dropout(self.tokens(index).to(like.dtype).expand(like.shape[0], -1, -1))

    def dropout(self, index: int) -> nn.Module | None:
        """Return that of block ``index``, None where it has no prompts of its own.

        Hooks are given it: looking it up in them would have each block compiled anew.
        """
        return self.dropouts[index - self.own.start] if index in self.own else None

    def put_in(self, index: int, dropout: nn.Module | None, block: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook of block ``index``: (B, T, D) becomes (B, T + p, D), prompts after the prefix."""
        if self.idle:
            return None
        tokens_BTD = args[0]
        if dropout is None:
            prompts_BpD = carried(tokens_BTD, index)
        else:
            prompts_BpD = self.for_batch(index, dropout, tokens_BTD)
        # Split, not sliced: a slice's gradient is a whole tensor of zeros for each.
        prefix_BPD, patches_BND = self._split(tokens_BTD, self.prefix)
        return (torch.cat([prefix_BPD, prompts_BpD, patches_BND], dim=1), *args[1:])

    def take_out(self, index: int, block: nn.Module, args: tuple, output_BTD: Tensor) -> Tensor | None:
        """Forward hook of block ``index``: cuts the prompts' outputs, and hands them on where the next wants them."""
        if self.idle:
            return None
        prefix_BPD, prompts_BpD, patches_BND = self._split(output_BTD, self.prefix, self.length)
        tokens_BTD = torch.cat([prefix_BPD, patches_BND], dim=1)
        if self.own.stop <= index + 1 < self.depth:
            setattr(tokens_BTD, CARRIED, prompts_BpD)
        return tokens_BTD

    def add_to_tokens(self, index: int, dropout: nn.Module, block: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of block ``index``: one prompt is added to each patch, or to each token."""
        skipped, rest = self._split(args[0], self.skipped)
        return (torch.cat([skipped, rest + self.for_batch(index, dropout, args[0])], dim=1), *args[1:])

    @staticmethod
    def _split(tokens: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        """Split along the sequence, in parts of these sizes and the rest."""
        return tokens.split([*sizes, tokens.shape[1] - sum(sizes)], dim=1)

    def _embedded(self, patches_pChw: Tensor) -> Tensor:
        """Return (p, D): the patches are laid out on empty images of the size that the embedding takes."""
        (rows, columns), (height, width) = self.grid, self.patch_size
        images = -(-self.length // (rows * columns))
        filled = F.pad(patches_pChw, (0, 0, 0, 0, 0, 0, 0, images * rows * columns - self.length))
        canvas = filled.unflatten(0, (images, rows, columns)).permute(0, 3, 1, 4, 2, 5)
        canvas_CHW = canvas.reshape(images, canvas.shape[1], rows * height, columns * width)
        rest = (0, self.image_size[1] - columns * width, 0, self.image_size[0] - rows * height)
        # Past the hooks: what other methods do to images is not for prompts.
        tokens = self._embedding[0].forward(F.pad(canvas_CHW, rest))
        return tokens.reshape(images * rows * columns, -1)[: self.length]


def attach_prompts(edits: Edits, anatomy: Anatomy, prompts: Prompts) -> None:
    """Insert the module and let the blocks, which get room for them, prepend its prompts."""
    edits.insert(PATH, prompts, weight_like(edits.model, anatomy))
    for index in range(prompts.own.start, anatomy.depth):
        block = anatomy.blocks[index].block
        edits.before(block, partial(prompts.put_in, index, prompts.dropout(index)))
        edits.after(block, partial(prompts.take_out, index))
    edits.undo_by(admit_tokens(edits.model, anatomy, prompts.length, prompts.own.start))


@contextmanager
def without_prompts(model: nn.Module, anatomy: Anatomy, prompts: Prompts) -> Iterator[None]:
    """Leave the prompts out while the block runs, and the room for them: rotary models count their tokens."""
    give_back = admit_tokens(model, anatomy, -prompts.length, prompts.own.start)
    prompts.idle = True
    try:
        yield
    finally:
        prompts.idle = False
        give_back()
