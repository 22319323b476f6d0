"""Making a teacher's and a student's attention comparable: which blocks, which tokens, which grid.

Letters: S tokens of the shared set {class token if any, patches}, Q patches of the source grid, P patches of the
target grid, h and w rows and columns of a grid (in tokens); x any leading dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from remap.errors import BackboneError
from remap.remapping.signals import Attention, float32_region

Layers = Literal["last", "uniform"] | Sequence[tuple[int, int]]
Interpolation = Literal["bilinear", "bicubic"]


def pair_blocks(layers: Layers, student_depth: int, teacher_depth: int) -> tuple[tuple[int, int], ...]:
    """Return which student block learns from which teacher block, as (student, teacher) counted from 0.

    Args:
        layers: "last" pairs the last blocks (MiniLM, arXiv 2002.10957); "uniform" pairs every student block with the
            teacher block at the same relative depth (TinyBERT, arXiv 1909.10351, uniform strategy: g(m) = m * T / S
            with m counted from 1, here rounded up); a list names the pairs, negative indices count from the end.

    Raises:
        BackboneError: The list is empty or names a block that one of the networks does not have.
    """
    if layers == "last":
        return ((student_depth - 1, teacher_depth - 1),)
    if layers == "uniform":
        # -(-a // b) is the ceiling of a / b in whole numbers.
        return tuple((m, -(-(m + 1) * teacher_depth // student_depth) - 1) for m in range(student_depth))
    pairs = tuple((int(s), int(t)) for s, t in layers)
    in_range = all(-student_depth <= s < student_depth and -teacher_depth <= t < teacher_depth for s, t in pairs)
    if not pairs or not in_range:
        raise BackboneError(
            "layers must name blocks that both networks have",
            given=[list(pair) for pair in pairs],
            allowed=f"'last', 'uniform' or [[student, teacher], ...]: the student has {student_depth} blocks "
            f"(0 to {student_depth - 1}), the teacher {teacher_depth} (0 to {teacher_depth - 1}); -1 is the last",
        )
    return tuple((s % student_depth, t % teacher_depth) for s, t in pairs)


def to_shared_tokens(attention: Attention, keep_class_token: bool) -> Attention:
    """Cut the class token where the other network has none.

    The cut is made before the softmax, which equals dividing each head's cut row by its sum, and is the same way
    in which prompts and registers were cut.
    """
    if keep_class_token or not attention.has_class_token:
        return attention
    return replace(
        attention,
        q_BHSh=attention.q_BHSh[:, :, 1:],
        k_BHSh=attention.k_BHSh[:, :, 1:],
        v_BHSh=None if attention.v_BHSh is None else attention.v_BHSh[:, :, 1:],
        has_class_token=False,
        bias_BHSS=None if attention.bias_BHSS is None else attention.bias_BHSS[..., 1:, 1:],
    )


def class_row(attention: Attention) -> Attention:
    """Return the class token's attention as one query: its map is (B, H, 1, S), S times smaller than the full one.

    Equal to row 0 of the full map, because each row has its own softmax.
    """
    assert attention.has_class_token
    bias = attention.bias_BHSS
    return replace(attention, q_BHSh=attention.q_BHSh[:, :, :1], bias_BHSS=None if bias is None else bias[..., :1, :])


@dataclass(frozen=True)
class Resize:
    """From one patch grid to another; between equal grids the very same tensor comes back.

    Attributes:
        source, target: Grids (h, w).
        has_class_token: Whether the class token stands in front of the patches; it is kept.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    has_class_token: bool
    interpolation: Interpolation = "bilinear"

    def attention(self, map_xSS: Tensor) -> Tensor:
        """Carry an attention map to the target; rows sum to 1 before and after.

        Keys (columns): the patch part of a row is an image on the grid; it is resized and then scaled so that the row
        keeps its total patch mass, while the class weight stays what it was (AttnDistill, Wang et al. 2022, does this
        for the class row). Queries (rows): the patch rows are interpolated on the grid, the class row is kept.
        "bicubic" may undershoot; what falls below zero is set to zero before re-normalising.

        Args:
            map_xSS: Any leading dimensions, then queries by keys over {class token if any, patches row by row}.
        """
        if self.source == self.target:
            return map_xSS
        split = int(self.has_class_token)
        keys = self.rows(map_xSS)
        with float32_region(map_xSS):
            patch_rows = _resized(self._matrix(map_xSS), keys[..., split:, :]).clamp_min(0.0)
        # Bilinear weights already sum to 1; bicubic ones only do before the clamp.
        patch_rows = patch_rows / patch_rows.sum(dim=-1, keepdim=True)
        return torch.cat([keys[..., :split, :], patch_rows], dim=-2)

    def rows(self, map_xRS: Tensor) -> Tensor:
        """Carry some rows (R queries) of an attention map: their keys as ``attention`` does, each keeping its mass."""
        if self.source == self.target:
            return map_xRS
        split = int(self.has_class_token)
        patches_xRQ = map_xRS[..., split:]
        with float32_region(map_xRS):
            resized_xRP = _resized(self._matrix(map_xRS), patches_xRQ.mT).mT.clamp_min(0.0)
        mass = patches_xRQ.sum(dim=-1, keepdim=True)
        # A row that gives everything to the class token has no patch mass: 0 / tiny stays 0.
        scale = mass / resized_xRP.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(map_xRS.dtype).tiny)
        return torch.cat([map_xRS[..., :split], resized_xRP * scale], dim=-1)

    def scores(self, scores_xSS: Tensor) -> Tensor:
        """Carry scores before the softmax: linear in rows and columns, nothing re-normalised.

        Scores with the class token, on either side, are images on the grid of the other side.
        """
        return self.tokens(self.tokens(scores_xSS.mT).mT)

    def tokens(self, tokens_xSD: Tensor) -> Tensor:
        """Carry one vector a token: each channel is an image."""
        if self.source == self.target:
            return tokens_xSD
        split = int(self.has_class_token)
        with float32_region(tokens_xSD):
            patches = _resized(self._matrix(tokens_xSD), tokens_xSD[..., split:, :])
        return torch.cat([tokens_xSD[..., :split, :], patches], dim=-2)

    def _matrix(self, like: Tensor) -> Tensor:
        """Return ``_make_matrix`` for a tensor, kept but where a program is traced: tensors hold no numbers there."""
        make = _make_matrix.__wrapped__ if torch.compiler.is_compiling() else _make_matrix
        return make(self.source, self.target, self.interpolation, like.device, like.dtype)


