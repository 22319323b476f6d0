"""What every axis of every tensor of a sequence model stands for, so that weights fit models of other shapes."""

from dataclasses import dataclass, field

import torch
from timm.layers import (
    AttentionPoolLatent,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
    resample_abs_pos_embed,
    resample_patch_embed,
    resize_rel_pos_bias_table,
)
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, Projection, tensor_at
from remap.backbones.families.reading import linear, mlp_projections, tensor_path
from remap.backbones.typed import submodule
from remap.errors import BackboneError

# Where a tensor belongs: a block by number, the attention pool behind the last block, or none of them.
Place = int | str
POOL, OUTSIDE = "pool", ""


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor.

    ``role``: "width" (channels of the residual stream), "heads" (heads x dimensions of a head), "head" (heads),
    "head_dim" (dimensions of a head), "pairs" (rotated pairs of a head), "hidden" (units of the MLP) or "fixed".
    ``reads``: the layer sums over this axis.
    """

    role: str
    reads: bool = False


FIXED, WIDTH, HEADS, HIDDEN = Axis("fixed"), Axis("width"), Axis("heads"), Axis("hidden")


@dataclass(frozen=True)
class Piece:
    """A part of a tensor with one meaning, ``tensor[at]``.

    Attributes:
        absent: The value that stands for a model that has no such part, where there is one.
        resize: "patch", "grid" or "table" where the part can be resampled; ``grid`` is then its size in patches.
        trains: False for buffers that never train, which are read and never written.
    """

    path: str
    axes: tuple[Axis, ...]
    at: tuple[slice | int, ...] = ()
    absent: float | None = None
    resize: str | None = None
    grid: tuple[int, int] = (0, 0)
    trains: bool = True

    def of(self, model: nn.Module) -> Tensor:
        return tensor_at(model, self.path).detach()[self.at or ...]


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are rotated: pairs (2j, 2j + 1), or (j, j + h/2) where ``half``.

    ``by_axis``: the first half of the pairs turns with the row, the second with the column, each from high to low
    frequency; None where pairs cannot be distinguished in this way.
    """

    kind: str
    half: bool
    by_axis: bool | None


@dataclass(frozen=True)
class Unit:
    """Sizes of an attention with its MLP."""

    heads: int
    head_dim: int
    hidden: int


@dataclass
class Layout:
    """All parts of a sequence model, by place and by a word that is the same in every model."""

    width: int
    depth: int
    rotary: Rotary | None
    gated: bool
    units: dict[Place, Unit]
    pieces: dict[tuple[Place, str], Piece] = field(default_factory=dict)

    @property
    def shares_table(self) -> bool:
        """Whether the blocks share one table of relative positions, and so the meaning of each head."""
        return (OUTSIDE, "table") in self.pieces


def layout_of(model: nn.Module, anatomy: Anatomy) -> Layout:
    """Return the layout of a model of one sequence of tokens; the classifier is left out.

    Raises:
        BackboneError: The family has no single sequence of tokens.
    """
    if "sequence" not in anatomy.parts:
        raise BackboneError(
            f"weights of the family '{anatomy.family}' cannot be remapped: its stages have different shapes",
            allowed="families with one sequence of tokens: plain, rotary and relative-position vision transformers",
            do="leave student.init out, or choose two models of one of these families",
        )
    if tensor_path(model, "patch_embed.proj.weight") is None:
        raise BackboneError(
            f"weights of this '{anatomy.family}' cannot be remapped: its patches do not come from one convolution",
            allowed="vision transformers with one convolution for patches",
            do="leave student.init out, or choose two such models",
        )
    blocks = anatomy.attention_blocks
    units: dict[Place, Unit] = {i: Unit(b.heads, b.head_dim, b.mlp_hidden) for i, b in enumerate(blocks)}
    gated = "fc1_gate" in blocks[0].projections
    layout = Layout(anatomy.width, anatomy.depth, _rotary(model), gated, units)
    for index, block in enumerate(blocks):
        _add_projections(layout, model, index, block.projections)
        for norm in block.norms:
            _add_norm(layout, model, index, norm.removeprefix(f"{block.block}."), norm)
        for word, path in (("attn_scale", block.attn_scale), ("mlp_scale", block.mlp_scale)):
            if path is not None:
                layout.pieces[index, word] = Piece(path, (WIDTH,), absent=1.0)
        table = tensor_path(model, f"{block.attn}.relative_position_bias_table")
        if table is not None:
            layout.pieces[index, "table"] = _table(table, anatomy)
    _add_outside(layout, model, anatomy)
    if getattr(model, "attn_pool", None) is not None:
        _add_pool(layout, model)
    # What has no role here (a convolutional stem) is copied by name, where shapes are equal.
    claimed = {piece.path for piece in layout.pieces.values()}
    for name, parameter in model.named_parameters():
        if name not in claimed and not anatomy.is_head(name):
            layout.pieces[OUTSIDE, name] = Piece(name, (FIXED,) * parameter.ndim)
    return layout


