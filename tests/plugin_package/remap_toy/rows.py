"""The rows. Listings read them, so this module imports no torch; the classes are imported when a run needs them."""

from remap.data import SourceEntry
from remap.remapping import LossEntry
from remap.tuning import MethodEntry

METHODS = [
    MethodEntry(
        name="toy_final_norm",
        target="remap_toy.method:FinalNorm",
        category="parameter",
        summary="weight and bias of the norm behind the last block",
        paper="-",
        trains="2*D",
        vit_base=1_536,
        mergeable=True,
        lr=3e-2,
    )
]
LOSS = LossEntry(
    name="toy_logits",
    target="remap_toy.loss:SquaredLogits",
    category="logits",
    summary="squared difference of logits",
    paper="Ba and Caruana 2014, arXiv 1312.6184",
    needs="logits of both",
    signal="logits",
    weight=0.5,
)
SOURCE = SourceEntry(
    name="toy", target="remap_toy.source:Colours", summary="red, green and blue noise: 12 images and 9 to evaluate on"
)
