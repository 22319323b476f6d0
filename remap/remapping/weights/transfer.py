"""Move tensors: the teacher's, selected by a plan of indices, become the student's."""

from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families.tensor_axes import OUTSIDE, Axis, Layout, Place, resized

# What a new block writes into the residual stream: without it the block passes its input on.
SILENT = ("o.weight", "o.bias", "fc2.weight", "fc2.bias")
# A scale of the residual branch acts on the rows of the branch's last layer.
_SCALED = {"o.weight": "attn_scale", "o.bias": "attn_scale", "fc2.weight": "mlp_scale", "fc2.bias": "mlp_scale"}


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    model: nn.Module
    anatomy: Anatomy
    layout: Layout


@dataclass(frozen=True)
class UnitPlan:
    """For an attention with its MLP: the teacher's place, and the teacher's index behind each index of the student.

    ``dims`` are dimensions inside a head.
    """

    source: Place
    heads: tuple[int, ...]
    dims: tuple[int, ...]
    hidden: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The teacher's index behind each index of the student. A unit of None is new.

    An index that comes several times is a copy; layers that sum over the copies share the weight out.
    """

    width: tuple[int, ...]
    units: dict[Place, UnitPlan | None]


@dataclass
class Transferred:
    """Parts by name, see ``Report``."""

    copied: list[tuple[str, str]] = field(default_factory=list)
    neutral: list[str] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def transfer(teacher: Side, student: Side, plan: Plan) -> Transferred:
    """Write every part of the student that the teacher has a counterpart of."""
    its, mine = teacher.layout, student.layout
    done, used = Transferred(), set[tuple[Place, str]]()
    for (place, word), piece in mine.pieces.items():
        if not piece.trains:
            continue
        name, own = _name(place, word), piece.of(student.model)
        unit = plan.units.get(place) if place != OUTSIDE else None
        if place != OUTSIDE and unit is None:
            if word in SILENT:
                own.zero_()
                done.neutral.append(name)
            else:
                done.kept.append((name, "a new block" if isinstance(place, int) else "the teacher has none"))
            continue
        key = (unit.source if unit else OUTSIDE, word)
        if key not in its.pieces and word == "table":
            key = (OUTSIDE, word)  # the teacher's blocks share theirs
        if key not in its.pieces:
            if piece.absent is None:
                done.kept.append((name, "the teacher has none"))
            else:
                own.fill_(piece.absent)
                done.neutral.append(name)
            continue
        used.add(key)
        taken = its.pieces[key]
        value = resized(taken, taken.of(teacher.model), piece, own.shape)
        value, folded = _folded(value, word, key, teacher, mine, place)
        used |= folded
        value = _gathered(value, taken.axes, plan, unit, its)
        if value.shape != own.shape:
            done.kept.append((name, f"{tuple(own.shape)}, and {tuple(value.shape)} in the teacher"))
            continue
        own.copy_(value * _score_scale(word, place, key, its, mine))
        done.copied.append((name, _name(*key)))
    sources = {unit.source for unit in plan.units.values() if unit} | {OUTSIDE}
    unused = (key for key in its.pieces if key not in used and key[0] in sources)
    done.left += [_name(*key) for key in unused if _matters(*key, teacher)]
    return done


def _folded(
    value: Tensor, word: str, key: tuple[Place, str], teacher: Side, mine: Layout, place: Place
) -> tuple[Tensor, set[tuple[Place, str]]]:
    """Return the part with what the teacher stores apart and the student cannot, and the names of those.

    The scale of a branch goes into its last layer, the position of a prefix token into the token.
    """
    its, source = teacher.layout, teacher.model
    if word in _SCALED:
        scale = (key[0], _SCALED[word])
        if scale in its.pieces and (place, scale[1]) not in mine.pieces:
            gamma = its.pieces[scale].of(source)
            return value * gamma.reshape(-1, *(1,) * (value.ndim - 1)), {scale}
    if word.startswith("token."):
        position = (OUTSIDE, f"position.{word.removeprefix('token.')}")
        if position in its.pieces and position not in mine.pieces:
            return value + its.pieces[position].of(source), {position}
    return value, set()


def _gathered(value: Tensor, axes: tuple[Axis, ...], plan: Plan, unit: UnitPlan | None, its: Layout) -> Tensor:
    for dim, axis in enumerate(axes):
        indices = _indices(axis, plan, unit, its)
        if indices is None:
            continue
        index = torch.tensor(indices, device=value.device)
        value = value.index_select(dim, index)
        if axis.reads:
            copies = torch.bincount(index)[index]
            value = value / copies.reshape(-1, *(1,) * (value.ndim - 1 - dim))
    return value


def _indices(axis: Axis, plan: Plan, unit: UnitPlan | None, its: Layout) -> tuple[int, ...] | None:
    if axis.role == "fixed":
        return None
    if axis.role == "width":
        return plan.width
    if unit is None:  # the table that all blocks share
        unit = plan.units[0]
        assert unit is not None  # new blocks come between the teacher's, the first of which stays the first
    if axis.role == "head":
        return unit.heads
    if axis.role == "head_dim":
        return unit.dims
    if axis.role == "hidden":
        return unit.hidden
    if axis.role == "pairs":  # of neighbours
        return tuple(dim // 2 for dim in unit.dims[::2])
    size = its.units[unit.source].head_dim
    return tuple(head * size + dim for head in unit.heads for dim in unit.dims)


def _score_scale(word: str, place: Place, key: tuple[Place, str], its: Layout, mine: Layout) -> float:
    """Return the factor of queries where the number of dimensions h of a head changes: sqrt(h_T / h_S), else 1.

    Attention divides q k by sqrt(h). Copied dimensions then give the same scores, evenly spaced ones an unbiased
    estimate of them.
    """
    if place == OUTSIDE or word.partition(".")[0] not in ("q", "attn"):
        return 1.0
    normed = (place, "attn.q_norm.weight") in mine.pieces and (key[0], "attn.q_norm.weight") in its.pieces
    scaled = word.startswith("attn.q_norm.") if normed else word.startswith("q.")
    return sqrt(its.units[key[0]].head_dim / mine.units[place].head_dim) if scaled else 1.0


def _matters(place: Place, word: str, teacher: Side) -> bool:
    """Return whether leaving the part out loses anything: a zero bias does not."""
    piece = teacher.layout.pieces[place, word]
    return piece.absent is None or bool((piece.of(teacher.model) != piece.absent).any())


def _name(place: Place, word: str) -> str:
    if place == OUTSIDE:
        return word
    return f"block {place} {word}" if isinstance(place, int) else f"{place} {word}"
