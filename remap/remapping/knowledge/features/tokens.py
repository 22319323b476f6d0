"""Token by token. B batch, N patches of the student's grid, P prefix tokens, D width (student and teacher differ)."""

from collections.abc import Mapping
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.remapping.alignment import pair_blocks
from remap.remapping.knowledge.features.terms import (
    Layers,
    ProjectedOptions,
    TokenTerm,
    distance,
    projector,
    token_pairs,
)
from remap.remapping.labels import Labels
from remap.remapping.normalization import TargetNorm
from remap.remapping.objective import Pair
from remap.remapping.signals import Signals, float32_region
from remap.remapping.targets import prefix_name, prefix_of
from remap.tuning.base import Options


class TokenFeature(TokenTerm):
    """Project the student's tokens onto the teacher's normalised ones, each at its place on the student's grid.

    Every pair of blocks has its own projector. Prefix tokens are compared apart from the patches, through a
    second projector, and their part is added: mean over patches + mean over prefix tokens. A narrow student cannot
    hold what a wide teacher's late tokens say (Tian et al. 2025, arXiv 2511.06848); relations (``gram``) ask for less.
    """

    class Config(ProjectedOptions):
        layers: Layers = Field(
            default="last", description='Block pairs: "last" (final norm), "uniform" or [[student, teacher], ...].'
        )
        prefix: Literal["none", "class", "all"] = Field(
            default="none", description="Prefix tokens to compare: none, the class token, or all that both have."
        )

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config, token_pairs(config.layers, pair, "tokens"))
        widths = [self.widths(s, t) for s, t in self.blocks]
        self.projectors = nn.ModuleList([projector(config, *both) for both in widths])
        self.shared = shared_prefix(pair.student, pair.known_teacher("tokens"), config.prefix)
        norms = {self.item(s, t): TargetNorm(config.normalize, self.widths(s, t)[1]) for s, t in self.blocks}
        if self.shared:
            self.prefix_projectors = nn.ModuleList([projector(config, *both) for both in widths])
            norms |= {prefix_name(t): TargetNorm(config.normalize, self.widths(s, t)[1]) for s, t in self.blocks}
        self.norms = nn.ModuleDict(norms)

    def normalizers(self) -> dict[str, TargetNorm]:
        return {name: cast(TargetNorm, norm) for name, norm in self.norms.items()}

    @torch.no_grad()
    def target(self, teacher: Signals) -> dict[str, Tensor]:
        items = super().target(teacher)
        if self.shared:
            for _, block in self.blocks:
                items |= prefix_of(teacher, block)
        return items

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        losses = []
        for index, (s, t) in enumerate(self.blocks):
            tokens = student.tokens[s]
            with float32_region(tokens.patches_BND):
                projected_BND = self.projectors[index](tokens.patches_BND.float())
                loss = distance(self.config.loss, projected_BND, self._wanted(target, self.item(s, t)))
                if self.shared:
                    ours_BPD = torch.stack([tokens.prefix_BPD[:, ours] for ours, _ in self.shared], dim=1).float()
                    prefix_BPD = self._wanted(target, prefix_name(t))
                    wanted_BPD = torch.stack([prefix_BPD[:, theirs] for _, theirs in self.shared], dim=1)
                    projected_BPD = self.prefix_projectors[index](ours_BPD)
                    loss = loss + distance(self.config.loss, projected_BPD, wanted_BPD)
                losses.append(loss)
        return torch.stack(losses).mean()

    def _wanted(self, target: Mapping[str, Tensor], item: str) -> Tensor:
        return self.norms[item](target[item].float())


class Hint(TokenTerm):
    """Romero et al. 2015 (FitNets), arXiv 1412.6550, Eq. 3: the student regresses the teacher's patch tokens (hints).

    Mean squared error over images, patches and channels (the paper: half the sum) of a linear regressor of the
    student's tokens, with nothing normalised. Known to be weak between ViTs; here as the reference point.
    """

    class Config(Options):
        layers: Literal["middle"] | tuple[tuple[int, int], ...] = Field(
            default="middle", description='Block pairs: "middle" of both models, or [[student, teacher], ...].'
        )

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        depths = pair.student.depth, pair.known_teacher("fitnet").depth
        layers = config.layers
        if layers == "middle":
            student, teacher = ((depth - 1) // 2 for depth in depths)
            layers = ((student, teacher),)
        super().__init__(pair, config, pair_blocks(layers, *depths))
        self.regressors = nn.ModuleList([nn.Linear(*self.widths(s, t)) for s, t in self.blocks])

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        losses = []
        for regressor, (s, t) in zip(self.regressors, self.blocks, strict=True):
            patches_BND = student.tokens[s].patches_BND
            with float32_region(patches_BND):
                losses.append(F.mse_loss(regressor(patches_BND.float()), target[self.item(s, t)].float()))
        return torch.stack(losses).mean()


def shared_prefix(
    student: Anatomy, teacher: Anatomy, kind: Literal["none", "class", "all"]
) -> tuple[tuple[int, int], ...]:
    """Return which prefix token of the student is compared with which of the teacher.

    Raises:
        BackboneError: "class" where one of them has no class token, "all" where they have nothing in common.
    """
    if kind == "none":
        return ()
    ours, theirs = _prefix_tokens(student), _prefix_tokens(teacher)
    shared = [(ours[word][0], theirs[word][0]) for word in ("class", "distillation") if ours[word] and theirs[word]]
    if kind == "class":
        shared = shared[:1] if ours["class"] and theirs["class"] else []
    elif len(ours["register"]) == len(theirs["register"]):
        shared += list(zip(ours["register"], theirs["register"], strict=True))
    if not shared:
        raise BackboneError(
            f"prefix: {kind} compares tokens that both networks have, and these have none in common",
            given=f"student {_in_words(ours)}; teacher {_in_words(theirs)}",
            do="use prefix: none",
        )
    return tuple(shared)


def _prefix_tokens(anatomy: Anatomy) -> dict[str, list[int]]:
    """Return positions in the prefix by what stands there."""
    known = int(anatomy.has_class_token)
    # A distillation token is what the second classifier reads.
    distillation = int(len(anatomy.classifier_heads) > 1 and anatomy.num_prefix_tokens > known)
    return {
        "class": list(range(known)),
        "distillation": list(range(known, known + distillation)),
        "register": list(range(known + distillation, anatomy.num_prefix_tokens)),
    }


def _in_words(tokens: dict[str, list[int]]) -> str:
    words = [f"{len(places)} {word}" for word, places in tokens.items() if places]
    return ", ".join(words) if words else "no prefix token"
