"""Targets: what losses read of a teacher, under the names by which they are cached.

A name says all about a target besides the teacher: two terms that want the same one share it, and so do two runs with
the same teacher on the same images.
"""

from torch import Tensor

from remap.remapping.signals import Signals

LOGITS = "logits"
POOLED = "pooled"


def logits_of(teacher: Signals) -> dict[str, Tensor]:
    """Return the teacher's logits (B, C), float32."""
    return {LOGITS: teacher.logits_BC.detach().float()}


def pooled_of(teacher: Signals) -> dict[str, Tensor]:
    """Return what enters the teacher's classifier (B, D), float32."""
    assert teacher.pooled_BD is not None, "the tap does not record pooled features"
    return {POOLED: teacher.pooled_BD.detach().float()}


def patches_name(block: int) -> str:
    """Return the name of a block's patch tokens."""
    return f"patches{block}"


def prefix_name(block: int) -> str:
    """Return the name of a block's prefix tokens."""
    return f"prefix{block}"


def prefix_of(teacher: Signals, block: int) -> dict[str, Tensor]:
    """Return the teacher's prefix tokens behind a block (B, P, D), float32."""
    return {prefix_name(block): teacher.tokens[block].prefix_BPD.detach().float()}
