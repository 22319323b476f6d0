"""Visual prompts in window transformers (Jia et al. 2022, arXiv 2203.12119, section 3 and their Swin experiments).

The prompts of an image are prepended to the tokens of each of its windows, inside the attention. Each window makes
its own output of a prompt; their mean over the image's windows is the prompt's output. With prompts of its own in
every block nothing else becomes of them. Prompts that outlive their block go through the rest of it as tokens do
(residual, norm, MLP), and between two stages each is merged with itself as four patches are. Images of a batch never
meet. Position biases and masks of shifted windows are 0 for prompts, and pooling does not see them.

Letters: B batch, M windows of an image, N tokens of a window, p prompts, C width of a stage.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, module_at
from remap.backbones.block_reader import leaving
from remap.backbones.families.swin import (
    PatchMerging,
    admit_window_tokens,
    merge_prompts,
    merging_before,
    with_window_tokens,
)
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits
from remap.tuning.dropout import SampleDropout
from remap.tuning.prompt.prompts import CARRIED, PATH, PromptOptions, carried, patch_bound, weight_like
from remap.tuning.seam import BlockSeam


class WindowPrompts(nn.Module):
    """The prompts of a window transformer, one tensor (blocks of the stage, p, C) a stage, and its hooks.

    ``put_in`` and the two hooks of the attention hand the prompts of one block's forward to each other as attributes.
    From block to block they cross as an attribute of the token tensor (see ``sequence_prompts.Prompts``).
    """

    def __init__(self, anatomy: Anatomy, num_prompts: int, dropout: float, own: range, like: Tensor) -> None:
        super().__init__()
        self.num_prompts, self.depth, self.own = num_prompts, anatomy.depth, own
        stages = [anatomy.blocks[index].stage for index in own]
        # Which tensor, and which row of it, has the prompts of each block.
        self.rows = [(stage - stages[0], stages[:row].count(stage)) for row, stage in enumerate(stages)]
        widths = {anatomy.blocks[index].stage: anatomy.blocks[index].width for index in own}
        self.prompts = nn.ParameterList(
            torch.empty(stages.count(stage), num_prompts, width, device=like.device, dtype=like.dtype)
            for stage, width in widths.items()
        )
        self.dropouts = nn.ModuleList(SampleDropout(dropout, site) for site in range(len(own)))
        bound = patch_bound(anatomy, anatomy.blocks[0].width)  # of the patch embedding, for all stages (official code)
        for prompts in self.prompts:
            nn.init.uniform_(prompts, -bound, bound)
        self._prompts_BpC: Tensor | None = None
        self._outputs_BpC: Tensor | None = None

    def hook_in(self, index: int) -> Callable[..., None]:
        """Return the forward pre-hook of block ``index``."""
        if index not in self.own:
            return partial(self.put_back, index)
        row = index - self.own.start
        return partial(self.put_in, *self.rows[row], self.dropouts[row])

    def put_in(self, stage: int, row: int, dropout: nn.Module, block: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a block with prompts of its own: those of this pass."""
        own_pC = self.prompts[stage][row].to(args[0].dtype)
        self._prompts_BpC = dropout(own_pC.expand(args[0].shape[0], -1, -1))

    def put_back(self, index: int, block: nn.Module, args: tuple) -> None:
        """Forward pre-hook of block ``index`` behind those: the outputs of the block before."""
        self._prompts_BpC = carried(args[0], index)

    def enter_windows(self, norm1: nn.Module, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the attention: (B * M, N, C) becomes (B * M, p + N, C)."""
        windows = args[0]
        assert self._prompts_BpC is not None
        # Past the hooks of the norm, which are made for the tokens of the image.
        normed_BpC = norm1.forward(self._prompts_BpC).to(windows.dtype)
        # The windows of one image stand one behind the other.
        each = normed_BpC.repeat_interleave(windows.shape[0] // normed_BpC.shape[0], dim=0)
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        wider = {**kwargs, "mask": with_window_tokens(mask, self.num_prompts)}
        return (torch.cat([each, windows], dim=1),), wider

    def leave_windows(self, attention: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of the attention: (B * M, p + N, C) becomes (B * M, N, C)."""
        assert self._prompts_BpC is not None
        of_windows = output[:, : self.num_prompts].unflatten(0, (self._prompts_BpC.shape[0], -1))
        self._outputs_BpC = of_windows.mean(dim=1)
        return output[:, self.num_prompts :]

    def take_out(
        self, index: int, norm2: nn.Module, mlp: nn.Module, block: nn.Module, args: tuple, output: Tensor
    ) -> None:
        """Forward hook of block ``index``: where the next block wants these prompts, the rest of the block is theirs.

        Drop-path is left out: frozen parts are in eval.
        """
        before_BpC, attended_BpC = self._prompts_BpC, self._outputs_BpC
        self._prompts_BpC = self._outputs_BpC = None
        if not self.own.stop <= index + 1 < self.depth:
            return
        assert before_BpC is not None and attended_BpC is not None
        middle_BpC = before_BpC + attended_BpC
        after_BpC = middle_BpC + mlp.forward(norm2.forward(middle_BpC))
        setattr(output, CARRIED, leaving(block, after_BpC))

    def merge(self, index: int, merging: PatchMerging, args: tuple, output: Tensor) -> None:
        """Forward hook of the patch merging in front of block ``index``, where prompts cross it."""
        setattr(output, CARRIED, merge_prompts(merging, carried(args[0], index)))

    def __getstate__(self) -> dict[str, Any]:
        # A forward that was broken off leaves activations behind, which can be neither copied nor saved.
        return {**self.__dict__, "_prompts_BpC": None, "_outputs_BpC": None}


def attach_to_windows(
    model: nn.Module, anatomy: Anatomy, config: PromptOptions, own: range, shared: bool
) -> Attachment:
    """Attach prompts to a window transformer.

    ``extra_tokens`` is 0: it counts tokens of one sequence, which these models do not have.

    Raises:
        BackboneError: An option that asks for one width or one sequence.
    """
    for option, plain in {"place": "prepend", "projection": None, "init": "random"}.items():
        _require(option, getattr(config, option), plain, anatomy)
    _require("shared", shared, False, anatomy)
    prompts = WindowPrompts(anatomy, config.num_prompts, config.dropout, own, weight_like(model, anatomy))
    edits = Edits(model)
    edits.insert(PATH, prompts)
    for index in range(own.start, anatomy.depth):
        paths = anatomy.attention_blocks[index]
        norm1, norm2, mlp = (module_at(model, path) for path in (paths.norm1, paths.norm2, paths.mlp))
        edits.before(paths.block, prompts.hook_in(index))
        edits.before(paths.attn, partial(prompts.enter_windows, norm1), with_kwargs=True)
        edits.after(paths.attn, prompts.leave_windows)
        edits.after(paths.block, partial(prompts.take_out, index, norm2, mlp))
        merging = merging_before(model, anatomy, index)
        if merging is not None and index >= own.stop:
            edits.undo_by(merging.register_forward_hook(partial(prompts.merge, index)).remove)
    edits.undo_by(admit_window_tokens(model, anatomy, config.num_prompts, own.start))
    seam = BlockSeam(model, anatomy, own.start) if own.start > 0 else None
    return Attachment(edits, no_decay=edits.parameters(), identity_at_init=False, seam=seam)


def _require(option: str, value: object, plain: object, anatomy: Anatomy) -> None:
    if value != plain:
        raise BackboneError(
            f"window transformers ({anatomy.family}) take prompts without this option: their stages differ in width",
            given=f"{option}={value}",
            allowed=f"{option}={plain}",
            do="leave it out, or take a backbone with one sequence of tokens",
        )
