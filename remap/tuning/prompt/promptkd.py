"""PromptKD (Li et al. 2024, arXiv 2403.02781): image prompts that learn to answer in the words of a larger teacher.

Letters: B images, C classes, M prompts of a block, D width of the image tower, E and T dimensions that images and texts
share in the student and in the teacher.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.backbones.projected_head import ProjectedHead, exact_linear
from remap.errors import BackboneError
from remap.language.pair import Language, require_language
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.finetuning.mlp import BatchNorm
from remap.tuning.prompt.maple import ImagePrompts
from remap.tuning.prompt.sequence_prompts import attach_prompts
from remap.tuning.words import at_least_float32, classifier_of, in_place_of_head

PATH = "remap_promptkd"


class PromptKD(Method):
    """logits = scale * cos(h(f), t_c): f the student's image feature, t_c the teacher's text feature (equation 3).

    f is not normalised. The prompts of the first blocks and h, two layers with a batch norm and a ReLU between them,
    are trained:
    depth*M*D + (E + 3)*T + (T + 1)*T parameters. The paper learns from images without labels by kd at a temperature of
    1 (``--losses kd --set losses.kd.temperature=1``). Without a vision-language teacher the words are the student's.
    """

    class Config(Options):
        num_prompts: int = Field(default=4, ge=1, description="Prompts of a block.")
        depth: int = Field(default=9, ge=1, description="First blocks with prompts of their own, at most all.")
        width: int | None = Field(
            default=None, ge=1, description="Dimensions of the teacher's text features; null is the student's."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        config, edits = self.config, Edits(model)
        head = classifier_of(model, anatomy, "promptkd")
        language = require_language(model, "promptkd")
        prompts = ImagePrompts(model, anatomy, config.num_prompts, min(config.depth, anatomy.depth))
        words = TeacherWords(head, config.width or head.in_features, language.teacher or language)
        edits.insert(PATH, words, head.weight)
        edits.after(anatomy.classifier_heads[0].rpartition(".")[0], words.replace_logits)
        attach_prompts(edits, anatomy, prompts)
        return in_place_of_head(edits, extra_tokens=prompts.length)


class TeacherWords(nn.Module):
    """The projector h, and the classifier of the teacher's words, which a task holds.

    Attributes:
        weight, bias: (C, T) and (C,).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, head: nn.Linear, width: int, language: Language) -> None:
        super().__init__()
        weight, bias = torch.zeros(head.out_features, width), torch.zeros(head.out_features)
        if language.names:  # a task brings its own
            weight, bias = language.head(language.features_CE)
            if weight.shape[1] != width:
                raise BackboneError(
                    f"the teacher's words have {weight.shape[1]} dimensions, and promptkd projects to {width}",
                    do=f"--set method.width={weight.shape[1]}",
                )
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        layers = nn.Linear(head.in_features, width), BatchNorm(width), nn.ReLU(), nn.Linear(width, width)
        self.projector = nn.Sequential(*layers)

    def forward(self, features_BE: Tensor) -> Tensor:
        """Return logits (B, C) of features in the shared space, of any length."""
        projected_BT = at_least_float32(self.projector(features_BE))
        return exact_linear(F.normalize(projected_BT, dim=-1), self.weight, self.bias)

    def replace_logits(self, head: ProjectedHead, args: tuple, logits_BC: Tensor) -> Tensor:
        """Forward hook of the projected head, whose own logits are not used."""
        return self(head.proj(args[0]))
