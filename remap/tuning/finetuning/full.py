"""Full fine-tuning: the reference point every parameter-efficient method is measured against."""

from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import Attached, Method, names_where


class Full(Method):
    """Train every weight of the backbone."""

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        names = names_where(model, anatomy, lambda name, p: True)
        exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
        parameters = dict(model.named_parameters())
        return Attached(
            model,
            anatomy,
            trainable=names,
            no_decay=[name for name in names if parameters[name].ndim <= 1 or name in exempt],
            mergeable=True,
            tuned_modules=[""],
        )
