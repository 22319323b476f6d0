"""Category 2 of the survey, prompt tuning: learned inputs beside the image or its tokens."""

from functools import partial

from remap.tuning.entry import D, L, MethodEntry

_VPT = "Jia et al. 2022, arXiv 2203.12119"
_row = partial(MethodEntry, category="prompt", mergeable=False, lr=3e-2)

ROWS = [
    _row(
        name="vpt_shallow",
        target="remap.tuning.prompt.vpt:VPTShallow",
        summary="learned tokens in front of the first block",
        paper=_VPT,
        trains="p*D",
        vit_base=10 * D,
        lr=5e-2,
        needs=frozenset({"attention"}),
        adds_tokens=True,
    ),
    _row(
        name="vpt_deep",
        target="remap.tuning.prompt.vpt:VPTDeep",
        summary="learned tokens in front of every block",
        paper=_VPT,
        trains="L*p*D",
        vit_base=L * 10 * D,
        lr=5e-2,
        needs=frozenset({"attention"}),
        adds_tokens=True,
    ),
    _row(
        name="vpt_pad",
        target="remap.tuning.prompt.pad:VPTPad",
        summary="a learned border that enlarges the image",
        paper=_VPT,
        trains="12*b*(S + b), b border and S image side in pixels",
        vit_base=None,
        lr=1e-2,
        needs=frozenset({"convolutions"}),
    ),
    _row(
        name="vp",
        target="remap.tuning.prompt.vp:VP",
        summary="a learned border added to the image's own",
        paper="Bahng et al. 2022, arXiv 2203.17274",
        trains="12*b*(S - b), b border and S image side in pixels",
        vit_base=12 * 30 * (224 - 30),
    ),
    _row(
        name="e2vpt",
        target="remap.tuning.prompt.e2vpt:E2VPT",
        summary="prompt tokens, key-value prompts, and pruning of both",
        paper="Han et al. 2023, arXiv 2307.13770",
        trains="L*(p + n)*D, n key-value prompts",
        vit_base=L * (10 + 5) * D,
        needs=frozenset({"sequence"}),
        adds_tokens=True,
    ),
    _row(
        name="vqt",
        target="remap.tuning.prompt.vqt:VQT",
        summary="learned queries that read the frozen blocks for the classifier",
        paper="Tu et al. 2023, arXiv 2212.03220",
        trains="L*p*D (classifier: C*D*L*p more)",
        vit_base=L * D,
        needs=frozenset({"sequence"}),
        unchanged=frozenset({"attention", "tokens", "pooled"}),
        alone=True,
    ),
]
