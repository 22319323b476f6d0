"""Which linear layers a method changes: the projections behind its targets, by the layer that makes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from remap.backbones.anatomy import Anatomy, Block, Projection
from remap.errors import BackboneError

Target = Literal["q", "k", "v", "o", "fc1", "fc2"]


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
        """Projections whose bias is not the layer's own, with the path of the bias."""
        return [(p, p.bias) for p in self.projections if p.bias is not None and p.bias != f"{self.path}.bias"]


def by_layer(projections: Iterable[Projection]) -> dict[str, tuple[Projection, ...]]:
    """Group projections by the path of the layer that makes them, each group in the order of its rows."""
    layers: dict[str, list[Projection]] = {}
    for projection in projections:
        layers.setdefault(projection.path, []).append(projection)
    return {path: tuple(sorted(rows, key=lambda p: p.start)) for path, rows in layers.items()}


def layers_of(anatomy: Anatomy, words: Sequence[str] | None, default: Sequence[str] = ("q", "k", "v")) -> list[Layer]:
    """Return the layers behind ``words``, in the order of the blocks, each with all projections that are in it.

    Args:
        words: None for those of ``default`` that the backbone has, or fc1 and fc2 where it has none of them.

    Raises:
        BackboneError: No block has a projection of some word.
    """
    words = default_targets(anatomy, default) if words is None else words
    present = {word for block in anatomy.blocks for word in block.projections}
    for word in words:
        if word not in present:
            raise BackboneError(
                f"no block of this backbone has a layer called {word}",
                given=f"targets: {', '.join(words)}",
                allowed=", ".join(sorted(present)),
            )
    wanted = with_gates(words)
    return [
        Layer(path, tuple(word for word, p in block.projections.items() if p.path == path), rows)
        for block in anatomy.blocks
        for path, rows in by_layer(block.projections.values()).items()
        if any(block.projections[word].path == path for word in wanted if word in block.projections)
    ]


def default_targets(anatomy: Anatomy, default: Sequence[str] = ("q", "v")) -> list[str]:
    """Return the words of ``default`` that the backbone has, or the MLP's where it has none of them."""
    present = {word for block in anatomy.blocks for word in block.projections}
    return [word for word in default if word in present] or ["fc1", "fc2"]


def with_gates(words: Iterable[str]) -> list[str]:
    """Return the words of projections, each once; fc1 brings fc1_gate, which it is multiplied with."""
    return list(dict.fromkeys(part for word in words for part in ((word, "fc1_gate") if word == "fc1" else (word,))))


def chosen(block: Block, words: Iterable[str]) -> dict[str, Projection]:
    """Return the projections of a block among ``words``; the gate only where there is one.

    Raises:
        BackboneError: The block lacks one of the others.
    """
    wanted = [word for word in words if word != "fc1_gate" or word in block.projections]
    missing = [word for word in wanted if word not in block.projections]
    if missing:
        raise BackboneError(
            f"{block.block} of this backbone has no {', '.join(missing)}",
            given=f"targets {', '.join(wanted)}",
            allowed=", ".join(block.projections),
        )
    return {word: block.projections[word] for word in wanted}
