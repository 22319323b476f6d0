"""Visual Prompt Tuning (Jia et al. 2022, arXiv 2203.12119): learned tokens beside the patches.

Letters: B batch, T tokens of the backbone (prefix and patches), P prefix tokens, N patches, p prompts, D width,
L depth, C classes, (h, w) patch size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, admit_tokens, module_at
from remap.errors import BackboneError
from remap.tuning.base import Attached, Method, Options, Sample, insert_module, inserted_parameters, vectors
from remap.tuning.dropout import SampleDropout
from remap.tuning.seam import BlockSeam
from remap.tuning.weights import registered

PATH = "remap_prompts"
# The output of a block carries its own prompts' outputs to the next block under this attribute.
CARRIED = "remap_prompt_outputs"


class _Config(Options):
    """Options of both depths."""

    num_prompts: int = Field(default=10, ge=1, description="Prompts per block; with place=add there is one per patch.")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout probability on the prompts.")
    place: Literal["prepend", "add", "pixel"] = Field(
        default="prepend", description="Prepend prompts, add them to the patches, or prepend patches learned as pixels."
    )
    projection: int | None = Field(
        default=None, ge=1, description="Stored width, widened by a linear layer; null is full width."
    )
    init: Literal["random", "class_mean"] = Field(
        default="random", description="Random, or the mean pooled feature of each class, in turn."
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "_Config":
        if self.projection is not None and self.place == "pixel":
            raise ValueError("prompts in pixels are not projected: leave projection out, or take place=prepend")
        if self.init == "class_mean" and (self.place != "prepend" or self.projection is not None):
            raise ValueError("class means are tokens of full width: they need place=prepend and no projection")
        return self


class VPTShallow(Method):
    """p prompts enter in front of block 0 and go through all blocks (equations 4 to 6): p*D parameters.

    On window transformers see ``vpt_swin``.
    """

    class Config(_Config):
        """Options."""

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        return _attach(model, anatomy, self.config, range(1))


class VPTDeep(Method):
    """Every block gets its own p prompts, those of the block before are dropped (equation 7): L*p*D parameters.

    On window transformers see ``vpt_swin``.
    """

    class Config(_Config):
        """Options."""

        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability on the prompts.")
        shared: bool = Field(default=False, description="Share one set of prompts among all blocks.")
        num_blocks: int | None = Field(
            default=None, ge=1, description="Number of first blocks with prompts of their own; null is all."
        )
        last: bool = Field(default=False, description="Count num_blocks from the end, with no prompts before.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        count = self.config.num_blocks or anatomy.depth
        if count > anatomy.depth:
            raise BackboneError(
                "there are fewer blocks than prompts are wanted for",
                given=f"num_blocks={count}",
                allowed=f"1 to {anatomy.depth}",
            )
        first = anatomy.depth - count if self.config.last else 0
        return _attach(model, anatomy, self.config, range(first, first + count), self.config.shared)


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
        self, anatomy: Anatomy, config: _Config, own: range, sets: int, like: Tensor, embedding: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.prefix, self.depth, self.own, self.sets = anatomy.num_prefix_tokens, anatomy.depth, own, sets
        self.image_size, self.patch_size, self.grid = anatomy.image_size, anatomy.patch_size, anatomy.grid
        # In a tuple: the embedding is the backbone's, and must not be registered here as well.
        self._embedding = () if embedding is None else (embedding,)
        self.length = anatomy.num_patches if config.place == "add" else config.num_prompts
        width = config.projection or anatomy.width
        shape = (self.length, width) if embedding is None else (self.length, 3, *self.patch_size)
        self.prompts = nn.Parameter(torch.empty(sets, *shape, device=like.device, dtype=like.dtype))
        self.dropouts = nn.ModuleList(SampleDropout(config.dropout, site) for site in range(len(own)))
        bound = patch_bound(anatomy, width)
        nn.init.uniform_(self.prompts, -bound, bound)
        self.projection = nn.Identity()
        if config.projection is not None:
            self.projection = nn.Linear(width, anatomy.width, device=like.device, dtype=like.dtype)
            nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")
        self.idle = False

    def tokens(self, index: int) -> Tensor:
        """(p, D), the prompts of block ``index``."""
        stored = self.prompts[(index - self.own.start) if self.sets > 1 else 0]
        return self._embedded(stored) if self._embedding else self.projection(stored)

    def for_batch(self, index: int, dropout: nn.Module, like: Tensor) -> Tensor:
        """(B, p, D), with dropout."""
        return dropout(self.tokens(index).to(like.dtype).expand(like.shape[0], -1, -1))

    def dropout(self, index: int) -> nn.Module | None:
        """That of block ``index``, None where it has no prompts of its own. Hooks are given it: looking it up in them
        would have each block compiled anew."""
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

    def add_to_patches(self, index: int, dropout: nn.Module, block: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of block ``index``: one prompt is added to each patch token."""
        tokens_BTD = args[0]
        prefix_BPD, patches_BND = self._split(tokens_BTD, self.prefix)
        patches_BND = patches_BND + self.for_batch(index, dropout, tokens_BTD)
        return (torch.cat([prefix_BPD, patches_BND], dim=1), *args[1:])

    @staticmethod
    def _split(tokens: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        """Along the sequence, in parts of these sizes and the rest."""
        return tokens.split([*sizes, tokens.shape[1] - sum(sizes)], dim=1)

    def _embedded(self, patches_p3hw: Tensor) -> Tensor:
        """(p, D): the patches are laid out on empty images of the size that the embedding takes."""
        (rows, columns), (height, width) = self.grid, self.patch_size
        images = -(-self.length // (rows * columns))
        filled = F.pad(patches_p3hw, (0, 0, 0, 0, 0, 0, 0, images * rows * columns - self.length))
        canvas = filled.unflatten(0, (images, rows, columns)).permute(0, 3, 1, 4, 2, 5)
        canvas_3HW = canvas.reshape(images, 3, rows * height, columns * width)
        rest = (0, self.image_size[1] - columns * width, 0, self.image_size[0] - rows * height)
        # Past the hooks: what other methods do to images is not for prompts.
        tokens = self._embedding[0].forward(F.pad(canvas_3HW, rest))
        return tokens.reshape(images * rows * columns, -1)[: self.length]


class AttachedPrompts(Attached):
    """Prompts of a sequence model, which may start as class means."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, prompts: Prompts, config: _Config, **facts: object) -> None:
        super().__init__(model, anatomy, **facts)
        self.prompts, self.wants_sample = prompts, config.init == "class_mean"

    @torch.no_grad()
    def prepare(self, sample: Sample) -> None:
        if not self.wants_sample:
            return
        means_CD = self._class_means(sample)
        rows = torch.arange(self.prompts.length, device=means_CD.device) % len(means_CD)
        self.prompts.prompts.copy_(means_CD[rows])

    def _class_means(self, sample: Sample) -> Tensor:
        """(C, D) pooled features of the frozen backbone; classes without an image are left out."""
        modes = {module: module.training for module in self.model.modules()}
        # Without the prompts, and so without the room that was made for them.
        for undo in reversed(self._undo):
            undo()
        self.prompts.idle = True
        self.model.eval()
        sums_CD, counts_C = 0.0, 0.0
        try:
            for images_BCHW, labels_B in sample.batches():
                pooled_BD = self.model.forward_head(self.model.forward_features(images_BCHW), pre_logits=True)
                chosen_BC = F.one_hot(labels_B, sample.num_classes).to(pooled_BD.dtype)
                sums_CD, counts_C = sums_CD + chosen_BC.T @ pooled_BD, counts_C + chosen_BC.sum(0)
        finally:
            self.prompts.idle = False
            for module, training in modes.items():
                module.training = training
            self._undo = (_admit(self.model, self.anatomy, self.prompts),)
        seen = counts_C > 0
        return sums_CD[seen] / counts_C[seen, None]


def attach_prompts(
    model: nn.Module, anatomy: Anatomy, prompts: Prompts
) -> tuple[list[RemovableHandle], Callable[[], None]]:
    """Insert the module and let the blocks prepend its prompts.

    Returns:
        Hooks, and what undoes the rest, for ``Attached``.
    """
    insert_module(model, PATH, prompts)
    handles: list[RemovableHandle] = []
    for index in range(prompts.own.start, anatomy.depth):
        block = module_at(model, anatomy.blocks[index].block)
        handles.append(block.register_forward_pre_hook(partial(prompts.put_in, index, prompts.dropout(index))))
        handles.append(block.register_forward_hook(partial(prompts.take_out, index)))
    return handles, _admit(model, anatomy, prompts)


def weight_like(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """A weight of the first block, on whose device and in whose dtype prompts are made."""
    return registered(module_at(model, anatomy.blocks[0].fc1), "weight")


def patch_bound(anatomy: Anatomy, width: int) -> float:
    """Xavier's bound for the patch embedding: uniform prompts start out looking like patches (official code)."""
    height, across = anatomy.patch_size
    return math.sqrt(6.0 / (3 * height * across + width))


def carried(tokens: Tensor, index: int) -> Tensor:
    """The prompts' outputs that the input of block ``index`` carries.

    Raises:
        BackboneError: It carries none.
    """
    prompts_BpD = getattr(tokens, CARRIED, None)
    if prompts_BpD is None:
        raise BackboneError(
            f"the input of block {index} is not the output of block {index - 1}, so its prompts are lost",
            given="a tensor made by something between the two blocks, such as reentrant gradient checkpointing",
            do="use non-reentrant checkpointing (timm's default), or vpt_deep, whose blocks own their prompts",
        )
    return prompts_BpD


def _admit(model: nn.Module, anatomy: Anatomy, prompts: Prompts) -> Callable[[], None]:
    return admit_tokens(model, anatomy, prompts.length, prompts.own.start)


def _attach(model: nn.Module, anatomy: Anatomy, config: _Config, own: range, shared: bool = False) -> Attached:
    if "sequence" not in anatomy.parts:
        from remap.tuning.prompt.vpt_swin import attach_to_windows

        return attach_to_windows(model, anatomy, config, own, shared)
    embedding = module_at(model, anatomy.input_module) if config.place == "pixel" else None
    sets = 1 if shared else len(own)
    prompts = Prompts(anatomy, config, own, sets, weight_like(model, anatomy), embedding)
    undo: list[Callable[[], None]] = []
    if config.place == "add":
        insert_module(model, PATH, prompts)
        handles = [
            module_at(model, anatomy.blocks[index].block).register_forward_pre_hook(
                partial(prompts.add_to_patches, index, prompts.dropout(index))
            )
            for index in own
        ]
    else:
        handles, admitted = attach_prompts(model, anatomy, prompts)
        undo.append(admitted)
    parameters = inserted_parameters(model, [PATH])
    return AttachedPrompts(
        model,
        anatomy,
        prompts,
        config,
        trainable=parameters,
        no_decay=[f"{PATH}.prompts", *vectors(parameters)],
        identity_at_init=False,
        extra_tokens=0 if config.place == "add" else prompts.length,
        tokens_from=0 if config.place == "add" else own.start,
        added=[PATH],
        handles=handles,
        undo=undo,
        seam=BlockSeam(model, anatomy, own.start) if own.start > 0 else None,
    )
