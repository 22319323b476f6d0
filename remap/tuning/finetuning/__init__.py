"""Category 1 of the survey, fine-tuning: choose which backbone weights train."""

from remap.tuning.entry import MethodEntry

_SURVEY = "reference point of the survey, arXiv 2305.06061"
_VPT = "baseline of Jia et al. 2022, arXiv 2203.12119"

ROWS = [
    MethodEntry(
        name="full",
        target="remap.tuning.finetuning.full:Full",
        category="fine-tuning",
        summary="every weight of the backbone",
        paper=_SURVEY,
        trains="all",
        vit_base=85_798_656,
        mergeable=True,
        lr=3e-4,
        alone=True,
    ),
    MethodEntry(
        name="linear",
        target="remap.tuning.finetuning.linear:Linear",
        category="fine-tuning",
        summary="the classifier head only",
        paper=_SURVEY,
        trains="0",
        vit_base=0,
        mergeable=True,
        lr=1e-1,
        unchanged=frozenset({"attention", "tokens", "pooled"}),
        alone=True,
    ),
    MethodEntry(
        name="mlp",
        target="remap.tuning.finetuning.mlp:MLP",
        category="fine-tuning",
        summary="hidden layers in front of the classifier head",
        paper=_VPT,
        trains="k*(D*D + 3*D), k hidden layers",
        vit_base=1_184_256,
        mergeable=False,
        lr=1e-2,
        unchanged=frozenset({"attention", "tokens"}),
        alone=True,
    ),
    MethodEntry(
        name="partial",
        target="remap.tuning.finetuning.partial:Partial",
        category="fine-tuning",
        summary="the last blocks, or chosen ones, and the final norm",
        paper=_VPT,
        trains="k blocks + 2*D",
        vit_base=7_089_408,
        mergeable=True,
        lr=3e-3,
    ),
    MethodEntry(
        name="sidetune",
        target="remap.tuning.finetuning.sidetune:SideTune",
        category="fine-tuning",
        summary="a small network beside the frozen one",
        paper="Zhang et al. 2020, arXiv 1912.13503",
        trains="S + F*D + 1, S side network, F its features",
        vit_base=2_060_329,
        mergeable=False,
        lr=1e-2,
        unchanged=frozenset({"attention", "tokens"}),
        alone=True,
    ),
]
