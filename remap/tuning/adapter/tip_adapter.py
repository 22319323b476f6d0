"""Tip-Adapter (Zhang et al. 2022, arXiv 2207.09519): the features of some training images vote for their classes.

Letters: B images, C classes, S shots of a class, E dimensions that images and texts share.
"""

import sys

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.projected_head import exact_linear
from remap.backbones.typed import evaluating
from remap.tuning.base import Attachment, Edits, Method, Options, Sample, TrainingHooks
from remap.tuning.seam import feature_seam
from remap.tuning.words import classifier_of


class TipAdapter(Method):
    """logits + alpha sum_s exp(-beta (1 - k_cs f)), equations 5 to 7: C*S*E parameters (Tip-Adapter-F).

    The keys k_cs start from the unit features of the first ``shots`` labelled training images of each class, as they
    are seen without augmentation (the authors average ten views), and train; the classifier stays the zero-shot one.
    Classes with fewer images have fewer votes. Before the first step it is the training-free Tip-Adapter.
    """

    class Config(Options):
        shots: int = Field(default=16, ge=1, description="Images of each class whose features are keys, at most.")
        alpha: float = Field(default=1.0, gt=0.0, description="Weight of the votes beside the zero-shot logits.")
        beta: float = Field(default=5.5, gt=0.0, description="How fast a vote fades with the cosine.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        head = classifier_of(model, anatomy, "tip_adapter")
        edits = Edits(model)
        votes = edits.insert("remap_tip_adapter", Votes(head, self.config), head.weight)
        edits.after(anatomy.classifier_heads[0], votes.add_votes)
        path = anatomy.classifier_heads[0]
        return Attachment(
            edits,
            no_decay=["remap_tip_adapter.keys"],
            identity_at_init=True,
            seam=feature_seam(model, anatomy),
            hooks=Keys(model, path, votes),
            trains_head=False,
        )


class Votes(nn.Module):
    """The keys, and the hook of the classifier.

    Attributes:
        keys: (C, S, E); those without an image are 0 and do not vote.
        counted: Whether there is an image behind a key (C, S), 0 or 1.
    """

    counted: Tensor

    def __init__(self, head: nn.Linear, config: TipAdapter.Config) -> None:
        super().__init__()
        self.alpha, self.beta = config.alpha, config.beta
        self.keys = nn.Parameter(torch.zeros(head.out_features, config.shots, head.in_features))
        self.register_buffer("counted", torch.zeros(head.out_features, config.shots))

    def forward(self, unit_BE: Tensor) -> Tensor:
        """Return votes (B, C)."""
        cosines_BCS = exact_linear(unit_BE, self.keys.flatten(0, 1)).unflatten(1, self.keys.shape[:2])
        return self.alpha * ((self.beta * (cosines_BCS - 1)).exp() * self.counted).sum(dim=-1)

    def add_votes(self, head: nn.Module, args: tuple, logits_BC: Tensor) -> Tensor:
        """Forward hook of the classifier."""
        return logits_BC + self(args[0])


class Keys(TrainingHooks):
    """Takes the keys from training images before the first step."""

    wants_sample, sample_images = True, sys.maxsize

    def __init__(self, model: nn.Module, path: str, votes: Votes) -> None:
        self.model, self.path, self.votes = model, path, votes

    @torch.no_grad()
    def prepare(self, sample: Sample) -> None:
        classes, shots, _ = self.votes.keys.shape
        found = [0] * classes
        seen: list[Tensor] = []
        handle = self.model.get_submodule(self.path).register_forward_pre_hook(lambda _head, args: seen.append(args[0]))
        self.votes.keys.zero_()
        self.votes.counted.zero_()
        try:
            with evaluating(self.model):
                for images_BCHW, labels_B in sample.labeled("tip_adapter"):
                    self.model(images_BCHW)
                    for unit_E, label in zip(seen.pop(), labels_B.tolist(), strict=True):
                        if found[label] < shots:
                            self.votes.keys[label, found[label]] = unit_E
                            self.votes.counted[label, found[label]] = 1.0
                            found[label] += 1
                    if min(found) == shots:
                        break
        finally:
            handle.remove()
