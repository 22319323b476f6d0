"""Items: what is kept of a teacher, by a name that says all about it besides the teacher.

Two terms that want the same item share it, and so do two runs with the same teacher on the same images.
"""

from torch import Tensor

from remap.remapping.signals import Signals

LOGITS = "logits"
POOLED = "pooled"


def logits_of(teacher: Signals) -> dict[str, Tensor]:
    """The teacher's answer (B, C), float32."""
    return {LOGITS: teacher.logits_BC.detach().float()}


def pooled_of(teacher: Signals) -> dict[str, Tensor]:
    """What enters the teacher's classifier (B, D), float32."""
    assert teacher.pooled_BD is not None, "the tap was not told to keep pooled features"
    return {POOLED: teacher.pooled_BD.detach().float()}


def patches_name(block: int) -> str:
    return f"patches{block}"


def prefix_name(block: int) -> str:
    return f"prefix{block}"


def prefix_of(teacher: Signals, block: int) -> dict[str, Tensor]:
    """The teacher's prefix tokens behind a block (B, P, D), float32."""
    return {prefix_name(block): teacher.tokens[block].prefix_BPD.detach().float()}
