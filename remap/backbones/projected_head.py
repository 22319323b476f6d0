"""The classifier of a vision-language model: behind the projection into the space that images and texts share.

Letters: B batch, D width of the pooled features, E dimensions of the shared space, C classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# For messages: why a network with such a head is not one of timm's.
HEAD_OF_A_PAIR = "its classifier reads features of length 1, behind the projection into the space of the texts"


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b in float32 or the inputs' wider type, also under autocast.

    bfloat16 has 8 significant bits: times CLIP's scale of 100, a cosine of 0.3 is off by up to 0.06.
    """
    kind = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)


class ExactLinear(nn.Linear):
    """A classifier whose logits are never in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return exact_linear(x, self.weight, self.bias)


class ProjectedHead(nn.Module):
    """classifier(u / |u|) with u = proj(x): (B, D) to (B, C), or to (B, E) without a classifier.

    The projection is a part of the backbone, the classifier is not. With text features t_c of unit length, the scale s
    and the bias b of the model, and classifier rows s * t_c, the logits are s * cos(u, t_c) + b, those of CLIP
    (Radford et al. 2021, arXiv 2103.00020) and SigLIP (Zhai et al. 2023, arXiv 2303.15343).

    Attributes:
        width: Dimensions E of the shared space.
    """

    def __init__(self, proj: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.proj, self.width = proj, width
        self.classifier: nn.Module = nn.Identity()
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Put in a new classifier; 0 takes it out."""
        like = next(self.parameters(), None)
        self.classifier = ExactLinear(self.width, num_classes) if num_classes else nn.Identity()
        if like is not None:
            self.classifier.to(like.device, like.dtype)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        embedded_BE = self.proj(pooled_BD)
        kind = torch.promote_types(embedded_BE.dtype, torch.float32)
        return self.classifier(F.normalize(embedded_BE.to(kind), dim=-1))


def projected_head(model: nn.Module) -> ProjectedHead | None:
    """Return the head of a vision-language model's image tower; None of any other model."""
    return next((module for module in model.modules() if isinstance(module, ProjectedHead)), None)
