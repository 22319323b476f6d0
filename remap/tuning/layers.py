"""Which linear layers a method changes: the projections behind its targets, by the layer that makes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from remap.backbones.anatomy import Anatomy, Block, ConvBlock, Projection
from remap.errors import BackboneError

Target = Literal["q", "k", "v", "o", "fc1", "fc2", "linear", "conv"]
_ELSE = "or [fc1, fc2] without attention, or [linear]."
# Options of methods. For those that change projections, and for those that change complete layers:
ProjectionTargets = Annotated[
    tuple[Target, ...] | None, Field(min_length=1, description=f"Layers to change; null is [q, v], {_ELSE}")
]
LayerTargets = Annotated[
    tuple[Target, ...] | None, Field(min_length=1, description=f"Layers to change; null is [q, k, v], {_ELSE}")
]


@dataclass(frozen=True)
class Layer:
    """One linear layer that is changed as one, and the projections that are rows of it (q, k, v where fused)."""

    path: str
    words: tuple[str, ...]
    projections: tuple[Projection, ...]

    @property
    def called(self) -> bool:
        """Whether the backbone calls the layer for all of them, instead of reading its weight."""
        return all(projection.called for projection in self.projections)

    @property
    def foreign_biases(self) -> list[tuple[Projection, str]]:
        """Projections whose bias is not added by a call of the layer, with the path of the bias."""
        own = f"{self.path}.bias"
        return [(p, p.bias) for p in self.projections if p.bias is not None and (p.bias != own or not p.called)]


def by_layer(projections: Iterable[Projection]) -> dict[str, tuple[Projection, ...]]:
    """Group projections by the path of the layer that makes them, each group in the order of its rows."""
    layers: dict[str, list[Projection]] = {}
    for projection in projections:
        layers.setdefault(projection.path, []).append(projection)
    return {path: tuple(sorted(rows, key=lambda p: p.start)) for path, rows in layers.items()}


def layers_of(anatomy: Anatomy, words: Sequence[str] | None, default: Sequence[str] = ("q", "k", "v")) -> list[Layer]:
    """Return the layers behind ``words``, in the order of the blocks, each with all projections that are in it.

    Args:
        words: None for those of ``default`` that the backbone has, see ``default_targets``.

    Raises:
        BackboneError: No block has a projection of some word.
    """
    wanted = target_words(anatomy, words, default)
    return [
        Layer(path, tuple(word for word, p in block.projections.items() if p.path == path), rows)
        for block in anatomy.blocks
        for path, rows in by_layer(block.projections.values()).items()
        if any(projection.path == path for projection in among(block, wanted).values())
    ]


def target_words(anatomy: Anatomy, words: Sequence[str] | None, default: Sequence[str] = ("q", "v")) -> list[str]:
    """Return the words that are meant, each once: those given or the default ones, and with fc1 the gate of an MLP.

    Raises:
        BackboneError: No block has a projection of some word.
    """
    words, present = words or default_targets(anatomy, default), words_of(anatomy)
    for word in words:
        if word not in present:
            raise BackboneError(
                f"no block of this backbone has a layer called {word}",
                given=f"targets: {', '.join(words)}",
                allowed=", ".join(sorted(present)) or "none: all its layers are too narrow, take norm or partial",
            )
    return list(dict.fromkeys(part for word in words for part in ((word, "fc1_gate") if word == "fc1" else (word,))))


def words_of(anatomy: Anatomy) -> set[str]:
    """Return the words for layers that a backbone has: those of ``Target``."""
    return {key.partition(":")[0] for block in anatomy.blocks for key in block.projections}


def default_targets(anatomy: Anatomy, default: Sequence[str] = ("q", "v")) -> list[str]:
    """Return the words of ``default`` that the backbone has; else the MLP's, linear layers, or convolutions."""
    present = words_of(anatomy)
    found = ([word for word in words if word in present] for words in (default, ("fc1", "fc2"), ("linear",)))
    return next(filter(None, found), ["conv"])


def among(block: Block, words: Iterable[str]) -> dict[str, Projection]:
    """Return the projections of a block that ``words`` name: one a word, or all of a kind."""
    wanted = set(words)
    return {key: projection for key, projection in block.projections.items() if key.partition(":")[0] in wanted}


def chosen(block: Block, words: Iterable[str]) -> dict[str, Projection]:
    """Return the projections of a block among ``words``; the gate only where there is one.

    A convolutional block may lack some.

    Raises:
        BackboneError: The block lacks one of the others.
    """
    if isinstance(block, ConvBlock):
        return among(block, words)
    wanted = [word for word in words if word != "fc1_gate" or word in block.projections]
    missing = [word for word in wanted if word not in block.projections]
    if missing:
        raise BackboneError(
            f"{block.block} of this backbone has no {', '.join(missing)}",
            given=f"targets {', '.join(wanted)}",
            allowed=", ".join(block.projections),
        )
    return {word: block.projections[word] for word in wanted}
