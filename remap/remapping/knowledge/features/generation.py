"""Masked generation of the teacher's tokens. B batch, N patches of the student's grid, D width.

Masks are drawn anew for every batch from PyTorch's global generator, which the training loop seeds each step: the same
recipe and seed give the same masks, also after an interruption.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from remap.errors import BackboneError
from remap.registry import LATER
from remap.remapping.knowledge.features.terms import Generator, TokenTerm, token_pairs
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.remapping.signals import Signals, float32_region
from remap.tuning.base import Options


class ViTKD(TokenTerm):
    """Yang et al. 2022, arXiv 2209.02432: mimic the first blocks, generate the last one's tokens.

    Mimicking: a linear map of the student's patches of each of the first ``shallow`` blocks against the teacher's.
    Generation: the student's patches behind the final norm are mapped to the teacher's width, a random share ``mask``
    of them is replaced by a learned token, and a generator of two convolutions restores the teacher's tokens behind
    its final norm at the masked places; divided by ``mask``. The norm makes them as large as the paper's weights want
    them; it is there in the authors' code. Both are sums of squared errors over tokens and channels, mean over images,
    as in the paper, whose weights 3e-5 and 3e-6 are the row's weight and ``generation``.
    """

    class Config(Options):
        shallow: int = Field(default=2, ge=1, description="Number of first blocks that are mimicked.")
        mask: float = Field(default=0.5, gt=0.0, lt=1.0, description="Share of masked tokens of the last ones.")
        generation: float = Field(default=0.1, gt=0.0, description="Weight of generation relative to mimicking.")

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        depths = pair.student.depth, pair.known_teacher("vitkd").depth
        if config.shallow > min(depths):
            raise BackboneError(
                "shallow must not count more blocks than both networks have",
                given=config.shallow,
                allowed=f"1 to {min(depths)}: the student has {depths[0]} blocks, the teacher {depths[1]}",
            )
        (last,) = token_pairs("last", pair, "vitkd")
        super().__init__(pair, config, (*((block, block) for block in range(config.shallow)), last))
        self.mimics = nn.ModuleList([nn.Linear(*self.widths(s, t)) for s, t in self.blocks[:-1]])
        width = self.widths(*last)[1]
        self.align = nn.Linear(*self.widths(*last))
        self.mask_token_D = nn.Parameter(torch.zeros(width))
        self.generator = Generator(width)

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        *shallow, (s, t) = self.blocks
        patches_BND = student.tokens[s].patches_BND
        with float32_region(patches_BND):
            errors = [
                (mimic(student.tokens[a].patches_BND.float()) - target[self.item(a, b)].float()).square().sum()
                for mimic, (a, b) in zip(self.mimics, shallow, strict=True)
            ]
            aligned_BND = self.align(patches_BND.float())
            masked_BN1 = exact_mask(aligned_BND, self.config.mask)
            given_BND = torch.where(masked_BN1, self.mask_token_D, aligned_BND)
            restored_BND = self.generator.generate(given_BND, self.grid(s))
            gap_BND = (restored_BND - target[self.item(s, t)].float()) * masked_BN1
            generation = gap_BND.square().sum() / self.config.mask
        return (torch.stack(errors).sum() + self.config.generation * generation) / len(patches_BND)


class MaskedGeneration(TokenTerm):
    """Yang et al. 2022 (MGD), arXiv 2205.01529: generate all of the teacher's tokens from some of the student's.

    The student's patches behind the final norm are mapped to the teacher's width by a linear layer, each is set to
    zero with probability ``mask``, and two convolutions generate the teacher's tokens from the rest. Mean squared
    error over images, patches and channels; the paper has the sum over an image, with a weight of 2e-5 to 7e-5.
    Tokens are masked as in the paper's equation 2; the authors' code for classification masks channels instead, each
    on the whole grid, with probability 0.15.
    """

    class Config(Options):
        masked: Annotated[Literal["tokens", "channels"], LATER] = Field(
            default="tokens", description="Mask tokens (the paper), or channels (the authors' code)."
        )
        mask: float | None = Field(
            default=None, gt=0.0, lt=1.0, description="Share that is masked; null is 0.5 of tokens, 0.15 of channels."
        )

        @model_validator(mode="after")
        def _write_share(self) -> Self:
            if self.mask is None:
                object.__setattr__(self, "mask", {"tokens": 0.5, "channels": 0.15}[self.masked])
            return self

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config, token_pairs("last", pair, "mgd"))
        self.align = nn.Linear(*self.widths(*self.blocks[0]))
        self.generator = Generator(self.widths(*self.blocks[0])[1])

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        ((s, t),) = self.blocks
        patches_BND = student.tokens[s].patches_BND
        with float32_region(patches_BND):
            aligned_BND = self.align(patches_BND.float())
            batch, tokens, width = aligned_BND.shape
            shape = (batch, tokens, 1) if self.config.masked == "tokens" else (batch, 1, width)
            assert self.config.mask is not None  # written out
            kept = torch.rand(shape, device=aligned_BND.device) >= self.config.mask
            generated_BND = self.generator.generate(aligned_BND * kept, self.grid(s))
            return F.mse_loss(generated_BND, target[self.item(s, t)].float())


def exact_mask(tokens_BND: Tensor, share: float) -> Tensor:
    """Return True (B, N, 1) at random places, in each image at N - floor(N * (1 - share)) of them."""
    count, length = tokens_BND.shape[:2]
    order_BN = torch.rand(count, length, device=tokens_BND.device).argsort(dim=1)
    return (order_BN >= int(length * (1.0 - share)))[..., None]