def resized(piece: Piece, tensor: Tensor, target: Piece, shape: torch.Size) -> Tensor:
    """Return a part resampled to the size it has in another model: ``shape`` is that model's whole part."""
    if piece.resize == "patch" and tensor.shape[-2:] != shape[-2:]:
        return resample_patch_embed(tensor.float(), list(shape[-2:])).to(tensor.dtype)
    if piece.grid == target.grid:
        return tensor
    if piece.resize == "grid":
        return resample_abs_pos_embed(tensor, list(target.grid), list(piece.grid), num_prefix_tokens=0)
    if piece.resize == "table":
        whole = (shape[0], tensor.shape[1])
        return resize_rel_pos_bias_table(tensor, target.grid, whole, old_window_size=piece.grid)
    return tensor


def _rotary(model: nn.Module) -> Rotary | None:
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    by_axis = {RotaryEmbeddingMixed: False, RotaryEmbeddingMRope: None}.get(type(rope), True)
    half = getattr(model.get_submodule("blocks.0.attn"), "rotate_half", False)
    return Rotary(type(rope).__name__, bool(half), by_axis)


_ROWS = {"q": HEADS, "k": HEADS, "v": HEADS, "o": WIDTH, "fc1": HIDDEN, "fc1_gate": HIDDEN, "fc2": WIDTH}
_COLUMNS = {"o": "heads", "fc2": "hidden"}
_NORMS = {
    **{norm: WIDTH for norm in ("norm1", "norm2", "norm")},
    **{norm: Axis("head_dim") for norm in ("attn.q_norm", "attn.k_norm")},
    "attn.norm": HEADS,
    "mlp.norm": HIDDEN,
}


def _add_projections(layout: Layout, model: nn.Module, place: Place, projections: dict[str, Projection]) -> None:
    trained = dict(model.named_parameters())
    for word, p in projections.items():
        rows, columns = _ROWS[word], Axis(_COLUMNS.get(word, "width"), reads=True)
        layout.pieces[place, f"{word}.weight"] = Piece(f"{p.path}.weight", (rows, columns), (p.rows,))
        if p.bias is not None:
            at = (slice(p.bias_start, p.bias_start + p.stop - p.start),)
            layout.pieces[place, f"{word}.bias"] = Piece(p.bias, (rows,), at, absent=0.0, trains=p.bias in trained)


def _add_norm(layout: Layout, model: nn.Module, place: Place, word: str, path: str, axis: Axis | None = None) -> None:
    for name, _ in model.get_submodule(path).named_parameters():
        layout.pieces[place, f"{word}.{name}"] = Piece(f"{path}.{name}", (axis or _NORMS[word],))


