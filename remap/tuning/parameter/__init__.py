"""Category 4 of the survey, parameter tuning: biases, changes of the weights, or both."""

from functools import partial

from remap.tuning.entry import D, H, L, MethodEntry
from remap.tuning.parameter.peft_rows import ROWS as PEFT_ROWS

_row = partial(MethodEntry, category="parameter")
_of_blocks = partial(_row, needs=frozenset({"attention"}))
_of_linears = partial(_row, needs=frozenset({"linears"}))

ROWS = [
    _row(
        name="bitfit",
        target="remap.tuning.parameter.bitfit:BitFit",
        summary="the biases",
        paper="Ben-Zaken et al. 2022, arXiv 2106.10199",
        trains="all biases",
        vit_base=L * (3 * D + D + H + D + 2 * D) + 2 * D,
        lr=3e-2,
    ),
    _row(
        name="norm",
        target="remap.tuning.parameter.norm:Norm",
        summary="weights and biases of the norms",
        paper="Zhao et al. 2023, arXiv 2312.11420",
        trains="all norms",
        vit_base=L * 4 * D + 2 * D,
        lr=3e-2,
    ),
    _of_blocks(
        name="diffit",
        target="remap.tuning.parameter.diffit:DiffFit",
        summary="biases, norms, and a scale of every branch",
        paper="Xie et al. 2023, arXiv 2304.06648",
        trains="biases + norm weights + 2*L*D",
        vit_base=L * (7 * D + H) + 2 * D + (2 * L + 1) * D + 2 * L * D,
    ),
    _of_linears(
        name="lora",
        target="remap.tuning.parameter.lora:LoRA",
        summary="a low-rank change of query and value weights",
        paper="Hu et al. 2021, arXiv 2106.09685",
        trains="2*L*(2*D*r)",
        vit_base=2 * L * 2 * D * 8,
    ),
    _of_blocks(
        name="fact_tt",
        target="remap.tuning.parameter.fact:FacTTT",
        summary="one tensor train for the changes of all layers",
        paper="Jie and Deng 2023, arXiv 2212.03145",
        trains="2*D*r + 12*L*r*r",
        vit_base=2 * D * 16 + 12 * L * 16**2,
    ),
    _of_blocks(
        name="fact_tk",
        target="remap.tuning.parameter.fact:FacTTK",
        summary="one Tucker tensor for the changes of all layers",
        paper="Jie and Deng 2023, arXiv 2212.03145",
        trains="2*D*r + 12*L*r + r*r*r",
        vit_base=2 * D * 32 + 12 * L * 32 + 32**3,
    ),
    _of_linears(
        name="ssf",
        target="remap.tuning.parameter.ssf:SSF",
        summary="scale and shift after every layer",
        paper="Lian et al. 2022, arXiv 2210.08823",
        trains="2*L*(7*D + H) + 4*D",
        vit_base=2 * L * (D + 3 * D + D + D + H + D) + 4 * D,
        lr=3e-2,
    ),
    _of_blocks(
        name="compacter",
        target="remap.tuning.parameter.compacter:Compacter",
        summary="Houlsby's bottlenecks with Kronecker-factored weights",
        paper="Mahabadi et al. 2021, arXiv 2106.04647",
        trains="n^3 + 2*L*(2*(D + r) + r + D), n factors",
        vit_base=57_088,
        mergeable=False,
    ),
    _of_linears(
        name="krona",
        target="remap.tuning.parameter.krona:KronA",
        summary="a Kronecker product added to query and value weights",
        paper="Edalati et al. 2022, arXiv 2212.10650",
        trains="2*L*(a + D*D/a), a elements of the left factor",
        vit_base=2 * L * (32 * 24 + 24 * 32),
        lr=1e-1,
    ),
    _row(
        name="gps",
        target="remap.tuning.parameter.gps:GPS",
        summary="the weights with the largest gradients of every neuron, and biases",
        paper="Zhang et al. 2024, arXiv 2312.10136",
        trains="k of every neuron + biases",
        vit_base=2 * (L * (5 * D + H) + D),
    ),
    _of_linears(
        name="mlae",
        target="remap.tuning.parameter.mlae:MLAE",
        summary="LoRA as rank-1 experts, some of which are masked in training",
        paper="Wang et al. 2024, arXiv 2405.18897",
        trains="L*(4*D*r + r)",
        vit_base=L * (4 * D * 8 + 8),
    ),
    _of_linears(
        name="slad",
        target="remap.tuning.parameter.lora:SLAD",
        summary="LoRA with a core between its factors, which a teacher can share",
        paper="Bensaid et al. 2026, arXiv 2605.29726",
        trains="2*L*(2*D*r + r*r)",
        vit_base=2 * L * (2 * D * 8 + 8 * 8),
    ),
    *PEFT_ROWS,
    _of_linears(
        name="pissa",
        target="remap.tuning.parameter.pissa:PiSSA",
        summary="LoRA that starts from the largest singular values",
        paper="Meng et al. 2024, arXiv 2404.02948",
        trains="L*4*D*r",
        vit_base=294_912,
    ),
    _of_linears(
        name="olora",
        target="remap.tuning.parameter.pissa:OLoRA",
        summary="LoRA that starts from an orthonormal basis of the weight",
        paper="Büyükakyüz 2024, arXiv 2406.01775",
        trains="L*4*D*r",
        vit_base=294_912,
    ),
    _of_linears(
        name="boft",
        target="remap.tuning.parameter.boft:BOFT",
        summary="a butterfly of rotations of the input",
        paper="Liu et al. 2023, arXiv 2311.06243",
        trains="L*(m*D*b + 3*D), m factors, blocks of b",
        vit_base=101_376,
        lr=3e-2,
    ),
]
