"""Tip-Adapter (Zhang et al. 2022, arXiv 2207.09519): the features of some training images vote for their classes.

Letters: B images, C classes, S shots of a class, E dimensions that images and texts share.
"""

import sys

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.projected_head import exact_linear
from remap.backbones.typed import evaluating, inputs_of
from remap.errors import TrainingError
from remap.tuning.base import Attachment, Edits, Method, Options, Sample, TrainingHooks
from remap.tuning.seam import feature_seam
from remap.tuning.weights import registered
from remap.tuning.words import classifier_of


class TipAdapter(Method):
    """logits + alpha sum_s exp(-beta (1 - k_cs f)), equations 5 to 7: C*S*E parameters (Tip-Adapter-F).

    The keys k_cs start from the unit features of the first ``shots`` labelled training images of each class, as they
    are seen without augmentation (the authors average ten views), and train; the classifier stays the zero-shot one.
    Classes with fewer images have fewer votes. ``train.fit=none`` is the training-free Tip-Adapter.
    """

    class Config(Options):
        shots: int = Field(default=16, ge=1, description="Images of each class whose features are keys, at most.")
        alpha: float = Field(default=1.0, gt=0.0, description="Weight of the votes beside the zero-shot logits.")
        beta: float = Field(default=5.5, gt=0.0, description="How fast a vote fades with the cosine.")
        search: bool = Field(
            default=False, description="Choose alpha and beta: the other keys answer for each key's image."
        )

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
            hooks=Keys(model, path, votes, search=self.config.search),
            trains_head=False,
        )


class Votes(nn.Module):
    """The keys, and the hook of the classifier.

    Attributes:
        keys: (C, S, E); those without an image are 0 and do not vote.
        counted: Whether there is an image behind a key (C, S), 0 or 1.
        factors: alpha and beta (2,).
    """

    counted: Tensor
    factors: Tensor

    def __init__(self, head: nn.Linear, config: TipAdapter.Config) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(head.out_features, config.shots, head.in_features))
        self.register_buffer("counted", torch.zeros(head.out_features, config.shots))
        self.register_buffer("factors", torch.tensor([config.alpha, config.beta]))

    def forward(self, unit_BE: Tensor) -> Tensor:
        """Return votes (B, C)."""
        cosines_BCS = exact_linear(unit_BE, self.keys.flatten(0, 1)).unflatten(1, self.keys.shape[:2])
        alpha, beta = self.factors
        return alpha * ((beta * (cosines_BCS - 1)).exp() * self.counted).sum(dim=-1)

    @torch.no_grad()
    def search(self, head: nn.Linear) -> None:
        """Choose alpha and beta by the share of keys whose images the others answer rightly.

        The grid has the authors' range; they take validation images. At most 2,000 keys are asked.

        Raises:
            TrainingError: A class has a single image: without it none votes for its class.
        """
        if int(self.counted.sum(dim=1).min()) < 2:
            raise TrainingError("search needs two training images of each class", do="leave method.search out")
        asked_Q = self.counted.flatten().nonzero()[:, 0]
        asked_Q = asked_Q[:: -(-len(asked_Q) // 2000)]
        keys_KE, labels_Q = self.keys.flatten(0, 1), asked_Q // self.keys.shape[1]
        plain_QC = exact_linear(keys_KE[asked_Q], registered(head, "weight"), head.bias)
        gaps_QK = exact_linear(keys_KE[asked_Q], keys_KE) - 1
        others_QK = self.counted.flatten().repeat(len(asked_Q), 1).scatter(1, asked_Q[:, None], 0.0)
        most = -1
        for beta in torch.linspace(0.1, 7.0, 24).tolist():
            votes_QC = ((beta * gaps_QK).exp() * others_QK).unflatten(1, self.keys.shape[:2]).sum(dim=-1)
            for alpha in torch.linspace(0.1, 3.0, 30).tolist():
                right = int(((plain_QC + alpha * votes_QC).argmax(dim=1) == labels_Q).sum())
                if right > most:
                    most = right
                    self.factors.copy_(torch.tensor([alpha, beta]))

    def add_votes(self, head: nn.Module, args: tuple, logits_BC: Tensor) -> Tensor:
        """Forward hook of the classifier."""
        return logits_BC + self(args[0])


class Keys(TrainingHooks):
    """Takes the keys from training images before the first step."""

    wants_sample, sample_images = True, sys.maxsize

    def __init__(self, model: nn.Module, path: str, votes: Votes, *, search: bool) -> None:
        self.model, self.path, self.votes, self.search = model, path, votes, search

    @torch.no_grad()
    def prepare(self, sample: Sample) -> None:
        classes, shots, _ = self.votes.keys.shape
        found = [0] * classes
        self.votes.keys.zero_()
        self.votes.counted.zero_()
        head = self.model.get_submodule(self.path)
        with inputs_of(head) as seen, evaluating(self.model):
            for images_BCHW, labels_B in sample.labeled("tip_adapter"):
                self.model(images_BCHW)
                for unit_E, label in zip(seen.pop(), labels_B.tolist(), strict=True):
                    if found[label] < shots:
                        self.votes.keys[label, found[label]] = unit_E
                        self.votes.counted[label, found[label]] = 1.0
                        found[label] += 1
                if min(found) == shots:
                    break
        if self.search:
            assert isinstance(head, nn.Linear)
            self.votes.search(head)
