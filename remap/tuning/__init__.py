"""Tuning methods of categories 1-4. This table is all there is to registering one; listing it imports no torch."""

from dataclasses import dataclass

from remap.registry import Entry, Registry

CATEGORIES = {
    "fine-tuning": "1 fine-tuning",
    "prompt": "2 prompt tuning",
    "adapter": "3 adapter tuning",
    "parameter": "4 parameter tuning",
}


@dataclass(frozen=True, kw_only=True)
class MethodEntry(Entry):
    """One tuning method.

    Attributes:
        trains: Trainable parameters, head not counted, as a formula (L depth, D width, p prompts, r bottleneck).
        mergeable: Whether the tuned model can be saved as plain timm weights.
        lr: Default learning rate (AdamW, global batch 64).
    """

    trains: str
    mergeable: bool
    lr: float


METHODS: Registry[MethodEntry] = Registry(
    "method",
    "methods",
    [
        MethodEntry(
            name="full",
            target="remap.tuning.finetuning.full:Full",
            category="fine-tuning",
            summary="every weight of the backbone",
            paper="reference point of the survey, arXiv 2305.06061",
            trains="all",
            mergeable=True,
            lr=3e-4,
        ),
        MethodEntry(
            name="linear",
            target="remap.tuning.finetuning.linear:Linear",
            category="fine-tuning",
            summary="the classifier head only",
            paper="reference point of the survey, arXiv 2305.06061",
            trains="0",
            mergeable=True,
            lr=1e-1,
        ),
        MethodEntry(
            name="vpt_shallow",
            target="remap.tuning.prompt.vpt:VPTShallow",
            category="prompt",
            summary="learned tokens in front of the first block",
            paper="Jia et al. 2022, arXiv 2203.12119",
            trains="p*D",
            mergeable=False,
            lr=5e-2,
        ),
        MethodEntry(
            name="vpt_deep",
            target="remap.tuning.prompt.vpt:VPTDeep",
            category="prompt",
            summary="learned tokens in front of every block",
            paper="Jia et al. 2022, arXiv 2203.12119",
            trains="L*p*D",
            mergeable=False,
            lr=5e-2,
        ),
        MethodEntry(
            name="adaptformer",
            target="remap.tuning.adapter.adaptformer:AdaptFormer",
            category="adapter",
            summary="a bottleneck beside every MLP",
            paper="Chen et al. 2022, arXiv 2205.13535",
            trains="L*(2*D*r + r + D)",
            mergeable=False,
            lr=1e-2,
        ),
        MethodEntry(
            name="bitfit",
            target="remap.tuning.parameter.bitfit:BitFit",
            category="parameter",
            summary="the biases",
            paper="Ben-Zaken et al. 2022, arXiv 2106.10199",
            trains="all biases",
            mergeable=True,
            lr=3e-2,
        ),
    ],
)
