"""The row of the table of methods. Imports no torch."""

from dataclasses import dataclass

from remap.registry import Entry

CATEGORIES = {
    "fine-tuning": "1 fine-tuning",
    "prompt": "2 prompt tuning",
    "adapter": "3 adapter tuning",
    "parameter": "4 parameter tuning",
    "remapping": "5 remapping tuning",
}


# The survey's kinds of prompt tuning.
VISION, LANGUAGE, BOTH = "2a vision-driven", "2b language-driven", "2c vision-language"

# Blocks, width and MLP width of ViT-B/16, for the counts in the rows.
L, D, H = 12, 768, 3072
# Width of CLIP's text tower beside ViT-B/16, and dimensions that images and texts share.
T = E = 512


@dataclass(frozen=True, kw_only=True)
class MethodEntry(Entry):
    """One tuning method.

    Attributes:
        trains: Trainable parameters, head not counted, as a formula (L depth, D width, H MLP width, p prompts,
            r bottleneck or rank).
        vit_base: The same for ViT-B/16 at 224 pixels with default options; None where it does not fit a ViT.
        mergeable: Whether the tuned model can be saved as plain timm weights (with default options).
        lr: Default learning rate for a backbone 128 wide (AdamW, global batch 64); others scale it by 128 / width.
        kind: Of the category, where the survey divides it.
        needs: What it asks of a backbone; keys of ``backbones.families.PARTS``.
        unchanged: Signals of the student it cannot change ("attention", "tokens", "pooled"): losses on them are idle.
        alone: Cannot be combined with another method (``a+b``).
        adds_tokens: Adds tokens to the sequence; one method of a combination may.
        enlarges: Enlarges the image, so that maps of the student have other places than the teacher's.
        two_classifiers: Gives losses on labels and losses on the teacher's logits a classifier each.
        of_images: Reads images or acts on their classifier, so that it fits no text tower.
        of_classes: Has tensors of each class besides the classifier, so that a run of it cannot learn more classes.
        by_texts: Answers by texts of its own, and not by the classifier.
    """

    trains: str
    vit_base: int | None
    mergeable: bool = True
    lr: float = 1e-2
    kind: str = ""
    needs: frozenset[str] = frozenset()
    unchanged: frozenset[str] = frozenset()
    alone: bool = False
    adds_tokens: bool = False
    enlarges: bool = False
    two_classifiers: bool = False
    of_images: bool = False
    of_classes: bool = False
    by_texts: bool = False

    def fits(self, parts: frozenset[str]) -> bool:
        """Return whether it can be attached to a backbone that has ``parts``."""
        return self.needs <= parts
