"""PromptSRC: prompts of both towers that are regulated by the model they are tuned from.

Letters: B images, C classes, M prompts of a block, D widths of the towers, E dimensions that images and texts share.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, module_at
from remap.backbones.projected_head import ProjectedHead
from remap.backbones.typed import as_timm
from remap.tuning.base import Attachment, Edits, Method, TrainingHooks
from remap.tuning.prompt.context import ContextOptions, DeepContext
from remap.tuning.prompt.maple import ImagePrompts, attach_both, common_depth
from remap.tuning.prompt.sequence_prompts import without_prompts
from remap.tuning.words import WordHead, at_least_float32, zero_shot


class PromptSRC(Method):
    """Independent prompts in the first blocks of both towers (Khattak et al. 2023, arXiv 2307.06948).

    depth * M * (D_t + D_v) parameters. The loss gets, with f, t and p the image features, text features and class
    probabilities and f', t', p' those of the frozen model: image * mean |f - f'| + text * mean |t - t'| (equation 3)
    + logits * sum_c p' log(p'/p) / C (equation 4; the authors' code divides by C). t' are the zero-shot features of all
    templates of the run (data.templates; the paper takes 60 and more). In the end the prompts are the average of those
    at the ends of ``epochs`` parts of the run, weighted by a normal distribution (equations 6 and 7).
    """

    class Config(ContextOptions):
        num_context: int = Field(default=4, ge=1, description="Prompts of a block, in either tower.")
        words: str | None = Field(default="a photo of a", description="Words that the context starts from.")
        depth: int = Field(default=9, ge=1, description="First blocks with prompts of their own, at most all.")
        image: float = Field(default=10.0, ge=0.0, description="Weight of the distance of image features.")
        text: float = Field(default=25.0, ge=0.0, description="Weight of the distance of text features.")
        logits: float = Field(default=1.0, ge=0.0, description="Weight of the divergence of class probabilities.")
        epochs: int = Field(default=20, ge=1, description="Parts of the run at whose ends prompts are averaged.")
        mean: float = Field(default=15.0, description="Part with the largest weight in the average, from 1.")
        std: float = Field(default=1.0, gt=0.0, description="Standard deviation of the weights, in parts.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        config, edits = self.config, Edits(model)
        depth = common_depth(config.depth, model, anatomy)
        words = DeepContext(model, anatomy, "promptsrc", config, depth)
        prompts = ImagePrompts(model, anatomy, config.num_context, depth)
        hooks = SelfRegulation(model, anatomy, words, prompts, config)
        hooks.watch(edits, anatomy)
        return replace(attach_both(edits, anatomy, words, prompts), hooks=hooks)


class BesideFrozen(TrainingHooks):
    """Runs the frozen model beside the tuned one in training, for distances to it.

    Attributes:
        frozen_BE, unit_BE: Unit features of the images, of the frozen model and of the tuned one; None where there was
            no forward pass of training since ``taken``.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, words: WordHead, prompts: ImagePrompts) -> None:
        self.model, self.anatomy, self.words, self.prompts = model, anatomy, words, prompts
        head = module_at(model, anatomy.classifier_heads[0].rpartition(".")[0])
        assert isinstance(head, ProjectedHead)
        self.head = head
        self.frozen_BE: Tensor | None = None
        self.unit_BE: Tensor | None = None

    def watch(self, edits: Edits, anatomy: Anatomy) -> None:
        """Install the hooks; in front of those of the prompts."""
        edits.before(anatomy.input_module, self.see_image, first=True)
        edits.before(anatomy.classifier_heads[0], self.see_features)

    def see_image(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the module that takes the image: run the frozen model on it."""
        if self.prompts.idle or not (self.words.learns and torch.is_grad_enabled()):
            return
        with without_prompts(self.model, self.anatomy, self.prompts), torch.no_grad():
            model = as_timm(self.model)
            pooled_BD = model.forward_head(model.forward_features(args[0]), pre_logits=True)
            self.frozen_BE = F.normalize(at_least_float32(self.head.proj(pooled_BD)), dim=-1)

    def see_features(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the classifier."""
        self.unit_BE = args[0] if self.frozen_BE is not None else None

    def taken(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return both features in the dtype of a tensor, and forget them."""
        if self.frozen_BE is None or self.unit_BE is None:
            return None
        found = self.unit_BE.to(like.dtype), self.frozen_BE.to(like.dtype)
        self.frozen_BE = self.unit_BE = None
        return found


class SelfRegulation(BesideFrozen):
    """The distances to the frozen model, and the weighted average of the prompts."""

    words: DeepContext

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, words: DeepContext, prompts: ImagePrompts, config: PromptSRC.Config
    ) -> None:
        super().__init__(model, anatomy, words, prompts)
        self.config = config
        self._average: dict[str, Tensor] = {}

    def penalty(self) -> Tensor | None:
        t_CE = self.words.unit_now()
        frozen_t_CE = zero_shot(self.words.language, t_CE)
        total = self.config.text * F.l1_loss(t_CE, frozen_t_CE)
        images = self.taken(t_CE)
        if images is None:
            return total
        scale = self.words.language.scale
        pairs = zip(images, (t_CE, frozen_t_CE), strict=True)
        log_BC, frozen_BC = ((scale * f_BE @ texts_CE.mT).log_softmax(dim=-1) for f_BE, texts_CE in pairs)
        divergence = F.kl_div(log_BC, frozen_BC, reduction="sum", log_target=True) / log_BC.numel()
        return total + self.config.image * F.l1_loss(*images) + self.config.logits * divergence

    def _trained(self) -> dict[str, Tensor]:
        return {"context": self.words.context, "deep": self.words.deep, "prompts": self.prompts.prompts}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        parts = self.config.epochs
        powers = [-0.5 * ((part - self.config.mean) / self.config.std) ** 2 for part in range(1, parts + 1)]
        # Relative to the largest one, which far from the mean would become 0 as well.
        weights = [math.exp(power - max(powers)) for power in powers]
        share = sum(weights[step * parts // total : (step + 1) * parts // total]) / sum(weights)
        for name, parameter in self._trained().items():
            if share:
                self._average[name] = self._average.get(name, torch.zeros_like(parameter)) + share * parameter
            if step + 1 == total:
                parameter.copy_(self._average[name])

    def memory(self) -> dict[str, Tensor]:
        return dict(self._average)

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        self._average = {name: value.to(self.words.context) for name, value in memory.items()}
