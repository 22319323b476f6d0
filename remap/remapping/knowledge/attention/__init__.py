"""Losses on attention; listing them imports no torch."""

from collections.abc import Iterable
from functools import partial

from remap.remapping.entries import LossEntry

_row = partial(LossEntry, category="attention", signal="attention", multilabel="itself")

ROWS = [
    _row(
        name="attention",
        target="remap.remapping.knowledge.attention.maps:AttentionTransfer",
        summary="KL of attention maps of chosen blocks over the shared {class, patches} tokens",
        paper="Li et al. 2024, arXiv 2411.09702",
        needs="queries and keys of both",
        mismatch="heads averaged; grids resized on rows and columns; prompts, registers and unshared class tokens cut",
    ),
    _row(
        name="attention_cls",
        target="remap.remapping.knowledge.attention.class_row:ClassRow",
        summary="KL of the class token's attention row alone (AttnDistill): the cheapest one, with the smallest cache",
        paper="Wang et al. 2022, arXiv 2210.00944",
        needs="the class token's query and all keys of both",
        mismatch="a class token on both sides; any heads (product of experts); the row resized on the grid",
        weight=0.1,
    ),
    _row(
        name="attention_scores",
        target="remap.remapping.knowledge.attention.maps:AttentionScoresMatch",
        summary="squared error of attention scores before the softmax (TinyBERT)",
        paper="Jiao et al. 2020, arXiv 1909.10351",
        needs="queries and keys of both",
        mismatch="as for attention, nothing re-normalised",
    ),
    _row(
        name="relations",
        target="remap.remapping.knowledge.attention.relations:Relations",
        summary="KL of query-query, key-key and value-value relations of relation heads (MiniLMv2, TinyMIM)",
        paper="Wang et al. 2021, arXiv 2012.15828",
        needs="queries, keys and values of both",
        mismatch="any heads and widths (re-split into relation heads); vectors resized on the grid; other tokens cut",
    ),
]

# Families whose attention did not help a plain student in Qin et al. 2026, arXiv 2605.07191: what tells a timm name
# (all words of it), the family's name, and what its models have that a plain ViT has not. The first that fits counts.
_FAILING = [
    (("dinov2", "_reg"), "DINOv2 with registers", "LayerScale and registers"),
    (("dinov2",), "DINOv2", "LayerScale"),
    (("beitv2",), "BEiT v2", "LayerScale and relative position biases"),
    (("vit_", "_clip_"), "CLIP", "a norm in front of the blocks"),
    (("clip",), "CLIP", "what its model adds to a plain ViT"),
]
_TRANSFERS = {"attention_copy", *(row.name for row in ROWS)}


def transfer_warning(teacher: str, student: str, losses: Iterable[str]) -> str | None:
    """Return why attention may not carry over from this teacher to this student, or None.

    Args:
        teacher: timm name.
        student: timm name; a student of the teacher's own family has what the attention needs.
        losses: Names of the losses, and of the methods, in use.
    """
    used = [name for name in losses if name in _TRANSFERS]
    family = _failing_family(teacher)
    if not used or family is None or (_failing_family(student) or ("",))[0] == family[0]:
        return None
    return (
        f"{', '.join(used)}: attention of {family[0]} teachers ({teacher}) has been found to carry over badly: "
        "students trained from random weights came out up to 5.1 points below students without it (Qin et al. 2026, "
        f"arXiv 2605.07191). It helped those that had the teacher's own parts, here {family[1]}. Take a "
        "student of that family, another teacher, or losses on logits and features"
    )


def _failing_family(model: str) -> tuple[str, str] | None:
    lowered = model.lower()
    fitting = (family for words, *family in _FAILING if all(word in lowered for word in words))
    found = next(fitting, None)
    return None if found is None else (found[0], found[1])
