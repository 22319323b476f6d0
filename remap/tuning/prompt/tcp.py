"""TCP: what the zero-shot model knows of a class becomes a part of its text (Yao et al. 2024, arXiv 2311.18231).

Letters: C classes, N texts, L positions of a text, M context vectors, D width of the text tower, E dimensions that
images and texts share.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import Attachment, Method
from remap.tuning.prompt.context import Context, ContextOptions
from remap.tuning.prompt.coop import NearZeroShot
from remap.tuning.words import attach_words, zero_shot


class TCP(Method):
    """Class-aware vectors [V]_c = up(act(down(w_c))), w_c the zero-shot feature of class c, stand for the context.

    They replace the learned context of CoOp in front of block ``layer`` of the text tower: M*D + E*E/4 + E/4 +
    (E/4 + 1)*M*D parameters. The loss has KgCoOp's distance besides. The paper names no activation; QuickGELU is that
    of the authors' code.
    """

    class Config(ContextOptions):
        num_context: int = Field(default=4, ge=1, description="Context vectors, and class-aware ones.")
        words: str | None = Field(default="a photo of a", description="Words that the context starts from.")
        layer: int = Field(default=8, ge=0, description="Block of the text tower, from 0; at most the last one.")
        reduction: int = Field(default=4, ge=1, description="The bottleneck has 1 / reduction of E.")
        strength: float = Field(default=8.0, ge=0.0, description="Weight of the distance to the zero-shot words.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        words = ClassAware(model, anatomy, self.config)
        return attach_words(model, anatomy, words, NearZeroShot(words, self.config.strength))


class ClassAware(Context):
    """The context, and the two layers that make class-aware vectors."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, config: TCP.Config) -> None:
        super().__init__(model, anatomy, "tcp", config)
        shared, hidden = self.head.in_features, max(1, self.head.in_features // config.reduction)
        self.layer = min(config.layer, self.language.side.config.depth - 1)
        self.down, self.up = nn.Linear(shared, hidden), nn.Linear(hidden, self.context.numel())

    def before_block(self, index: int, tokens_NLD: Tensor) -> Tensor:
        if index != self.layer:
            return tokens_NLD
        hidden = self.down(zero_shot(self.language, self.context))
        prompts = self.up(hidden * torch.sigmoid(1.702 * hidden))
        return self.replaced(tokens_NLD, prompts.unflatten(1, self.context.shape))
