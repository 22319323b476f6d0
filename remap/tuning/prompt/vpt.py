"""Visual Prompt Tuning (Jia et al. 2022, arXiv 2203.12119): learned tokens beside the patches.

Letters: B batch, p prompts, D width, L depth, C classes.
"""

from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, module_at
from remap.backbones.typed import evaluating, pooled_features
from remap.errors import BackboneError
from remap.tuning.base import NO_HOOKS, Attachment, Edits, Method, Sample, TrainingHooks, vectors
from remap.tuning.prompt.prompts import PATH, PromptOptions, weight_like
from remap.tuning.prompt.sequence_prompts import Prompts, attach_prompts, without_prompts
from remap.tuning.prompt.vpt_swin import attach_to_windows
from remap.tuning.seam import BlockSeam


class VPTShallow(Method):
    """p prompts enter in front of block 0 and go through all blocks (equations 4 to 6): p*D parameters.

    On window transformers see ``vpt_swin``.
    """

    class Config(PromptOptions):
        """Options."""

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        return _attach(model, anatomy, self.config, range(1))


class VPTDeep(Method):
    """Every block gets its own p prompts, those of the block before are dropped (equation 7): L*p*D parameters.

    On window transformers see ``vpt_swin``.
    """

    class Config(PromptOptions):
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability on the prompts.")
        shared: bool = Field(default=False, description="Share one set of prompts among all blocks.")
        num_blocks: int | None = Field(
            default=None, ge=1, description="Number of first blocks with prompts of their own; null is all."
        )
        last: bool = Field(default=False, description="Count num_blocks from the end, with no prompts before.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        count = self.config.num_blocks or anatomy.depth
        if count > anatomy.depth:
            raise BackboneError(
                "there are fewer blocks than num_blocks gives prompts to",
                given=f"num_blocks={count}",
                allowed=f"1 to {anatomy.depth}",
            )
        first = anatomy.depth - count if self.config.last else 0
        return _attach(model, anatomy, self.config, range(first, first + count), self.config.shared)


class ClassMeans(TrainingHooks):
    """Prompts of a sequence model that start as class means."""

    wants_sample = True

    def __init__(self, model: nn.Module, anatomy: Anatomy, prompts: Prompts) -> None:
        self.model, self.anatomy, self.prompts = model, anatomy, prompts

    @torch.no_grad()
    def prepare(self, sample: Sample) -> None:
        means_CD = self._class_means(sample)
        rows = torch.arange(self.prompts.length, device=means_CD.device) % len(means_CD)
        self.prompts.prompts.copy_(means_CD[rows])

    def _class_means(self, sample: Sample) -> Tensor:
        """Return (C, D), pooled features of the frozen backbone; classes without an image are left out."""
        sums_CD = counts_C = torch.zeros(())
        with without_prompts(self.model, self.anatomy, self.prompts), evaluating(self.model):
            for images_BCHW, labels_B in sample.labeled("init: class_mean"):
                pooled_BD = pooled_features(self.model, images_BCHW)
                chosen_BC = F.one_hot(labels_B, sample.num_classes).to(pooled_BD.dtype)
                sums_CD, counts_C = chosen_BC.T @ pooled_BD + sums_CD, chosen_BC.sum(0) + counts_C
        seen = counts_C > 0
        return sums_CD[seen] / counts_C[seen, None]


def _attach(model: nn.Module, anatomy: Anatomy, config: PromptOptions, own: range, shared: bool = False) -> Attachment:
    if "sequence" not in anatomy.parts:
        return attach_to_windows(model, anatomy, config, own, shared)
    embedding = module_at(model, anatomy.input_module) if config.place == "pixel" else None
    if embedding is not None and anatomy.positions_in_embedding:
        raise BackboneError(
            "prompts in pixels do not fit this backbone: its embedding adds positions and prefix tokens to patches",
            given=f"method.place=pixel, family '{anatomy.family}'",
            allowed="method.place=prepend or add",
        )
    sets = 1 if shared else len(own)
    prompts = Prompts(anatomy, config, own, sets, weight_like(model, anatomy), embedding)
    seam = BlockSeam(model, anatomy, own.start) if own.start > 0 else None
    edits = Edits(model)
    if config.added:
        edits.insert(PATH, prompts)
        for index in own:
            add = partial(prompts.add_to_tokens, index, prompts.dropouts[index - own.start])
            edits.before(anatomy.blocks[index].block, add)
        return Attachment(edits, no_decay=_without_decay(edits), identity_at_init=False, seam=seam)
    attach_prompts(edits, anatomy, prompts)
    return Attachment(
        edits,
        no_decay=_without_decay(edits),
        identity_at_init=False,
        extra_tokens=prompts.length,
        tokens_from=own.start,
        seam=seam,
        hooks=ClassMeans(model, anatomy, prompts) if config.init == "class_mean" else NO_HOOKS,
    )


def _without_decay(edits: Edits) -> list[str]:
    """Return the prompts, and the bias of their projection."""
    return [f"{PATH}.prompts", *vectors(edits.parameters())]
