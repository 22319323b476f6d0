"""The row of the table of losses. Imports no torch."""

from dataclasses import dataclass

from remap.registry import Entry


@dataclass(frozen=True, kw_only=True)
class LossEntry(Entry):
    """One loss term.

    Attributes:
        needs: What it reads, in words.
        signal: The signal of the student that it changes: "logits", "pooled", "tokens" or "attention". Methods that
            leave that signal as it is cannot follow it.
        mismatch: What becomes of other widths, depths, heads, grids and prefix tokens.
        mixed: What it does with an image that is mixed of two (mixup, CutMix).
        weight: Default weight in the objective.
        over_batch: Compares all images of a batch with each other, whatever process and micro-batch they are in.
    """

    needs: str
    signal: str
    mismatch: str = "any pair of models"
    mixed: str = "both networks see the mixed image"
    weight: float = 1.0
    over_batch: bool = False
