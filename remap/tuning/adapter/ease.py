"""EASE (Zhou et al. 2024, arXiv 2403.12030): an adapter for each session, and class means in the features of all.

Letters: B batch, C classes, D width, S sessions so far.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.backbones.typed import as_timm, evaluating
from remap.tuning.adapter.adaptformer import AdaptFormer, ParallelBottleneck
from remap.tuning.adapter.bottleneck import Beside, insert_adapter
from remap.tuning.base import Attachment, Edits, Method, Sample, TrainingHooks
from remap.tuning.finetuning.mlp import one_layer_heads, require_one_feature
from remap.tuning.one_a_session import one_a_session
from remap.tuning.weights import full_precision

PATH = "remap_ease"
# Images whose logits are scaled for the least cross-entropy.
_SCALED = 2048


class Ease(Method):
    """AdaptFormer's bottlenecks, one set a session, of which the newest learns: L*(2*D*r + r + D) parameters.

    An image passes the network once with the adapters of each session (section 4.1). A class has a mean feature in each
    of these spaces. Where no image of it has passed a space, that is made of the means of all classes of which some
    have, weighted by the softmax of their cosines with it in its own space (section 4.2), again in each session, as in
    the authors' settings. A logit is the cosine in the space of the class's own session, and ``alpha`` times the mean
    of those in the others (section 4.3 has their sum; the authors' code, of the published figures, the mean), times a
    scale that suits the training images. Steps train the adapter with the linear classifier, which is zero afterwards.
    """

    class Config(AdaptFormer.Config):
        bottleneck: int = Field(default=16, ge=1, description="Width of the bottleneck.")
        alpha: float = Field(default=0.1, ge=0.0, description="Weight of the other sessions' spaces together.")
        session: int = Field(default=0, ge=0, description="Which session is learned, from 0; `remap extend` counts on.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        require_one_feature(anatomy, "ease")
        config, edits = self.config, Edits(model)
        spaces = Spaces(model, config.session)
        edits.before(anatomy.input_module, spaces.see)
        for site, block in enumerate(anatomy.attention_blocks):
            make = partial(ParallelBottleneck, block.width, config, site)
            adapter = insert_adapter(edits, block, PATH, SessionAdapter(make, spaces))
            edits.before(block.norm2, adapter.keep_input)
            edits.after(block.mlp_branch_end, adapter.add_to_branch)
        for path, head in one_layer_heads(model, anatomy, "ease"):
            classes, width = head.weight.shape[:2]
            means = ClassMeans(classes, width, config.alpha, spaces)
            edits.insert(f"{path}.{PATH}", means, head.weight)
            spaces.heads.append((head, means))
            spaces.seen.append([])
            edits.after(path, means.change_logits)
        return Attachment(edits, hooks=Means(model, spaces))


class Spaces:
    """Which session's adapters run. Out of training an image passes the network with those of all sessions, in order.

    Attributes:
        heads: Each classifier with its class means.
        seen: What each of them was given of the newest images, (B, D) for each session.
    """

    def __init__(self, model: nn.Module, session: int) -> None:
        self.model, self.session, self.active = model, session, session
        self.heads: list[tuple[nn.Linear | nn.Conv2d, ClassMeans]] = []
        self.seen: list[list[Tensor]] = []

    def see(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the module that takes the images."""
        if self.active != self.session:
            return
        self.seen = [[] for _ in self.heads]
        if not self.heads or self.heads[0][1].training:
            return
        try:
            for session in range(self.session):
                self.active = session
                as_timm(self.model).forward_head(as_timm(self.model).forward_features(args[0]))
        finally:
            self.active = self.session

    def __getstate__(self) -> dict[str, Any]:
        # What a forward pass leaves behind may have a graph, which can be neither copied nor saved.
        return {**self.__dict__, "seen": [[] for _ in self.heads]}


class SessionAdapter(Beside):
    """The bottlenecks of one block."""

    def __init__(self, make: partial[ParallelBottleneck], spaces: Spaces) -> None:
        super().__init__()
        self.sets, self._spaces = one_a_session(make, spaces.session), spaces

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.sets[self._spaces.active](x_BTD)


class ClassMeans(nn.Module):
    """The class means of one classifier.

    Attributes:
        session_C: The session that a class came with; -1 for one that has no means yet.
        scale: What all logits are multiplied by, (1,).
    """

    session_C: Tensor
    scale: Tensor

    def __init__(self, classes: int, width: int, alpha: float, spaces: Spaces) -> None:
        super().__init__()
        self.alpha, self._spaces, self._number = alpha, spaces, len(spaces.heads)
        self.register_buffer("session_C", torch.full((classes,), -1))
        self.register_buffer("scale", torch.ones(1))
        for session in range(spaces.session + 1):
            self.register_buffer(f"mean_{session}", torch.zeros(classes, width))
            self.register_buffer(f"count_{session}", torch.zeros(classes, dtype=torch.long))

    def of(self, session: int) -> Tensor:
        """Return the means (C, D) in the space of a session."""
        return getattr(self, f"mean_{session}")

    def images(self, session: int) -> Tensor:
        """Return how many images each of them is the mean of (C,); 0 where it is made of other classes' means."""
        return getattr(self, f"count_{session}")

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return logits (B, C) from the features of each session, float32 at least."""
        total_BC, alpha = torch.zeros_like(self.scale), self.alpha / max(len(features) - 1, 1)
        with full_precision(self.scale):  # in bfloat16, classes that are near each other would change places
            for session, x_BD in enumerate(features):
                dtype = torch.promote_types(x_BD.dtype, torch.float32)
                cosines_BC = F.normalize(x_BD.to(dtype)) @ F.normalize(self.of(session).to(dtype)).T
                total_BC = total_BC + torch.where(self.session_C == session, 1.0, alpha) * cosines_BC
            return self.scale * total_BC

    def change_logits(self, head: nn.Module, args: tuple, logits_BC: Tensor) -> Tensor:
        """Forward hook of the classifier."""
        if self.training:
            return logits_BC
        seen = self._spaces.seen[self._number]
        seen.append(args[0].flatten(1))
        if self._spaces.active != self._spaces.session:
            return logits_BC
        return logits_BC + self(seen).view_as(logits_BC)


class Means(TrainingHooks):
    """Takes the class means after the last step."""

    def __init__(self, model: nn.Module, spaces: Spaces) -> None:
        self.model, self.spaces = model, spaces

    @torch.no_grad()
    def finish(self, sample: Sample) -> None:
        features: list[list[Tensor]] = [[] for _ in self.spaces.heads]
        labels: list[Tensor] = []
        with evaluating(self.model):
            for images_BCHW, labels_B in sample.labeled("ease"):
                self.model(images_BCHW)
                labels.append(labels_B.long().cpu())
                for rows, seen in zip(features, self.spaces.seen, strict=True):
                    rows.append(torch.stack(seen).double().cpu())
        for rows, (head, means) in zip(features, self.spaces.heads, strict=True):
            self._take(means, torch.cat(rows, 1), torch.cat(labels))
            for parameter in head.parameters(recurse=False):
                parameter.zero_()

    def _take(self, means: ClassMeans, features_SND: Tensor, labels_N: Tensor) -> None:
        """Add images to the means of their classes, then write those of classes of which none has passed a space."""
        now, classes = self.spaces.session, len(means.session_C)
        one_hot_NC = F.one_hot(labels_N, classes).double()
        means.session_C[(one_hot_NC.sum(0) > 0).to(means.session_C.device) & (means.session_C < 0)] = now
        session_C, mean_CD = means.session_C.cpu(), dict[int, Tensor]()
        for session, x_ND in enumerate(features_SND):
            before_C = means.images(session).cpu()
            count_C = before_C + one_hot_NC.sum(0).long()
            sums_CD = before_C[:, None] * means.of(session).double().cpu() + one_hot_NC.T @ x_ND
            mean_CD[session], shown_C = sums_CD / count_C.clamp_min(1)[:, None], count_C > 0
            for own in range(session):
                old_C, own_CD = (session_C == own) & ~shown_C, F.normalize(mean_CD[own])
                share = torch.softmax(own_CD[old_C] @ own_CD[shown_C].T, 1)
                mean_CD[session][old_C] = share @ mean_CD[session][shown_C]
            means.of(session).copy_(mean_CD[session])
            means.images(session).copy_(count_C)
        means.scale.fill_(1.0)
        logits_NC = means([x_ND[:_SCALED].to(means.scale) for x_ND in features_SND])
        means.scale.fill_(best_scale(logits_NC.double().cpu().numpy(), labels_N[:_SCALED].numpy()))


def best_scale(cosines_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the factor on logits, 1 to 100, of the least cross-entropy."""
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    right_N = cosines_NC[np.arange(len(labels_N)), labels_N]
    loss = lambda scale: float((logsumexp(scale * cosines_NC, axis=1) - scale * right_N).mean())  # noqa: E731
    return float(minimize_scalar(loss, bounds=(1.0, 100.0), method="bounded").x)
