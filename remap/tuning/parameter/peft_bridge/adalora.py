"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): low ranks that are distributed among the layers in training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.adalora import RankAllocator
from pydantic import model_validator
from torch import Tensor, nn

from remap.tuning.base import TrainingHooks
from remap.tuning.layers import Layer
from remap.tuning.parameter.peft_bridge.base import ADAPTER, PeftMethod, Targets
from remap.tuning.parameter.peft_rows import PeftLayer


class AdaLoRA(PeftMethod):
    """All layers begin with ``initial_rank``; at the end they have ``rank`` each on average.

    Entries of E with the least importance are set to 0 and stay 0 from then on. P and Q are pulled towards orthogonal
    matrices.
    """

    class Config(Targets):
        @model_validator(mode="after")
        def _shrinks(self: Any) -> Any:
            if self.rank >= self.initial_rank:
                raise ValueError(f"rank {self.rank} is not below initial_rank {self.initial_rank}")
            if self.warmup + self.settle >= 1.0:
                raise ValueError("warmup and settle leave no time for the ranks to shrink")
            return self

    def _wrap(self, linears: Sequence[nn.Linear], layers: Sequence[Layer]) -> list[nn.Module]:
        changes = super()._wrap(linears, layers)
        for change in changes:
            # A constant that peft keeps as a frozen parameter.
            change._modules.pop("ranknum")
            change.__dict__["ranknum"] = {ADAPTER: float(self.config.initial_rank)}
        return changes

    def training_hooks(self, changes: list[nn.Module]) -> TrainingHooks:
        return RankSchedule(changes, self.config, self.peft_config({"": PeftLayer((), 0, 0)}))


class RankSchedule(TrainingHooks):
    """Deals out the ranks while training."""

    def __init__(self, changes: list[nn.Module], options: Any, allocator: PeftConfig) -> None:
        self.options, self.changes = options, changes
        self.layers = nn.ModuleList(changes)
        self.allocator = RankAllocator(self.layers, allocator, ADAPTER)
        # Which entries of E stay, once the ranks are dealt out.
        self.kept: dict[str, Tensor] = {}

    def after_step(self, step: int, total: int) -> None:
        settled = total - max(1, round(self.options.settle * total))
        schedule = self.allocator.peft_config
        schedule.total_step, schedule.tfinal = total, total - settled
        schedule.tinit = min(int(self.options.warmup * total), settled - 1)
        if step <= settled and all(parameter.grad is not None for parameter in self.layers.parameters()):
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
        """Return gamma times the mean of ||P^T P - I|| and ||Q Q^T - I|| (equation 4, with norms as in peft)."""
        distances = []
        for change in self.changes:
            p_or, q_ri = (change.get_parameter(f"{name}.{ADAPTER}") for name in ("lora_B", "lora_A"))
            for factor_rn in (q_ri, p_or.T):
                with torch.autocast(factor_rn.device.type, enabled=False):
                    gram_rr = factor_rn.float() @ factor_rn.float().T
                distances.append(torch.linalg.norm(gram_rr - torch.eye(len(gram_rr), device=gram_rr.device)))
        return self.options.orthogonality * torch.stack(distances).mean()

    def memory(self) -> dict[str, Tensor]:
        kinds = {"ipt": self.allocator.exp_avg_ipt, "unc": self.allocator.exp_avg_unc, "kept": self.kept}
        return {f"{kind}/{name}": tensor.clone() for kind, tensors in kinds.items() for name, tensor in tensors.items()}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        device = next(self.layers.parameters()).device
        kinds: dict[str, dict[str, Tensor]] = {"ipt": {}, "unc": {}, "kept": {}}
        for key, tensor in memory.items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = tensor.to(device, copy=True)
        self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc, self.kept = kinds["ipt"], kinds["unc"], kinds["kept"]
        # What update_ipt asks to know whether it has averages already; it is overwritten before it is read.
        self.allocator.ipt = dict(self.allocator.exp_avg_ipt)
