"""RanPAC (McDonnell et al. 2023, arXiv 2307.02251): a fixed random projection in front of a linear classifier.

Letters: B batch, D width of the features, M random features, C classes.
"""

from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.finetuning.mlp import one_layer_heads, require_one_feature
from remap.tuning.seam import FeatureSeam

PATH = "remap_ranpac"


class RanPAC(Method):
    """The classifier reads relu(x W), W of shape (D, M) drawn once from N(0, 1 / D) and never trained.

    The paper draws from N(0, 1), which multiplies all features by sqrt(D). Its classifier is found by ridge regression
    (``train.fit=ridge``), not by steps; steps train it as well. The classifier's own weight keeps its path and adds
    its logits; it is zero where the classifier is fitted.
    """

    class Config(Options):
        dim: int = Field(default=1000, ge=1, description="Random features M; the paper takes 10,000.")
        seed: int = Field(default=0, ge=0, description="Seed of the projection.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        require_one_feature(anatomy, "ranpac")
        edits, like = Edits(model), next(model.parameters())
        random = edits.insert(PATH, RandomFeatures(anatomy.feature_width, self.config), like)
        for path, head in one_layer_heads(model, anatomy, "ranpac"):
            rows = nn.Linear(self.config.dim, len(head.weight))
            nn.init.zeros_(rows.weight)
            nn.init.zeros_(rows.bias)
            edits.insert(f"{path}.{PATH}", rows, head.weight)
            # In front of what others make of the logits: a mixture of two classifiers (dual_head) is of the sum.
            edits.after(path, partial(add_logits, random), first=True)
        return Attachment(edits, trainable=(), seam=FeatureSeam(model, anatomy))


class RandomFeatures(nn.Module):
    """relu(x W)."""

    projection_DM: Tensor

    def __init__(self, width: int, config: RanPAC.Config) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(config.seed)
        self.register_buffer("projection_DM", torch.randn(width, config.dim, generator=draws) / width**0.5)

    def forward(self, x_BD: Tensor) -> Tensor:
        return (x_BD @ self.projection_DM.to(x_BD.dtype)).relu()


def add_logits(random: RandomFeatures, head: nn.Module, args: tuple, logits: Tensor) -> Tensor:
    """Forward hook of a linear layer (or 1x1 convolution) of the classifier."""
    return logits + getattr(head, PATH)(random(args[0].flatten(1))).view_as(logits)
