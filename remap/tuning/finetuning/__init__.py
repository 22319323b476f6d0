"""Category 1 of the survey, fine-tuning: choose which backbone weights train."""

from functools import partial

from remap.tuning.entry import D, H, L, MethodEntry

_SURVEY = "reference point of the survey, arXiv 2305.06061"
_VPT = "baseline of Jia et al. 2022, arXiv 2203.12119"
_row = partial(MethodEntry, category="fine-tuning")
# Parameters of one block of ViT-B/16.
_BLOCK = 4 * D * D + 2 * D * H + 9 * D + H

ROWS = [
    _row(
        name="full",
        target="remap.tuning.finetuning.full:Full",
        summary="every weight of the backbone",
        paper=_SURVEY,
        trains="all",
        vit_base=L * _BLOCK + 2 * D + (3 * 16 * 16 * D + D) + D + 197 * D,
        lr=3e-4,
        alone=True,
    ),
    _row(
        name="linear",
        target="remap.tuning.finetuning.linear:Linear",
        summary="the classifier head only",
        paper=_SURVEY,
        trains="0",
        vit_base=0,
        lr=1e-1,
        unchanged=frozenset({"attention", "tokens", "pooled"}),
        alone=True,
        of_images=True,
    ),
    _row(
        name="dual_head",
        target="remap.tuning.finetuning.dual_head:DualHead",
        summary="a second classifier head: one for labels, one for the teacher; combine it: lora+dual_head",
        paper="Kang et al. 2025, arXiv 2505.07675",
        trains="0",
        vit_base=0,
        mergeable=False,
        lr=1e-1,
        unchanged=frozenset({"attention", "tokens", "pooled"}),
        two_classifiers=True,
        of_images=True,
    ),
    _row(
        name="mlp",
        target="remap.tuning.finetuning.mlp:MLP",
        summary="hidden layers in front of the classifier head",
        paper=_VPT,
        trains="k*(D*D + 3*D), k hidden layers",
        vit_base=2 * (D * D + 3 * D),
        mergeable=False,
        unchanged=frozenset({"attention", "tokens"}),
        alone=True,
        of_images=True,
    ),
    _row(
        name="ranpac",
        target="remap.tuning.finetuning.ranpac:RanPAC",
        summary="random features in front of the classifier head",
        paper="McDonnell et al. 2023, arXiv 2307.02251",
        trains="0 (classifier: C*M, M random features)",
        vit_base=0,
        lr=1e-1,
        mergeable=False,
        unchanged=frozenset({"attention", "tokens", "pooled"}),
        of_images=True,
    ),
    _row(
        name="partial",
        target="remap.tuning.finetuning.partial:Partial",
        summary="the last blocks, or chosen ones, and the final norm",
        paper=_VPT,
        trains="k blocks + 2*D",
        vit_base=_BLOCK + 2 * D,
        lr=3e-3,
    ),
    _row(
        name="sidetune",
        target="remap.tuning.finetuning.sidetune:SideTune",
        summary="a small network beside the frozen one",
        paper="Zhang et al. 2020, arXiv 1912.13503",
        trains="S + F*D + 1, S side network, F its features",
        vit_base=2_060_329,
        mergeable=False,
        unchanged=frozenset({"attention", "tokens"}),
        alone=True,
        of_images=True,
    ),
]
