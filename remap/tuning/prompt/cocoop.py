"""Conditional context optimisation (Zhou et al. 2022, arXiv 2203.05557): the learned words depend on the image.

Letters: B images, C classes, M context vectors, D width of the text tower, E dimensions that images and texts share.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Method
from remap.tuning.prompt.context import Context, ContextOptions
from remap.tuning.seam import feature_seam
from remap.tuning.words import PATH, at_least_float32, in_place_of_head

# Texts that are encoded at once: each image has one for each class.
TEXTS = 512


class CoCoOp(Method):
    """v_m(x) = v_m + h(x), with h a bottleneck of the image's unit feature x: M*D + E*(E/16) + E/16 + (E/16 + 1)*D.

    A text of each class is encoded for each image, in prediction too: the text tower stays a part of the tuned model,
    and a step costs B*C texts.
    """

    class Config(ContextOptions):
        num_context: int = Field(default=4, ge=1, description="Context vectors.")
        words: str | None = Field(default="a photo of a", description="Words that the context starts from.")
        reduction: int = Field(default=16, ge=1, description="The bottleneck has 1 / reduction of E.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        edits = Edits(model)
        words = Conditional(model, anatomy, self.config)
        edits.insert(PATH, words, words.head.weight)
        edits.after(anatomy.classifier_heads[0], words.replace_logits)
        return in_place_of_head(edits, seam=feature_seam(model, anatomy))


class Conditional(Context):
    """The context, and the network that shifts it by the image.

    Attributes:
        name_ids: Token ids (C, L) of the classes' names.
    """

    name_ids: Tensor

    def __init__(self, model: nn.Module, anatomy: Anatomy, config: CoCoOp.Config) -> None:
        super().__init__(model, anatomy, "cocoop", config)
        shared, hidden = self.head.in_features, max(1, self.head.in_features // config.reduction)
        # A task does not know the names of its classes, and needs their texts.
        shape = self.head.out_features, self.language.side.config.context
        ids_CL = super().ids() if self.language.names else torch.zeros(shape, dtype=torch.long)
        self.register_buffer("name_ids", ids_CL)
        self.meta = nn.Sequential(nn.Linear(shared, hidden), nn.ReLU(), nn.Linear(hidden, self.context.shape[1]))

    def ids(self) -> Tensor:
        ids_CL, config = self.name_ids.cpu(), self.language.side.config
        if int(ids_CL.min()) < 0 or int(ids_CL.max()) >= config.vocab:  # of a task that may be anybody's
            raise BackboneError("the task has token ids that its text tower lacks", allowed=f"0 to {config.vocab - 1}")
        if config.pool == "end" and int(self.language.tower.ends(ids_CL).max()) + self.count >= config.context:
            raise BackboneError("a text of the task is too long for its text tower", allowed=f"{config.context} tokens")
        return ids_CL

    def write(self) -> None:
        """Write nothing: each image has texts of its own."""

    def logits(self, unit_BE: Tensor) -> Tensor:
        """Return (B, C), of some images at a time."""
        count = max(1, TEXTS // self.head.out_features)
        parts = (unit_BE,) if torch.compiler.is_exporting() else unit_BE.split(count)
        return torch.cat([self._logits(part) for part in parts])

    def replace_logits(self, head: nn.Module, args: tuple, logits_BC: Tensor) -> Tensor:
        """Forward hook of the classifier, whose own logits are not used."""
        return self.logits(args[0])

    def _logits(self, unit_BE: Tensor) -> Tensor:
        context_B1MD = (self.context + self.meta(unit_BE.to(self.context.dtype))[:, None])[:, None]
        texts_BCE = self.encode(context_B1MD).unflatten(0, (-1, self.head.out_features))
        # No matrix product, which autocast would round.
        cosines_BC = (at_least_float32(unit_BE)[:, None] * F.normalize(at_least_float32(texts_BCE), dim=-1)).sum(dim=-1)
        return self.language.scale * cosines_BC + self.language.bias
