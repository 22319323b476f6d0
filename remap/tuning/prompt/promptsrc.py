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
from remap.tuning.words import zero_shot


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
        # In front of the prompts' own hooks: the frozen model sees the image first.
        edits.before(anatomy.input_module, hooks.see_image, first=True)
        edits.before(anatomy.classifier_heads[0], hooks.see_features)
        return replace(attach_both(edits, anatomy, words, prompts), hooks=hooks)


class SelfRegulation(TrainingHooks):
    """The distances to the frozen model, and the weighted average of the prompts."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, words: DeepContext, prompts: ImagePrompts, config: PromptSRC.Config
    ) -> None:
        self.model, self.words, self.prompts, self.config = model, words, prompts, config
        head = module_at(model, anatomy.classifier_heads[0].rpartition(".")[0])
        assert isinstance(head, ProjectedHead)
        self.head = head
        self._frozen_BE: Tensor | None = None
        self._unit_BE: Tensor | None = None
        self._average: dict[str, Tensor] = {}

    def see_image(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the module that takes the image: run the frozen model on it."""
        if self.prompts.idle or not (self.words.learns and torch.is_grad_enabled()):
            return
        self.prompts.idle = True
        try:
            with torch.no_grad():
                model = as_timm(self.model)
                pooled_BD = model.forward_head(model.forward_features(args[0]), pre_logits=True)
                self._frozen_BE = F.normalize(self.head.proj(pooled_BD), dim=-1)
        finally:
            self.prompts.idle = False

    def see_features(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the classifier."""
        self._unit_BE = args[0] if self._frozen_BE is not None else None

    def penalty(self) -> Tensor | None:
        t_CE = self.words.unit_now()
        frozen_t_CE = zero_shot(self.words.language, t_CE)
        total = self.config.text * F.l1_loss(t_CE, frozen_t_CE)
        if self._frozen_BE is None or self._unit_BE is None:
            return total
        f_BE, frozen_f_BE = (x.to(t_CE.dtype) for x in (self._unit_BE, self._frozen_BE))
        self._frozen_BE = self._unit_BE = None
        scale = self.words.language.scale
        log_BC, frozen_BC = (
            (scale * x @ y.mT).log_softmax(dim=-1) for x, y in ((f_BE, t_CE), (frozen_f_BE, frozen_t_CE))
        )
        total = total + self.config.image * F.l1_loss(f_BE, frozen_f_BE)
        divergence = F.kl_div(log_BC, frozen_BC, reduction="sum", log_target=True) / log_BC.numel()
        return total + self.config.logits * divergence

    def _trained(self) -> dict[str, nn.Parameter]:
        return {"context": self.words.context, "deep": self.words.deep, "prompts": self.prompts.prompts}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        parts = self.config.epochs
        weights = [math.exp(-0.5 * ((part - self.config.mean) / self.config.std) ** 2) for part in range(1, parts + 1)]
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
