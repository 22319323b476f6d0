"""The methods that Hugging Face peft implements, one row each; all else is common code in ``peft_bridge/``.

Letters: W (o, i) the frozen weight of a layer, r rank; L, D, H as in ``remap.tuning.entry``. Imports no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import gcd
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field

from remap.tuning.entry import MethodEntry

BRIDGE = "remap.tuning.parameter.peft_bridge"


class PeftLayer(NamedTuple):
    """A layer that peft is given: the projections it makes ("q", "k", ...), its output and input features."""

    words: tuple[str, ...]
    outputs: int
    inputs: int


class Option(NamedTuple):
    """An option of a method.

    Attributes:
        peft: What peft calls it; "" where ``PeftEntry.settings`` or the class reads it.
        kind: Its type; None is that of the option of all methods.
    """

    peft: str
    kind: Any
    field: Any


@dataclass(frozen=True, kw_only=True)
class PeftEntry(MethodEntry):
    """A change of complete linear layers, by default the fused q, k, v of every block.

    Attributes:
        config: Name of peft's class of options.
        formula: What becomes of the weight; the docstring of the class.
        options: What the method exposes besides ``targets``.
        fixed: Other values for peft.
        settings: Returns more values for peft, from the options and the layers.
        default_targets: Words that ``targets: null`` stands for.
        shared: Attributes of peft's layers that hold the same modules everywhere; kept once.
        kept: Attributes of peft's layers with frozen tensors that peft would compute anew on loading (random places,
            parts of W); they are saved with the tuned parameters, so that a file does not depend on how they are made.
        moves_bias: Whether the layer's bias is changed too.
        exempt: Names of peft's parameters that weight decay must leave alone, besides vectors.
        exact_start: Whether the output is bit-equal right after attaching.
        rank_option: The option whose size the layers limit, None where they limit none.
        rank_within: The features that limit it: those of inputs only where it counts vectors of inputs.
    """

    target: str | type = f"{BRIDGE}.base:PeftMethod"
    category: str = "parameter"
    needs: frozenset[str] = frozenset({"linears"})
    config: str
    formula: str
    options: Mapping[str, Option] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    settings: Callable[[Any, Mapping[str, PeftLayer]], Mapping[str, Any]] = lambda _options, _layers: {}
    default_targets: tuple[str, ...] = ("q", "k", "v")
    shared: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    moves_bias: bool = False
    exempt: tuple[str, ...] = ()
    exact_start: bool = True
    rank_option: str | None = "rank"
    rank_within: Literal["both", "inputs"] = "both"

    def load(self) -> Any:
        return self._method

    @cached_property
    def _method(self) -> Any:
        return super().load().of_row(self)


def _option(peft: str, default: Any, description: str, kind: Any = None, **limits: Any) -> Option:
    return Option(peft, kind or type(default), Field(default=default, description=description, **limits))


_whole = partial(_option, ge=1)


def _alpha(peft: str = "lora_alpha", divisor: str = "rank") -> Option:
    about = f"Scale is alpha / {divisor}; null is alpha = rank."
    return _option(peft, None, about, float | None, gt=0.0)


def _common_length(length: int | None, layers: Mapping[str, PeftLayer]) -> int:
    """Return ``length``, or the largest one up to 256 (peft's) that divides the features of all layers."""
    return length or gcd(256, *(size for layer in layers.values() for size in layer[1:]))


def _bank(options: Any, layers: Mapping[str, PeftLayer]) -> dict[str, int]:
    if options.top > options.vectors:
        raise ValueError(f"top {options.top} is larger than the bank of {options.vectors} vectors")
    return {"vector_length": _common_length(options.length, layers)}


def _not_zero(factor: int) -> int:
    if factor == 0:
        raise ValueError("factor must be at least 1, or -1")
    return factor


_RANK = {"rank": _whole("r", 8, "Rank of the update.")}
_LOW_RANK = {**_RANK, "alpha": _alpha()}
_SEED = "Seed of the random positions."

ROWS = [
    PeftEntry(
        name="dora",
        config="LoraConfig",
        summary="LoRA with a learned norm of every weight row",
        paper="Liu et al. 2024, arXiv 2402.09353",
        trains="L*(4*D*r + 3*D)",
        vit_base=322_560,
        formula="W' = m * (W + s B A) / ||W + s B A||, norms over the rows of W', m the norms of W at first (equation"
        " 5). The norm counts as a constant in the backward pass, as in section 4.3.",
        options=_LOW_RANK,
        fixed={"use_dora": True},
    ),
    PeftEntry(
        name="rslora",
        config="LoraConfig",
        summary="LoRA scaled by the root of its rank",
        paper="Kalajdzievski 2023, arXiv 2312.03732",
        trains="L*4*D*r",
        vit_base=294_912,
        formula="W' = W + alpha / sqrt(r) B A: the scale that keeps the change of the same size for every rank.",
        options={**_RANK, "alpha": _alpha(divisor="sqrt(rank)")},
        fixed={"use_rslora": True},
    ),
    PeftEntry(
        name="adalora",
        config="AdaLoraConfig",
        target=f"{BRIDGE}.adalora:AdaLoRA",
        summary="LoRA whose ranks are distributed among the layers in training",
        paper="Zhang et al. 2023, arXiv 2303.10512",
        trains="L*(4*D*r + r), r at first",
        vit_base=442_512,
        lr=3e-2,
        formula="W' = W + alpha / r P diag(E) Q with ranks distributed among the layers in training (section 3).",
        options={
            "rank": _whole("target_r", 8, "Mean rank per layer after shrinking."),
            "initial_rank": _whole("init_r", 12, "Rank per layer at the start."),
            "alpha": _option(
                "lora_alpha", None, "Scale is alpha / initial_rank; null is a scale of 1.", float | None, gt=0.0
            ),
            "warmup": _option("", 0.1, "Share of training before the ranks shrink.", ge=0.0, lt=1.0),
            "settle": _option("", 0.5, "Share of training after the ranks have shrunk.", ge=0.0, lt=1.0),
            "interval": _whole("deltaT", 10, "Steps between two reductions of the ranks."),
            "beta1": _option("beta1", 0.85, "Smoothing of the importance.", gt=0.0, lt=1.0),
            "beta2": _option("beta2", 0.85, "Smoothing of the uncertainty of the importance.", gt=0.0, lt=1.0),
            "orthogonality": _option("", 0.1, "Weight of the penalty on P and Q (gamma in the paper).", ge=0.0),
        },
        fixed={"total_step": 1},  # not known yet, see RankSchedule.after_step
        rank_option="initial_rank",
        exempt=("lora_E",),
    ),
    PeftEntry(
        name="gralora",
        config="GraloraConfig",
        target=f"{BRIDGE}.base:Flattened",
        summary="a grid of small low-rank changes",
        paper="Jung et al. 2025, arXiv 2505.20355",
        trains="L*4*D*r",
        vit_base=294_912,
        formula="W' = W + alpha / r times a grid of k*k blocks, each a product of rank r/k.",
        options={
            "rank": _whole("r", 8, "Rank of the update, shared out among the blocks; a multiple of their number."),
            "alpha": _whole("alpha", 16, "Scale is alpha / rank; the paper's is 2."),
            "blocks": _whole("gralora_k", 2, "Blocks k of a k x k grid; the paper takes 2 up to rank 32."),
        },
    ),
    PeftEntry(
        name="loha",
        config="LoHaConfig",
        target=f"{BRIDGE}.base:AddedDelta",
        summary="an elementwise product of two low-rank changes",
        paper="Hyeon-Woo et al. 2021, arXiv 2108.06098",
        trains="2*L*4*D*r",
        vit_base=589_824,
        lr=3e-2,
        formula="W' = W + alpha / r (A1 B1) * (A2 B2), an elementwise product: rank up to r*r.",
        options={**_RANK, "alpha": _alpha("alpha")},
    ),
    PeftEntry(
        name="lokr",
        config="LoKrConfig",
        target=f"{BRIDGE}.base:AddedDelta",
        summary="a Kronecker product with a low-rank factor",
        paper="Yeh et al. 2023, arXiv 2309.14859",
        trains="L*(c*d + (3*D/c + D/d)*r), c*d elements of the left factor",
        vit_base=21_504,
        lr=3e-2,
        formula="W' = W + alpha / r C (x) (A B), a Kronecker product. A B becomes one matrix where r is at least half"
        " of its larger side, and so is C unless ``decompose_both``.",
        options={
            **_RANK,
            "alpha": _alpha("alpha"),
            "factor": _option(
                "decompose_factor",
                -1,
                "Wanted size of C; -1 is the divisor closest to the square root.",
                Annotated[int, AfterValidator(_not_zero)],
                ge=-1,
            ),
            "decompose_both": _option("decompose_both", False, "Make C a product of two low-rank matrices too."),
        },
        rank_option=None,
    ),
    PeftEntry(
        name="miss",
        config="MissConfig",
        summary="one trained shard added to all shards of the weight",
        paper="Kang and Yin 2024, arXiv 2409.15371",
        trains="L*3*D*r",
        vit_base=221_184,
        formula="One trained matrix D (r, o): all shards of r columns of W get D^T added.",
        options={"rank": _whole("r", 8, "Rows of the trained shard.")},
        rank_within="inputs",
    ),
    PeftEntry(
        name="vera",
        config="VeraConfig",
        summary="learned scales of one random low-rank change",
        paper="Kopiczko et al. 2023, arXiv 2310.11454",
        trains="L*(3*D + r)",
        vit_base=30_720,
        lr=3e-2,
        formula="W' = W + diag(b) B diag(d) A with frozen random A and B, shared by all layers; b and d are trained."
        " A and B come from a seed and are saved with the tuned parameters.",
        options={
            "rank": _whole("r", 256, "Rank of the shared random matrices."),
            "seed": _option("projection_prng_key", 0, "Seed of the random matrices.", ge=0),
        },
        shared=("vera_A", "vera_B"),
        rank_option=None,
    ),
    PeftEntry(
        name="randlora",
        config="RandLoraConfig",
        summary="learned scales of a full-rank sum of random changes",
        paper="Albert et al. 2025, arXiv 2502.00987",
        trains="L*(D*D/r + D)",
        vit_base=230_400,
        lr=3e-3,
        formula="W' = W + alpha / r sum_j B_j diag(l_j) A diag(g_j): full rank from frozen random bases of rank r."
        " ceil(min(i, o) / r) bases a layer; l and g are trained. The bases are saved as in VeRA.",
        options={
            "rank": _whole("r", 32, "Rank of each random matrix."),
            "alpha": _whole("randlora_alpha", 640, "Scale is alpha / rank; the paper's is 20."),
            "seed": _option("projection_prng_key", 0, "Seed of the random matrices.", ge=0),
        },
        shared=("randlora_A", "randlora_B"),
    ),
    PeftEntry(
        name="oft",
        config="OFTConfig",
        target=f"{BRIDGE}.base:Flattened",
        summary="rotations of blocks of the input",
        paper="Qiu et al. 2023, arXiv 2306.07280",
        trains="L*D*(b - 1)/2, blocks of b",
        vit_base=142_848,
        formula="W' = W R^T, R block-diagonal and orthogonal: (I - Q)(I + Q)^-1 with Q skew-symmetric (Cayley)."
        " Where ``block_size`` does not divide a layer's input features, the divisor closest to it is taken.",
        options={"block_size": _option("oft_block_size", 32, "Size of the rotated blocks of inputs.", ge=2)},
        fixed={"r": 0, "use_cayley_neumann": False},
    ),
    PeftEntry(
        name="hra",
        config="HRAConfig",
        target=f"{BRIDGE}.base:HRA",
        summary="a chain of reflections of the input",
        paper="Yuan et al. 2024, arXiv 2405.17484",
        trains="L*D*r",
        vit_base=73_728,
        lr=3e-2,
        formula="W' = W H_1 ... H_r with Householder reflections H_k = I - 2 u_k u_k^T / ||u_k||^2 (equation 5)."
        " Vectors start in equal pairs, which cancel up to rounding, hence the even rank.",
        options={"rank": _option("r", 8, "Number of reflections, which start in equal pairs.", ge=2, multiple_of=2)},
        rank_within="inputs",
        exact_start=False,
    ),
    PeftEntry(
        name="road",
        config="RoadConfig",
        summary="rotations of pairs of outputs",
        paper="Liao and Monz 2024, arXiv 2409.00119",
        trains="L*3*D",
        vit_base=27_648,
        lr=3e-2,
        formula="Pairs of outputs are rotated by a learned angle and scaled, the bias with them. Neighbours form"
        " pairs, as in the paper; peft's larger groups only serve its batched inference.",
        options={
            "per_pair": _option(
                "",
                1,
                "Angles and scales: 1 per pair, 2 for each output, or 4 for each element of the 2x2 matrix.",
                Literal[1, 2, 4],
            )
        },
        fixed={"group_size": 2},
        settings=lambda options, _: {"variant": f"road_{options.per_pair}"},
        moves_bias=True,
    ),
    PeftEntry(
        name="ia3",
        config="IA3Config",
        summary="scales of queries, keys, values and hidden units",
        paper="Liu et al. 2022, arXiv 2205.05638",
        trains="L*(3*D + H)",
        vit_base=64_512,
        lr=1e-1,
        formula="Learned vectors scale the outputs of layers, and the input of fc2 (equation 1 and section 3.3). The"
        " paper scales keys, values and hidden units; a fused layer gets its queries scaled as well.",
        options={
            "targets": Option(
                "",
                None,
                Field(
                    default=None,
                    min_length=1,
                    description="Layers to scale; null is [q, k, v, fc2], or [fc2] without attention.",
                ),
            )
        },
        settings=lambda _, layers: {
            "feedforward_modules": [name for name, layer in layers.items() if "fc2" in layer.words]
        },
        default_targets=("q", "k", "v", "fc2"),
        moves_bias=True,
        exempt=("ia3_l",),
    ),
    PeftEntry(
        name="glora",
        config="GloraConfig",
        target=f"{BRIDGE}.base:GLoRA",
        summary="a low-rank matrix times and one plus the weight, and changes of the bias",
        paper="Chavan et al. 2023, arXiv 2306.07967",
        trains="L*(9*D*r + r + 2)",
        vit_base=12 * (8 * (8 * 768 + 768 + 1) + 2),
        formula="W' = W + W * A + B and b' = b + b * D + E + W C with low-rank A, B and C (i, 1), numbers D and E:"
        " one fixed choice of the paper's supernet. The bias where the layer has one of its own.",
        options={
            "rank": _whole("r", 8, "Rank of A, B and C."),
            "scale": _option("config_A_B", "lora", "Form of A and B.", Literal["lora", "vector", "constant"]),
            "bias_input": _option("config_C", "lora", "Form of C.", Literal["lora", "vector", "none"]),
            "bias": _option("config_D_E", "constant", "Form of D and E.", Literal["vector", "constant", "none"]),
        },
        moves_bias=True,
    ),
    PeftEntry(
        name="fourierft",
        config="FourierFTConfig",
        target=f"{BRIDGE}.base:AddedDelta",
        summary="few Fourier coefficients of a change of the weight",
        paper="Gao et al. 2024, arXiv 2405.03003",
        trains="L*n, n coefficients",
        vit_base=12 * 1000,
        lr=1e-1,
        formula="W' = W + scale * Re(F^-1(S)), S zero but for n trained coefficients at random positions (equations 2"
        " to 4). They start at 0, so that the student starts as its backbone; the paper draws them from N(0, 1).",
        options={
            "coefficients": _whole("n_frequency", 1000, "Trained coefficients of a layer."),
            "scale": _option("scaling", 150.0, "Factor on the change.", gt=0.0),
            "seed": _option("random_loc_seed", 0, _SEED, ge=0),
        },
        fixed={"init_weights": True},
        kept=("indices",),
    ),
    PeftEntry(
        name="waveft",
        config="WaveFTConfig",
        target=f"{BRIDGE}.base:AddedDelta",
        summary="few wavelet coefficients of a change of the weight",
        paper="Bilican et al. 2025, arXiv 2505.12532",
        trains="L*n, n coefficients",
        vit_base=12 * 2592,
        lr=3e-4,
        formula="W' = W + scale * the inverse wavelet transform of S, zero but for n trained coefficients at random"
        " positions, which start at 0.",
        options={
            "coefficients": _whole("n_frequency", 2592, "Trained coefficients of a layer."),
            "scale": _option("scaling", 25.0, "Factor on the change.", gt=0.0),
            "wavelet": _option("wavelet_family", "db1", "Wavelet, such as db1 (Haar), db2 or sym2."),
            "seed": _option("random_loc_seed", 0, _SEED, ge=0),
        },
        kept=("waveft_indices",),
    ),
    PeftEntry(
        name="vblora",
        config="VBLoRAConfig",
        summary="LoRA whose factors are mixed from one bank of vectors",
        paper="Li et al. 2024, arXiv 2405.15179",
        trains="h*b + L*4*D/b*r*h, h vectors of length b",
        vit_base=256 * 256 + 12 * 12 * 4 * 256,
        formula="W' = W + B A; every piece of length b of A and B is a softmax mix of the k likeliest of h vectors in"
        " a bank that all layers share. It does not start as the backbone.",
        options={
            "rank": _whole("r", 4, "Rank of the update."),
            "vectors": _whole("num_vectors", 256, "Vectors h of the bank."),
            "length": _option(
                "", None, "Length b of a vector; null is the largest up to 256 that fits.", int | None, ge=1
            ),
            "top": _whole("topk", 2, "Vectors k in every mix."),
        },
        settings=_bank,
        shared=("vblora_vector_bank",),
        exact_start=False,
    ),
    PeftEntry(
        name="shira",
        config="ShiraConfig",
        target=f"{BRIDGE}.base:SHiRA",
        summary="few random elements of the weight",
        paper="Bhardwaj et al. 2024, arXiv 2406.13175",
        trains="L*4*D*r",
        vit_base=294_912,
        formula="W' = W + a sparse matrix: r * (i + o) elements at random positions are trained (SHiRA-Rand).",
        options={"rank": _whole("r", 8, "As many elements as LoRA of this rank.")},
        kept=("shira_indices",),
    ),
    PeftEntry(
        name="c3a",
        config="C3AConfig",
        summary="a grid of circulant matrices added to the weight",
        paper="Chen et al. 2024, arXiv 2407.19342",
        trains="L*3*D*D/b, blocks of b",
        vit_base=12 * 3 * 768 * 768 // 256,
        lr=1e-1,
        formula="W' = W + a grid of b x b circulant matrices, each of one trained vector. They start at 0,"
        " so that the student starts as its backbone; the paper draws them at random.",
        options={
            "block_size": _option(
                "", None, "Size b of a block; null is the largest up to 256 that fits.", int | None, ge=1
            )
        },
        settings=lambda options, layers: {"block_size": _common_length(options.block_size, layers)},
        fixed={"init_weights": True},
    ),
    PeftEntry(
        name="delora",
        config="DeloraConfig",
        summary="a sum of unit rank-1 changes with one learned strength",
        paper="Bini et al. 2025, arXiv 2503.18225",
        trains="L*(4*D*r + 1)",
        vit_base=12 * (4 * 768 * 8 + 1),
        formula="W' = W + lambda / r sum_k b_k a_k^T / (|b_k| |a_k|), columns scaled by the norms of W's columns"
        "; lambda is trained.",
        options={
            **_RANK,
            # peft's 15 would change a layer 128 wide by half of its norm in the first step, whatever the rate.
            "strength": _option("delora_lambda", 1.0, "Lambda at the start: the largest norm of the change.", gt=0.0),
        },
    ),
    PeftEntry(
        name="psoft",
        config="PsoftConfig",
        summary="a rotation within the principal subspace of the weight",
        paper="Wu et al. 2025, openreview FSHrinMArK",
        trains="L*(r*(r - 1)/2 + 2*r)",
        vit_base=12 * (32 * 31 // 2 + 2 * 32),
        formula="W' = W + B (diag(b) R diag(a) - I) A with W's r largest singular triplets in B and A, an orthogonal R"
        " (Cayley) and two vectors; B and A are saved with the tuned parameters.",
        options={"rank": _whole("r", 32, "Dimensions of the subspace.")},
        settings=lambda options, _: {"psoft_alpha": options.rank},
        kept=("_psoft_A_cache", "_psoft_B_cache"),
    ),
    PeftEntry(
        name="tinylora",
        config="TinyLoraConfig",
        summary="a handful of numbers between the singular vectors of the weight",
        paper="Morris et al. 2026, arXiv 2602.04118",
        trains="L*u",
        vit_base=12 * 64,
        formula="W' = W + B (sum_k v_k P_k) A with W's r largest singular triplets in B and A, frozen random P_k (r, r)"
        " and u trained numbers v; all but v is saved unchanged with the tuned parameters.",
        options={
            "rank": _whole("r", 2, "Singular triplets of the weight."),
            "numbers": _whole("u", 64, "Trained numbers u of a group of layers."),
            "tying": _option("weight_tying", 0.0, "How far layers share their numbers; 1 is one group.", ge=0, le=1),
            "seed": _option("projection_seed", 0, "Seed of the random matrices.", ge=0),
        },
        shared=("tinylora_v",),
    ),
    PeftEntry(
        name="unilora",
        config="UniLoraConfig",
        summary="LoRA whose elements are drawn from one short trained vector",
        paper="Li et al. 2025, arXiv 2506.00799",
        trains="d",
        vit_base=256,
        lr=3e-2,
        formula="W' = W + B A; every element of all A and B is one of d trained numbers, divided by the root of how"
        " often it is used. It does not start as the backbone.",
        options={
            "rank": _whole("r", 4, "Rank of the update."),
            "numbers": _whole("theta_d_length", 256, "Trained numbers d."),
            "seed": _option("proj_seed", 0, _SEED, ge=0),
        },
        fixed={"save_indices": True},
        shared=("unilora_theta_d",),
        exact_start=False,
    ),
]
