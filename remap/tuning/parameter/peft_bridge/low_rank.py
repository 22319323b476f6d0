"""LoRA's relatives of peft: the weight plus a product of trained factors, or times one."""

from peft import (
    GraloraConfig,
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    RandLoraConfig,
    VeraConfig,
)
from peft.tuners.lycoris_utils import LycorisLayer
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from remap.tuning.parameter.peft_bridge.base import ADAPTER, LowRank, PeftMethod, PeftOptions, Targets
from remap.tuning.parameter.peft_layer import base_of


class DoRA(PeftMethod):
    """W' = m * (W + s B A) / ||W + s B A||, norms over the rows of W', m the norms of W at first (equation 5).

    The norm counts as a constant in the backward pass, as in section 4.3.
    """

    name = "remap_dora"
    peft = PeftOptions(LoraConfig, {"r": "rank", "lora_alpha": "alpha_or_rank"}, {"use_dora": True})

    Config = LowRank


class RsLoRA(PeftMethod):
    """W' = W + alpha / sqrt(r) B A: the scale that keeps the change of the same size for every rank."""

    name = "remap_rslora"
    peft = PeftOptions(LoraConfig, {"r": "rank", "lora_alpha": "alpha_or_rank"}, {"use_rslora": True})

    class Config(LowRank):
        """Options."""

        alpha: float | None = Field(
            default=None, gt=0.0, description="Scale is alpha / sqrt(rank); null is alpha = rank."
        )


def _lycoris_run(change: nn.Module, x: Tensor, **bias: Tensor) -> Tensor:
    """Add the change to the layer's output; peft's forward draws random numbers in training even without dropout."""
    assert isinstance(change, LycorisLayer)
    return base_of(change)(x, **bias) + F.linear(x, change.get_delta_weight(ADAPTER))


class LoHa(PeftMethod):
    """W' = W + alpha / r (A1 B1) * (A2 B2), an elementwise product: rank up to r*r."""

    name = "remap_loha"
    peft = PeftOptions(LoHaConfig, {"r": "rank", "alpha": "alpha_or_rank"})
    run = staticmethod(_lycoris_run)

    Config = LowRank


class LoKr(PeftMethod):
    """W' = W + alpha / r C (x) (A B), a Kronecker product.

    A B becomes one matrix where r is at least half of its larger side, and so is C unless ``decompose_both``.
    """

    name = "remap_lokr"
    peft = PeftOptions(
        LoKrConfig, {**LoHa.peft.taken, "decompose_factor": "factor", "decompose_both": "decompose_both"}
    )
    rank_option = None
    run = staticmethod(_lycoris_run)

    class Config(LowRank):
        """Options."""

        factor: int = Field(
            default=-1, ge=-1, description="Wanted size of C; -1 is the divisor closest to the square root."
        )
        decompose_both: bool = Field(default=False, description="Make C a product of two low-rank matrices too.")

        @field_validator("factor")
        @classmethod
        def _not_zero(cls, factor: int) -> int:
            if factor == 0:
                raise ValueError("factor must be at least 1, or -1")
            return factor


class VeRA(PeftMethod):
    """W' = W + diag(b) B diag(d) A with frozen random A and B, shared by all layers; b and d are trained.

    A and B come from a seed and are kept with the tuned parameters, so that files do not depend on the generator.
    """

    name = "remap_vera"
    peft = PeftOptions(VeraConfig, {"r": "rank", "projection_prng_key": "seed"})
    rank_option = None
    shared = ("vera_A", "vera_B")

    class Config(Targets):
        """Options."""

        rank: int = Field(default=256, ge=1, description="Rank of the shared random matrices.")
        seed: int = Field(default=0, ge=0, description="Seed of the random matrices.")


class RandLoRA(PeftMethod):
    """W' = W + alpha / r sum_j B_j diag(l_j) A diag(g_j): full rank from frozen random bases of rank r.

    ceil(min(i, o) / r) bases a layer; l and g are trained. The bases are kept as in VeRA.
    """

    name = "remap_randlora"
    peft = PeftOptions(RandLoraConfig, {"r": "rank", "randlora_alpha": "alpha", "projection_prng_key": "seed"})
    shared = ("randlora_A", "randlora_B")

    class Config(Targets):
        """Options."""

        rank: int = Field(default=32, ge=1, description="Rank of each random matrix.")
        alpha: int = Field(default=640, ge=1, description="Scale is alpha / rank; the paper's is 20.")
        seed: int = Field(default=0, ge=0, description="Seed of the random matrices.")


class MiSS(PeftMethod):
    """One trained matrix D (r, o): all shards of r columns of W get D^T added."""

    name = "remap_miss"
    peft = PeftOptions(MissConfig, {"r": "rank"})
    rank_within = "inputs"

    class Config(Targets):
        """Options."""

        rank: int = Field(default=8, ge=1, description="Rows of the trained shard.")


class HiRA(PeftMethod):
    """W' = W + W * (B A), an elementwise product with the frozen weight: a change of high rank."""

    name = "remap_hira"
    peft = PeftOptions(HiraConfig, {"r": "rank"})

    class Config(Targets):
        """Options."""

        rank: int = Field(default=8, ge=1, description="Rank of the matrix that multiplies the weight.")


def _gralora_run(change: nn.Module, x: Tensor, **bias: Tensor) -> Tensor:
    """Flatten images: peft takes two or three dimensions only."""
    return change(x.flatten(1, 2), **bias).unflatten(1, x.shape[1:3]) if x.ndim == 4 else change(x, **bias)


class GraLoRA(PeftMethod):
    """W' = W + alpha / r times a grid of k*k blocks, each a product of rank r/k."""

    name = "remap_gralora"
    peft = PeftOptions(GraloraConfig, {"r": "rank", "alpha": "alpha", "gralora_k": "blocks"})
    run = staticmethod(_gralora_run)

    class Config(Targets):
        """Options."""

        rank: int = Field(default=8, ge=1, description="Rank of the update, shared out among the blocks.")
        alpha: int = Field(default=16, ge=1, description="Scale is alpha / rank; the paper's is 2.")
        blocks: int = Field(default=2, ge=1, description="Blocks k of a k x k grid; the paper takes 2 up to rank 32.")

        @model_validator(mode="after")
        def _divides(self) -> "GraLoRA.Config":
            if self.rank % self.blocks:
                raise ValueError(f"rank {self.rank} is not a multiple of blocks {self.blocks}")
            return self
