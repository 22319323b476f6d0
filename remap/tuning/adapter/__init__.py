"""Category 3 of the survey, adapter tuning: small modules inside or beside the frozen blocks."""

from functools import partial

from remap.tuning.entry import D, E, L, MethodEntry

_BLOCKS = frozenset({"attention"})
_row = partial(MethodEntry, category="adapter", mergeable=False, needs=_BLOCKS)
# Parameters of a bottleneck of 8, with biases.
_BOTTLENECK = 2 * D * 8 + 8 + D

ROWS = [
    _row(
        name="houlsby",
        target="remap.tuning.adapter.sequential:Houlsby",
        summary="a bottleneck after attention and after the MLP",
        paper="Houlsby et al. 2019, arXiv 1902.00751",
        trains="2*L*(2*D*r + r + D)",
        vit_base=2 * L * _BOTTLENECK,
    ),
    _row(
        name="pfeiffer",
        target="remap.tuning.adapter.sequential:Pfeiffer",
        summary="a bottleneck after the MLP",
        paper="Pfeiffer et al. 2020, arXiv 2005.00247",
        trains="L*(2*D*r + r + D)",
        vit_base=L * _BOTTLENECK,
    ),
    _row(
        name="adapter_plus",
        target="remap.tuning.adapter.sequential:AdapterPlus",
        summary="a bottleneck with learned channel scale after every block",
        paper="Steitz and Roth 2024, arXiv 2406.06820",
        trains="L*(2*D*r + r + 2*D)",
        vit_base=L * (_BOTTLENECK + D),
    ),
    _row(
        name="adaptformer",
        target="remap.tuning.adapter.adaptformer:AdaptFormer",
        summary="a bottleneck beside every MLP",
        paper="Chen et al. 2022, arXiv 2205.13535",
        trains="L*(2*D*r + r + D)",
        vit_base=L * (2 * D * 64 + 64 + D),
    ),
    _row(
        name="ease",
        target="remap.tuning.adapter.ease:Ease",
        summary="a bottleneck beside every MLP for each session, and class means in the features of all sessions",
        paper="Zhou et al. 2024, arXiv 2403.12030",
        trains="L*(2*D*r + r + D), of one session",
        vit_base=L * (2 * D * 16 + 16 + D),
        alone=True,
        of_images=True,
    ),
    _row(
        name="convpass",
        target="remap.tuning.adapter.convpass:Convpass",
        summary="a convolutional bottleneck beside attention and MLP",
        paper="Jie and Deng 2022, arXiv 2207.07039",
        trains="2*L*(2*D*r + 9*r*r + 2*r + D)",
        vit_base=2 * L * (2 * D * 8 + 9 * 8 * 8 + 2 * 8 + D),
        of_images=True,
    ),
    _row(
        name="repadapter",
        target="remap.tuning.adapter.repadapter:RepAdapter",
        summary="a linear bottleneck in front of attention and MLP",
        paper="Luo et al. 2023, arXiv 2302.08106",
        trains="2*L*(D*r + r + D*r/g + D), g groups",
        vit_base=2 * L * (D * 8 + 8 + D * 8 // 2 + D),
        mergeable=True,
    ),
    _row(
        name="residual_adapter",
        target="remap.tuning.adapter.residual:ResidualAdapter",
        summary="a 1x1 convolution beside or after every spatial one, and its norm",
        paper="Rebuffi et al. 2018, arXiv 1803.10082",
        trains="sum over convolutions of c_in*c_out/g + norms, g groups",
        vit_base=None,
        mergeable=True,
        lr=3e-3,
        needs=frozenset({"convolutions"}),
    ),
    _row(
        name="conv_adapter",
        target="remap.tuning.adapter.conv_adapter:ConvAdapter",
        summary="a bottleneck of convolutions beside every spatial one",
        paper="Chen et al. 2022, arXiv 2208.07463",
        trains="sum over convolutions of k*k*c_in + c_in*c_out/4 + c_out, k kernel",
        vit_base=None,
        lr=3e-3,
        needs=frozenset({"convolutions"}),
    ),
    _row(
        name="lst",
        target="remap.tuning.adapter.lst:LadderSideTuning",
        summary="a narrow transformer beside the frozen one, which reads its blocks",
        paper="Sung et al. 2022, arXiv 2206.06522",
        trains="L*(12*d*d + 13*d) + (L + 1)*(D*d + d) + d*D + D, d = D/r",
        vit_base=L * (12 * 96**2 + 13 * 96) + (L + 1) * (D * 96 + 96) + 96 * D + D,
        needs=frozenset({"sequence"}),
        unchanged=frozenset({"attention", "tokens"}),
        alone=True,
        of_images=True,
    ),
    _row(
        name="clip_adapter",
        target="remap.tuning.adapter.clip_adapter:CLIPAdapter",
        summary="a bottleneck between the image tower and the words",
        paper="Gao et al. 2021, arXiv 2110.04544",
        trains="2*E*E/r, E dimensions shared with texts",
        vit_base=2 * E * E // 4,
        needs=frozenset({"words"}),
        unchanged=frozenset({"attention", "tokens"}),
        alone=True,
    ),
    _row(
        name="tip_adapter",
        target="remap.tuning.adapter.tip_adapter:TipAdapter",
        summary="features of a few images a class, which vote beside the words",
        paper="Zhang et al. 2022, arXiv 2207.09519",
        trains="C*s*E, C classes, s shots, E dimensions shared with texts",
        vit_base=None,
        needs=frozenset({"words"}),
        unchanged=frozenset({"attention", "tokens", "pooled"}),
        alone=True,
        of_classes=True,
    ),
]
