"""Full fine-tuning: the reference point every parameter-efficient method is measured against."""

from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import IN_PLACE, Attachment, Method, names_where


class Full(Method):
    """Train every weight of the backbone."""

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        names = names_where(model, anatomy, lambda _name: True)
        # What timm's model itself names.
        exempt: set[str] = getattr(model, "no_weight_decay", set)()
        parameters = dict(model.named_parameters())
        return Attachment(
            trainable=names,
            no_decay=[name for name in names if parameters[name].ndim <= 1 or name in exempt],
            tuned_modules=[""],
            fold=IN_PLACE,
        )
