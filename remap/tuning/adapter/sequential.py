"""Adapters in series with the frozen blocks: Houlsby's, Pfeiffer's and Adapter+.

Letters: B batch, T tokens (H, W in window transformers), D width, r bottleneck.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.tuning.adapter.bottleneck import Bottleneck, insert_adapter
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.dropout import SampleDropout


class Houlsby(Method):
    """h + A(h) on the output h of attention and of the MLP (arXiv 1902.00751): 2*L*(2*D*r + r + D) parameters.

    That is before h is added to the stream (figure 2). h is taken after LayerScale and drop-path. Where the paper
    starts close to the identity, this starts at it. The norms, which the paper trains too, stay frozen: "houlsby+norm"
    trains them.
    """

    class Config(Options):
        bottleneck: int = Field(default=8, ge=1, description="Width of the bottleneck.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        edits = Edits(model)
        for block in anatomy.attention_blocks:
            for word, end in (("attn", block.attn_branch_end), ("mlp", block.mlp_branch_end)):
                adapter = InSeries(block.width, self.config.bottleneck)
                edits.after(end, insert_adapter(edits, block, f"remap_houlsby_{word}", adapter).change_output)
        return Attachment(edits)


class Pfeiffer(Method):
    """x + h + A(h) with h the output of the MLP branch (arXiv 2005.00247): L*(2*D*r + r + D) parameters.

    Of the readings in use this is the one of VPT's baseline and of Adapter+'s "intermediate": the adapter reads the
    branch, not the sum with the stream, and there is no extra norm. Its input is taken after LayerScale.
    """

    class Config(Options):
        bottleneck: int = Field(default=8, ge=1, description="Width of the bottleneck.")
        reduction: int | None = Field(
            default=None, ge=1, description="Backbone width / bottleneck width; null takes bottleneck."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        edits, reduction = Edits(model), self.config.reduction
        for block in anatomy.attention_blocks:
            bottleneck = self.config.bottleneck if reduction is None else max(1, block.width // reduction)
            adapter = InSeries(block.width, bottleneck)
            edits.after(block.mlp_branch_end, insert_adapter(edits, block, "remap_pfeiffer", adapter).change_output)
        return Attachment(edits)


class AdapterPlus(Method):
    """y + s * A(y) on the output y of every block (arXiv 2406.06820): L*(2*D*r + r + 2*D) parameters.

    s is a learned scale a channel, which starts at 1. The paper draws both projections from the same narrow normal
    distribution; here ``up`` is zero, so that tuning starts at the pretrained network.
    """

    class Config(Options):
        bottleneck: int = Field(default=8, ge=1, description="Width of the bottleneck.")
        drop_path: float = Field(
            default=0.1, ge=0.0, lt=1.0, description="Probability of skipping an image's adapter in training."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        edits = Edits(model)
        for site, block in enumerate(anatomy.attention_blocks):
            adapter = ChannelScaled(block.width, self.config.bottleneck, self.config.drop_path, site)
            insert_adapter(edits, block, "remap_adapter_plus", adapter)
            # In front of hooks that cut prompts from the block's output: in every order of attaching, the adapter
            # is part of the block.
            edits.after(block.block, adapter.change_output, first=True)
        return Attachment(edits)


class InSeries(Bottleneck):
    """A bottleneck with GELU behind a module, and the hook that puts it there."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__(width, bottleneck, F.gelu)
        # The width of Houlsby's and Adapter+'s initialisation.
        nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)

    def change_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook: (..., D) to (..., D)."""
        return output + self(output)


class ChannelScaled(InSeries):
    """Adapter+'s: s * A(x), and nothing for the images whose path is dropped."""

    def __init__(self, width: int, bottleneck: int, drop_path: float, site: int) -> None:
        super().__init__(width, bottleneck)
        self.scale = nn.Parameter(torch.ones(width))
        self.drop_path = SampleDropout(drop_path, site)

    def forward(self, x: Tensor) -> Tensor:
        change = super().forward(x) * self.scale
        if not self.training:
            return change
        images = change.new_ones(len(change), *[1] * (change.ndim - 1))
        return change * self.drop_path(images)
