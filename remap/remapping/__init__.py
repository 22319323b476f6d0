"""Category 5 of the survey, remapping tuning. The table of losses; listing it imports no torch."""

from remap.registry import Registry
from remap.remapping.entries import LossEntry
from remap.remapping.knowledge import attention, domains, features, logits

LOSSES: Registry[LossEntry] = Registry("loss", "losses", [*logits.ROWS, *attention.ROWS, *features.ROWS, *domains.ROWS])
