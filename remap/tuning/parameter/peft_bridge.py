"""Methods that Hugging Face peft implements, on exactly the layers asked for. The only home of that library here.

peft's public ``get_peft_model`` wraps a twin of every target in a model that is then thrown away; what it made
of the twin becomes the change of the backbone's own layer (``twin.py``).
"""

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from peft import (
    AdaLoraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    RandLoraConfig,
    RoadConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.adalora import RankAllocator
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import Attached, Method, Options
from remap.tuning.parameter.twin import Run, Site, Twin, TwinAttached, Word, plain_run, sites_of, twins_of
from remap.tuning.weights import require_rank

ADAPTER = "default"


class Targets(Options):
    """A fused q, k, v layer is one layer, changed as a whole if any of the three is a target.

    fc1 takes the gate of a gated MLP along.
    """

    targets: tuple[Word, ...] | None = Field(
        default=None, min_length=1, description="Layers to change; null is [q, k, v], or [fc1, fc2] without attention."
    )


class LowRank(Targets):
    """Options of a scaled low-rank update."""

    rank: int = Field(default=8, ge=1, description="Rank of the update.")
    alpha: float | None = Field(default=None, gt=0.0, description="Scale is alpha / rank; null is alpha = rank.")

    @property
    def alpha_or_rank(self) -> float:
        return self.rank if self.alpha is None else self.alpha


class PeftMethod(Method):
    """What the methods share.

    Attributes:
        name: Last component of the inserted modules' names.
        default_targets: Words that ``targets: null`` stands for.
        shared: Attributes of peft's layers that hold the same frozen tensors everywhere.
        moves_bias: Whether the layer's bias is changed too.
        exempt: Names of peft's parameters that weight decay must leave alone, besides vectors.
        exact_start: Whether the output is bit-equal right after attaching.
        rank_option: The option whose size the layers limit, None where they limit none.
        rank_within: The features that limit it: those of inputs only where it counts vectors of inputs.
    """

    name: ClassVar[str]
    default_targets: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    shared: ClassVar[tuple[str, ...]] = ()
    moves_bias: ClassVar[bool] = False
    exempt: ClassVar[tuple[str, ...]] = ()
    exact_start: ClassVar[bool] = True
    rank_option: ClassVar[str | None] = "rank"
    rank_within: ClassVar[Literal["both", "inputs"]] = "both"
    run: ClassVar[Run] = staticmethod(plain_run)

    class Config(Targets):
        """Options."""

    config: Config

    @abstractmethod
    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        """peft's configuration for target modules ``names``, which are the projections ``words``."""

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        sites = sites_of(anatomy, self.config.targets, self.default_targets)
        twins = twins_of(model, sites)
        if rank := getattr(self.config, self.rank_option or "", None):
            for site, twin in zip(sites, twins, strict=True):
                shape = (twin.out_features, twin.in_features)
                require_rank(rank, min(shape) if self.rank_within == "both" else shape[1], site.path, shape)
        changes = self._wrap(twins, sites)
        return self._attached(
            model,
            anatomy,
            self.name,
            sites,
            changes,
            shared={name: getattr(changes[0], name) for name in self.shared},
            moves_bias=self.moves_bias,
            run=self.run,
            no_decay=self.exempt,
            identity_at_init=self.exact_start,
        )

    def _attached(self, *parts: object, **facts: object) -> TwinAttached:
        return TwinAttached(*parts, **facts)

    def _wrap(self, twins: list[Twin], sites: list[Site]) -> list[nn.Module]:
        """peft's layers around the twins."""
        names = [f"layer{index:04}" for index in range(len(twins))]
        holder = nn.Module()
        for name, twin in zip(names, twins, strict=True):
            holder.add_module(name, twin)
        # peft freezes what it wraps, which is the backbone's own tensors: Attached decides on those.
        before = {p: p.requires_grad for p in holder.parameters()}
        try:
            for parameter in before:
                parameter.requires_grad_(False)
            config = self.peft_config(names, [site.words for site in sites])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")  # see OFT
                get_peft_model(holder, config, adapter_name=ADAPTER)
        except ValueError as error:
            raise BackboneError(
                f"these options of {self.name.removeprefix('remap_')} do not fit the layers", given=str(error)
            ) from error
        finally:
            for parameter, required in before.items():
                parameter.requires_grad_(required)
        changes = [getattr(holder, name) for name in names]
        for site, change in zip(sites, changes, strict=True):
            if not isinstance(change, BaseTunerLayer) or not any(
                p.requires_grad and p not in before for p in change.parameters()
            ):
                raise BackboneError(f"peft did not adapt {site.path}", given=type(change).__name__)
        return changes


class DoRA(PeftMethod):
    """W' = m * (W + s B A) / ||W + s B A||, norms over the rows of W', m the norms of W at first (equation 5).

    The norm counts as a constant in the backward pass, as in section 4.3.
    """

    name = "remap_dora"

    class Config(LowRank):
        """Options."""

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return LoraConfig(r=self.config.rank, lora_alpha=self.config.alpha_or_rank, use_dora=True, target_modules=names)


class RsLoRA(PeftMethod):
    """W' = W + alpha / sqrt(r) B A: the scale that keeps the change of the same size for every rank."""

    name = "remap_rslora"

    class Config(LowRank):
        """Options."""

        alpha: float | None = Field(
            default=None, gt=0.0, description="Scale is alpha / sqrt(rank); null is alpha = rank."
        )

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return LoraConfig(
            r=self.config.rank, lora_alpha=self.config.alpha_or_rank, use_rslora=True, target_modules=names
        )


def _lycoris_run(change: nn.Module, x: Tensor, **bias: Tensor) -> Tensor:
    """peft's own forward draws a random number in training even without dropout."""
    return change.base_layer(x, **bias) + F.linear(x, change.get_delta_weight(ADAPTER))


class LoHa(PeftMethod):
    """W' = W + alpha / r (A1 B1) * (A2 B2), an elementwise product: rank up to r*r."""

    name = "remap_loha"
    run = staticmethod(_lycoris_run)

    class Config(LowRank):
        """Options."""

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return LoHaConfig(r=self.config.rank, alpha=self.config.alpha_or_rank, target_modules=names)


class LoKr(PeftMethod):
    """W' = W + alpha / r C (x) (A B), a Kronecker product.

    A B becomes one matrix where r is at least half of its larger side, and so is C unless ``decompose_both``.
    """

    name = "remap_lokr"
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

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return LoKrConfig(
            r=self.config.rank,
            alpha=self.config.alpha_or_rank,
            decompose_factor=self.config.factor,
            decompose_both=self.config.decompose_both,
            target_modules=names,
        )


def _oft_run(change: nn.Module, x: Tensor, **bias: Tensor) -> Tensor:
    """peft takes four dimensions for an image whose channels come first."""
    return change(x[None], **bias)[0] if x.ndim == 4 else change(x, **bias)


class OFT(PeftMethod):
    """W' = W R^T, R block-diagonal and orthogonal: (I - Q)(I + Q)^-1 with Q skew-symmetric (Cayley).

    Rotations act on the input. Where ``block_size`` does not divide a layer's input features, the divisor closest to
    it is taken.
    """

    name = "remap_oft"
    run = staticmethod(_oft_run)

    class Config(Targets):
        """Options."""

        block_size: int = Field(default=32, ge=2, description="Size of the rotated blocks of inputs.")

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return OFTConfig(r=0, oft_block_size=self.config.block_size, use_cayley_neumann=False, target_modules=names)


class VeRA(PeftMethod):
    """W' = W + diag(b) B diag(d) A with frozen random A and B, shared by all layers; b and d are trained.

    A and B come from a seed and are kept with the tuned parameters, so that files do not depend on the generator.
    """

    name = "remap_vera"
    rank_option = None
    shared = ("vera_A", "vera_B")

    class Config(Targets):
        """Options."""

        rank: int = Field(default=256, ge=1, description="Rank of the shared random matrices.")
        seed: int = Field(default=0, ge=0, description="Seed of the random matrices.")

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return VeraConfig(r=self.config.rank, projection_prng_key=self.config.seed, target_modules=names)


class RandLoRA(PeftMethod):
    """W' = W + alpha / r sum_j B_j diag(l_j) A diag(g_j): full rank from frozen random bases of rank r.

    ceil(min(i, o) / r) bases a layer; l and g are trained. The bases are kept as in VeRA.
    """

    name = "remap_randlora"
    shared = ("randlora_A", "randlora_B")

    class Config(Targets):
        """Options."""

        rank: int = Field(default=32, ge=1, description="Rank of each random matrix.")
        alpha: int = Field(default=640, ge=1, description="Scale is alpha / rank; the paper's is 20.")
        seed: int = Field(default=0, ge=0, description="Seed of the random matrices.")

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return RandLoraConfig(
            r=self.config.rank,
            randlora_alpha=self.config.alpha,
            projection_prng_key=self.config.seed,
            target_modules=names,
        )


class IA3(PeftMethod):
    """Learned vectors scale the outputs of layers, and the input of fc2 (equation 1 and section 3.3).

    The paper scales keys, values and the hidden units of the MLP; a fused layer gets its queries scaled as well.
    """

    name = "remap_ia3"
    default_targets = ("q", "k", "v", "fc2")
    moves_bias = True
    exempt = ("ia3_l",)

    class Config(Targets):
        """Options."""

        targets: tuple[Word, ...] | None = Field(
            default=None,
            min_length=1,
            description="Layers to scale; null is [q, k, v, fc2], or [fc2] without attention.",
        )

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        inputs = [name for name, own in zip(names, words, strict=True) if "fc2" in own]
        return IA3Config(target_modules=names, feedforward_modules=inputs)


class HRA(PeftMethod):
    """W' = W H_1 ... H_r with Householder reflections H_k = I - 2 u_k u_k^T / ||u_k||^2 (equation 5).

    Vectors start in equal pairs, which cancel up to rounding, hence the even rank.
    """

    name = "remap_hra"
    rank_within = "inputs"
    exact_start = False

    class Config(Targets):
        """Options."""

        rank: int = Field(default=8, ge=2, multiple_of=2, description="Number of reflections, equal in pairs at first.")

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return HRAConfig(r=self.config.rank, target_modules=names)


class RoAd(PeftMethod):
    """Pairs of outputs are rotated by a learned angle and scaled, the bias with them."""

    name = "remap_road"
    moves_bias = True

    class Config(Targets):
        """Options."""

        per_pair: Literal[1, 2, 4] = Field(
            default=1,
            description="Angles and scales: 1 per pair, 2 for each output, or 4 for each element of the 2x2 matrix.",
        )

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        # Neighbours form pairs, as in the paper; larger groups only serve peft's batched inference.
        return RoadConfig(variant=f"road_{self.config.per_pair}", group_size=2, target_modules=names)


class MiSS(PeftMethod):
    """One trained matrix D (r, o): all shards of r columns of W get D^T added."""

    name = "remap_miss"
    rank_within = "inputs"

    class Config(Targets):
        """Options."""

        rank: int = Field(default=8, ge=1, description="Rows of the trained shard.")

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return MissConfig(r=self.config.rank, target_modules=names)


class HiRA(PeftMethod):
    """W' = W + W * (B A), an elementwise product with the frozen weight: a change of high rank."""

    name = "remap_hira"

    class Config(Targets):
        """Options."""

        rank: int = Field(default=8, ge=1, description="Rank of the matrix that multiplies the weight.")

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return HiraConfig(r=self.config.rank, target_modules=names)


def _gralora_run(change: nn.Module, x: Tensor, **bias: Tensor) -> Tensor:
    """peft takes two or three dimensions only."""
    return change(x.flatten(1, 2), **bias).unflatten(1, x.shape[1:3]) if x.ndim == 4 else change(x, **bias)


class GraLoRA(PeftMethod):
    """W' = W + alpha / r times a grid of k*k blocks, each a product of rank r/k of its own."""

    name = "remap_gralora"
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

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        return GraloraConfig(
            r=self.config.rank, alpha=self.config.alpha, gralora_k=self.config.blocks, target_modules=names
        )


class AdaLoRA(PeftMethod):
    """W' = W + alpha / r P diag(E) Q with a rank that training deals out among the layers (section 3).

    All layers begin with ``initial_rank``; entries of E with the least importance are set to 0 until ``rank`` a layer
    are left on average, and stay 0 from then on. P and Q are pulled towards orthogonal matrices.
    """

    name = "remap_adalora"
    rank_option = "initial_rank"
    exempt = ("lora_E",)

    class Config(Targets):
        """Options."""

        rank: int = Field(default=8, ge=1, description="Mean rank per layer after shrinking.")
        initial_rank: int = Field(default=12, ge=1, description="Rank per layer at the start.")
        alpha: float | None = Field(
            default=None, gt=0.0, description="Scale is alpha / initial_rank; null is a scale of 1."
        )
        warmup: float = Field(default=0.1, ge=0.0, lt=1.0, description="Share of training before the ranks shrink.")
        settle: float = Field(default=0.5, ge=0.0, lt=1.0, description="Share of training after the ranks have shrunk.")
        interval: int = Field(default=10, ge=1, description="Steps between two reductions of the ranks.")
        beta1: float = Field(default=0.85, gt=0.0, lt=1.0, description="Smoothing of the importance.")
        beta2: float = Field(default=0.85, gt=0.0, lt=1.0, description="Smoothing of the importance's uncertainty.")
        orthogonality: float = Field(default=0.1, ge=0.0, description="Weight of the penalty on P and Q (gamma).")

        @model_validator(mode="after")
        def _shrinks(self) -> "AdaLoRA.Config":
            if self.rank >= self.initial_rank:
                raise ValueError(f"rank {self.rank} is not below initial_rank {self.initial_rank}")
            if self.warmup + self.settle >= 1.0:
                raise ValueError("warmup and settle leave no time for the ranks to shrink")
            return self

    def peft_config(self, names: list[str], words: Sequence[Sequence[str]]) -> PeftConfig:
        options = self.config
        return AdaLoraConfig(
            init_r=options.initial_rank,
            target_r=options.rank,
            lora_alpha=options.initial_rank if options.alpha is None else options.alpha,
            beta1=options.beta1,
            beta2=options.beta2,
            deltaT=options.interval,
            total_step=1,  # not known yet, see AdaLoRAAttached.after_step
            target_modules=names,
        )

    def _wrap(self, twins: list[Twin], sites: list[Site]) -> list[nn.Module]:
        changes = super()._wrap(twins, sites)
        for change in changes:
            # A constant that peft keeps as a frozen parameter.
            change._modules.pop("ranknum")
            change.__dict__["ranknum"] = {ADAPTER: float(self.config.initial_rank)}
        return changes

    def _attached(self, *parts: object, **facts: object) -> TwinAttached:
        return AdaLoRAAttached(*parts, options=self.config, allocator=self.peft_config([""], [[]]), **facts)


class AdaLoRAAttached(TwinAttached):
    """Deals out the ranks while training."""

    def __init__(self, *parts: object, options: "AdaLoRA.Config", allocator: AdaLoraConfig, **facts: object) -> None:
        super().__init__(*parts, **facts)
        self.options = options
        self.layers = nn.ModuleList(self.changes)
        self.allocator = RankAllocator(self.layers, allocator, ADAPTER)
        self.kept: dict[str, Tensor] = {}

    def after_step(self, step: int, total: int) -> None:
        settled = total - max(1, round(self.options.settle * total))
        schedule = self.allocator.peft_config
        schedule.total_step, schedule.tfinal = total, total - settled
        schedule.tinit = min(int(self.options.warmup * total), settled - 1)
        if step <= settled:
            self.allocator.update_ipt(self.layers)
        if step < settled:
            budget, due = self.allocator.budget_schedule(step)
            if due and budget < self.allocator.init_bgt:
                self.allocator.mask_to_budget(self.layers, budget)
        elif step == settled:
            pattern = self.allocator.mask_to_budget(self.layers, self.allocator.target_bgt)
            self.kept = {name: torch.tensor(kept) for name, kept in pattern.items()}
        elif self.kept:
            parameters = dict(self.layers.named_parameters())
            with torch.no_grad():
                for name, kept_r in self.kept.items():
                    parameters[name][~kept_r.to(parameters[name].device)] = 0.0

    def penalty(self) -> Tensor:
        """gamma times the mean of ||P^T P - I|| and ||Q Q^T - I|| (equation 4, with norms as in peft)."""
        distances = []
        for change in self.changes:
            for factor_rn in (change.lora_A[ADAPTER], change.lora_B[ADAPTER].T):
                with torch.autocast(factor_rn.device.type, enabled=False):
                    gram_rr = factor_rn.float() @ factor_rn.float().T
                distances.append(torch.linalg.norm(gram_rr - torch.eye(len(gram_rr), device=gram_rr.device)))
        return self.options.orthogonality * torch.stack(distances).mean()

    def memory(self) -> dict[str, Tensor]:
        own = {"ipt": self.allocator.exp_avg_ipt, "unc": self.allocator.exp_avg_unc, "kept": self.kept}
        return {f"{kind}/{name}": tensor.clone() for kind, tensors in own.items() for name, tensor in tensors.items()}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        device = next(self.layers.parameters()).device
        own: dict[str, dict[str, Tensor]] = {"ipt": {}, "unc": {}, "kept": {}}
        for key, tensor in memory.items():
            kind, _, name = key.partition("/")
            own[kind][name] = tensor.to(device, copy=True)
        self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc, self.kept = own["ipt"], own["unc"], own["kept"]
        # What update_ipt asks to know whether it has averages already; it is overwritten before it is read.
        self.allocator.ipt = dict(self.allocator.exp_avg_ipt)