def _add_outside(layout: Layout, model: nn.Module, anatomy: Anatomy) -> None:
    pieces, grid = layout.pieces, anatomy.grid
    kernel = (WIDTH, FIXED, FIXED, FIXED)
    pieces[OUTSIDE, "patch.weight"] = Piece("patch_embed.proj.weight", kernel, resize="patch", grid=grid)
    patch_bias = tensor_path(model, "patch_embed.proj.bias")
    if patch_bias is not None:
        pieces[OUTSIDE, "patch.bias"] = Piece(patch_bias, (WIDTH,), absent=0.0)
    for norm in anatomy.embedding_norms:
        if not norm.startswith("attn_pool."):
            _add_norm(layout, model, OUTSIDE, norm, norm, WIDTH)
    if anatomy.final_norm is not None:
        _add_norm(layout, model, OUTSIDE, "final_norm", anatomy.final_norm, WIDTH)
    words = []
    for path, word in (("cls_token", "class"), ("dist_token", "distillation"), ("reg_token", "register")):
        tensor = getattr(model, path, None)
        for index in range(0 if tensor is None else tensor.shape[1]):
            words.append(f"{word}{index}" if word == "register" else word)
            at = (slice(None), slice(index, index + 1))
            pieces[OUTSIDE, f"token.{words[-1]}"] = Piece(path, (FIXED, FIXED, WIDTH), at)
    positions = getattr(model, "pos_embed", None)
    if positions is not None:
        prefix = positions.shape[1] - anatomy.num_patches
        for index, word in enumerate(words[:prefix]):
            at = (slice(None), slice(index, index + 1))
            pieces[OUTSIDE, f"position.{word}"] = Piece("pos_embed", (FIXED, FIXED, WIDTH), at, absent=0.0)
        at = (slice(None), slice(prefix, None))
        axes = (FIXED, FIXED, WIDTH)
        pieces[OUTSIDE, "positions"] = Piece("pos_embed", axes, at, absent=0.0, resize="grid", grid=grid)
    if getattr(model, "rel_pos_bias", None) is not None:
        pieces[OUTSIDE, "table"] = _table("rel_pos_bias.relative_position_bias_table", anatomy)
    if isinstance(getattr(model, "rope", None), RotaryEmbeddingMixed):
        for index in range(anatomy.depth):  # (2, depth, heads, pairs)
            axes = (FIXED, Axis("head"), Axis("pairs"))
            pieces[index, "frequencies"] = Piece("rope.freqs", axes, (slice(None), index))


def _table(path: str, anatomy: Anatomy) -> Piece:
    return Piece(path, (FIXED, Axis("head")), absent=0.0, resize="table", grid=anatomy.grid)


def _add_pool(layout: Layout, model: nn.Module) -> None:
    pool = submodule(model, "attn_pool", AttentionPoolLatent)
    width = pool.kv.weight.shape[0] // 2
    words = {
        "k": linear(model, "attn_pool.kv", slice(0, width)),
        "v": linear(model, "attn_pool.kv", slice(width, 2 * width)),
    }
    for word, path in (("q", "q"), ("o", "proj")):
        if isinstance(getattr(pool, path), nn.Linear):
            words[word] = linear(model, f"attn_pool.{path}")
    if pool.mlp is not None:
        words |= mlp_projections(model, "attn_pool.mlp")
    hidden = words["fc1"].stop - words["fc1"].start if "fc1" in words else 0
    layout.units[POOL] = Unit(pool.num_heads, pool.head_dim, hidden)
    _add_projections(layout, model, POOL, words)
    for norm, axis in (("q_norm", Axis("head_dim")), ("k_norm", Axis("head_dim")), ("norm", WIDTH)):
        _add_norm(layout, model, POOL, norm if norm == "norm" else f"attn.{norm}", f"attn_pool.{norm}", axis)
    layout.pieces[POOL, "latent"] = Piece("attn_pool.latent", (FIXED, FIXED, WIDTH))
    if pool.pos_embed is not None:
        layout.pieces[POOL, "positions"] = Piece("attn_pool.pos_embed", (FIXED, WIDTH), absent=0.0)
