"""Dual-head optimisation (Kang et al. 2025, arXiv 2505.07675): one classifier learns from labels, one from the teacher.

Letters: B batch, C classes.
"""

import math
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, module_at
from remap.backbones.projected_head import ExactLinear
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.seam import feature_seam

# Attribute of the logits: those of the classifier of the labels, and those of the teacher's.
HEADS = "remap_head_logits"


class DualHead(Method):
    """p = a softmax(z) + (1 - a) softmax(z' / b): losses on labels read z, losses on the teacher's logits read z'.

    The logits are log p. With few labels and many images without, the gradients of the two then do not meet in one
    classifier. Both start alike; the paper chooses a and b on validation images.
    """

    class Config(Options):
        share: float = Field(
            default=0.5, ge=0.0, le=1.0, description="a, the share of the classifier that learns from labels."
        )
        temperature: float = Field(
            default=1.0, gt=0.0, description="b, of the classifier that learns from the teacher."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        edits = Edits(model)
        for path in anatomy.classifier_heads:
            head = module_at(model, path)
            if not isinstance(head, nn.Linear):
                raise BackboneError(
                    "a second classifier needs a first one that is a linear layer",
                    given=f"{path} is {type(head).__name__}",
                )
            kind = ExactLinear if isinstance(head, ExactLinear) else nn.Linear
            second = kind(head.in_features, head.out_features, head.bias is not None)
            second.load_state_dict({name: tensor.detach() for name, tensor in head.named_parameters(recurse=False)})
            # Inside the first: a part of the classifier, which a task stores with it.
            edits.insert(f"{path}.remap_dual_head", second, head.weight)
            edits.after(path, partial(_mix, second, self.config.share, self.config.temperature))
        seam = feature_seam(model, anatomy)
        return Attachment(edits, trainable=(), identity_at_init=False, seam=seam)


def _mix(
    second: nn.Linear, share: float, temperature: float, _head: nn.Module, args: tuple, first_BC: Tensor
) -> Tensor:
    """Forward hook of the classifier: the logarithm of the mixture."""
    second_BC = second(args[0])
    parts = [(first_BC, share), (second_BC / temperature, 1 - share)]
    mixed_BC = torch.stack([z.log_softmax(-1) + math.log(a) for z, a in parts if a > 0]).logsumexp(dim=0)
    setattr(mixed_BC, HEADS, (first_BC, second_BC))
    return mixed_BC
