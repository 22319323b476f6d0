"""The classifier of a vision-language model: behind the projection into the space that images and texts share.

Letters: B batch, D width of the pooled features, E dimensions of the shared space, C classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F


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
        self.classifier = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()
        if like is not None:
            self.classifier.to(like.device, like.dtype)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.classifier(F.normalize(self.proj(pooled_BD), dim=-1))
