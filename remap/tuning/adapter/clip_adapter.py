"""CLIP-Adapter (Gao et al. 2021, arXiv 2110.04544): a bottleneck behind the image tower of a vision-language model.

Letters: B images, E dimensions that images and texts share.
"""

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.seam import feature_seam
from remap.tuning.words import at_least_float32, classifier_of


class CLIPAdapter(Method):
    """f* = alpha relu(W2 relu(W1 f)) + (1 - alpha) f, equations 5 and 6: 2*E*(E/reduction) parameters.

    f* is compared with the words as f is, so its length does not count, and W1 and W2 have no biases: that f has length
    1 already changes nothing. The classifier stays the zero-shot one. The paper's adapter of the words is left out, as
    in the authors' final models.
    """

    class Config(Options):
        alpha: float = Field(default=0.2, gt=0.0, le=1.0, description="Share of the adapted feature.")
        reduction: int = Field(default=4, ge=1, description="The bottleneck has 1 / reduction of E.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        head = classifier_of(model, anatomy, "clip_adapter")
        edits = Edits(model)
        adapter = edits.insert("remap_clip_adapter", FeatureAdapter(head.in_features, self.config), head.weight)
        edits.before(anatomy.classifier_heads[0], adapter.before_classifier)
        return Attachment(edits, identity_at_init=False, seam=feature_seam(model, anatomy), trains_head=False)


class FeatureAdapter(nn.Module):
    """The bottleneck and the hook of the classifier."""

    def __init__(self, width: int, config: CLIPAdapter.Config) -> None:
        super().__init__()
        hidden = max(1, width // config.reduction)
        self.down, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.alpha = config.alpha

    def forward(self, unit_BE: Tensor) -> Tensor:
        """Return features (B, E) of length 1."""
        adapted_BE = self.up(self.down(unit_BE).relu()).relu()
        return F.normalize(at_least_float32(self.alpha * adapted_BE + (1 - self.alpha) * unit_BE), dim=-1)

    def before_classifier(self, head: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of the classifier."""
        return (self(args[0]), *args[1:])
