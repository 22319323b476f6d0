"""Making a teacher's and a student's attention comparable: which blocks, which tokens, which grid.

Letters: S tokens of the shared set {class token if any, patches}, Q patches of the source grid, P patches of the
target grid, h and w rows and columns of a grid (in tokens); x any leading dimensions.
"""

from collections.abc import Sequence
from dataclasses import replace
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


def resize_attention(
    map_xSS: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    has_class_token: bool,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Carry an attention map from one patch grid to another; rows sum to 1 before and after.

    Keys (columns): the patch part of a row is an image on the grid; it is resized and then scaled so that the row
    keeps its total patch mass, while the class weight stays what it was (AttnDistill, Wang et al. 2022, does this
    for the class row). Queries (rows): the patch rows are interpolated on the grid, the class row is kept.

    Args:
        map_xSS: Any leading dimensions, then queries by keys over {class token if any, patches row by row}.
        source: Grid (h, w) of ``map_xSS``. Equal to ``target``, the very same tensor comes back.
        interpolation: "bicubic" may undershoot; what falls below zero is set to zero before re-normalising.
    """
    if source == target:
        return map_xSS
    split = int(has_class_token)
    resize_PQ = _resize_matrix(source, target, interpolation, map_xSS)
    with float32_region(map_xSS):
        keys = _resize_keys(map_xSS, resize_PQ, split)
        patch_rows = _resized(resize_PQ, keys[..., split:, :]).clamp_min(0.0)
    # Bilinear weights already sum to 1; bicubic ones only do before the clamp.
    patch_rows = patch_rows / patch_rows.sum(dim=-1, keepdim=True)
    return torch.cat([keys[..., :split, :], patch_rows], dim=-2)


def resize_rows(
    map_xRS: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    has_class_token: bool,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Carry some rows (R queries) of an attention map to another patch grid: their keys as ``resize_attention`` does.

    With equal grids the very same tensor comes back.
    """
    if source == target:
        return map_xRS
    resize_PQ = _resize_matrix(source, target, interpolation, map_xRS)
    with float32_region(map_xRS):
        return _resize_keys(map_xRS, resize_PQ, int(has_class_token))


def resize_scores(
    scores_xSS: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    has_class_token: bool,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Carry scores before the softmax to another patch grid: linear in rows and columns, nothing re-normalised.

    Scores with the class token, on either side, are images on the grid of the other side.
    """
    keys_xSS = resize_tokens(scores_xSS.mT, source, target, has_class_token, interpolation).mT
    return resize_tokens(keys_xSS, source, target, has_class_token, interpolation)


def resize_tokens(
    tokens_xSD: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    has_class_token: bool,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Carry one vector a token from one patch grid to another: each channel is an image; the class token is kept.

    With equal grids the very same tensor comes back.
    """
    if source == target:
        return tokens_xSD
    split = int(has_class_token)
    resize_PQ = _resize_matrix(source, target, interpolation, tokens_xSD)
    with float32_region(tokens_xSD):
        return torch.cat([tokens_xSD[..., :split, :], _resized(resize_PQ, tokens_xSD[..., split:, :])], dim=-2)


def _resize_keys(map_xSS: Tensor, resize_PQ: Tensor, split: int) -> Tensor:
    """Resize the patch part of each row, keeping its mass: (x, S, split + Q) -> (x, S, split + P)."""
    patches_xSQ = map_xSS[..., split:]
    resized_xSP = _resized(resize_PQ, patches_xSQ.mT).mT.clamp_min(0.0)
    mass = patches_xSQ.sum(dim=-1, keepdim=True)
    # A row that gives everything to the class token has no patch mass: 0 / tiny stays 0.
    scale = mass / resized_xSP.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(map_xSS.dtype).tiny)
    return torch.cat([map_xSS[..., :split], resized_xSP * scale], dim=-1)


def _resized(resize_PQ: Tensor, images_xQD: Tensor) -> Tensor:
    """Return the product, (x, P, D): the same to the last bit for an image whatever other images there are."""
    stack_nQD = images_xQD.reshape(-1, *images_xQD.shape[-2:]).contiguous()
    count = stack_nQD.shape[0]
    # One matrix alone is multiplied in another order than one of several. An exported program takes any number.
    several_nQD = stack_nQD.repeat(2, 1, 1) if not torch.compiler.is_compiling() and count == 1 else stack_nQD
    resized_nPD = resize_PQ.expand(several_nQD.shape[0], -1, -1).bmm(several_nQD)[:count]
    return resized_nPD.reshape(*images_xQD.shape[:-2], *resized_nPD.shape[1:])


def _resize_matrix(
    source: tuple[int, int], target: tuple[int, int], interpolation: Interpolation, like: Tensor
) -> Tensor:
    """Return ``_make_matrix`` on the device and in the dtype of ``like``.

    It is kept, but not where a program is exported: tensors hold no numbers there.
    """
    make = _make_matrix.__wrapped__ if torch.compiler.is_exporting() else _make_matrix
    return make(source, target, interpolation, like.device, like.dtype)


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
