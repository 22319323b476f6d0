"""Linear probing: the backbone stays as it is, only the classifier head is trained."""

from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import IN_PLACE, Attachment, Method
from remap.tuning.seam import feature_seam


class Linear(Method):
    """Train nothing but the head."""

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        return Attachment(trainable=(), fold=IN_PLACE, seam=feature_seam(model, anatomy))
