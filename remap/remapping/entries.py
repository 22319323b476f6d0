"""The rows of the tables of losses, initialisations and architectures. Imports no torch."""

from dataclasses import dataclass

from remap.registry import Entry


@dataclass(frozen=True, kw_only=True)
class RemappingEntry(Entry):
    """One way to carry something over from the teacher.

    Attributes:
        needs: What it reads, or asks of the two models, in words.
        mismatch: What becomes of other widths, depths, heads, MLPs, grids and prefix tokens, and what is refused.
    """

    needs: str
    mismatch: str = "any pair of models"


@dataclass(frozen=True, kw_only=True)
class LossEntry(RemappingEntry):
    """One loss term.

    Attributes:
        signal: The signal of the student that it changes: "logits", "pooled", "tokens" or "attention". Methods that
            leave that signal as it is cannot follow it.
        mixed: What it does with an image that is mixed of two (mixup, CutMix).
        weight: Default weight in the objective.
        of_average: Learns from the student's running average, which a recipe with it has as a teacher, and no other.
        over_batch: Compares all images of a batch with each other, across processes and micro-batches.
        multilabel: What it is where an image has any number of classes: "itself", another target, or empty where it
            makes sense for one class an image alone.
    """

    signal: str
    mixed: str = "both networks see the mixed image"
    weight: float = 1.0
    over_batch: bool = False
    of_average: bool = False
    multilabel: str = ""