def _resized(resize_PQ: Tensor, images_xQD: Tensor) -> Tensor:
    """Return the product, (x, P, D): the same to the last bit for an image whatever other images there are."""
    stack_nQD = images_xQD.reshape(-1, *images_xQD.shape[-2:]).contiguous()
    count = stack_nQD.shape[0]
    # One matrix alone is multiplied in another order than one of several. An exported program takes any number.
    several_nQD = stack_nQD.repeat(2, 1, 1) if not torch.compiler.is_compiling() and count == 1 else stack_nQD
    resized_nPD = resize_PQ.expand(several_nQD.shape[0], -1, -1).bmm(several_nQD)[:count]
    return resized_nPD.reshape(*images_xQD.shape[:-2], *resized_nPD.shape[1:])


@lru_cache(maxsize=32)
def _make_matrix(
    source: tuple[int, int],
    target: tuple[int, int],
    interpolation: Interpolation,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Return (P, Q) weights of resizing an image from ``source`` to ``target``, made in float64; rows sum to 1.

    Resizing is linear, so its weights are the images of the unit vectors. Applying them is one small matrix
    product on any device, much cheaper than interpolating one image a row. Antialiasing makes a shrunk map an
    average over all source patches instead of a sample of some.
    """
    count = source[0] * source[1]
    units = torch.eye(count, dtype=torch.float64).reshape(count, 1, *source)
    images = F.interpolate(units, size=target, mode=interpolation, align_corners=False, antialias=True)
    return images.reshape(count, target[0] * target[1]).mT.contiguous().to(device, dtype)
