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
    _row(
        name="l2p",
        target="remap.tuning.prompt.pools:L2P",
        summary="keys and values of a pool, those nearest to the image's frozen feature",
        paper="Wang et al. 2022, arXiv 2112.08654",
        trains="b*M*2*l*D + M*D, b blocks, M prompts of l keys and values",
        vit_base=10 * 2 * 5 * D + 10 * D,
        needs=frozenset({"sequence"}),
        alone=True,
    ),
    _row(
        name="dualprompt",
        target="remap.tuning.prompt.pools:DualPrompt",
        summary="keys and values for all sessions, then those of the session with the nearest key",
        paper="Wang et al. 2022, arXiv 2204.04799",
        trains="b*2*g*D + e*S*2*l*D + S*D, b and e blocks, g and l keys and values, S sessions",
        vit_base=2 * 2 * 5 * D + 3 * 10 * 2 * 20 * D + 10 * D,
        needs=frozenset({"sequence"}),
        alone=True,
    ),
    _row(
        name="coda_prompt",
        target="remap.tuning.prompt.coda_prompt:CODAPrompt",
        summary="keys and values of each image, a sum of components weighted by its frozen feature",
        paper="Smith et al. 2023, arXiv 2211.13218",
        trains="b*M*(l + 2)*D, b blocks, M components of l tokens",
        vit_base=5 * 100 * (8 + 2) * D,
        needs=frozenset({"sequence"}),
        alone=True,
    ),
]
