"""Parameter groups, the optimiser and the learning-rate schedule."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from remap.distributed.sharding import gather_full
from remap.network import Network
from remap.recipe.schema import TrainSpec


def make_optimizer(
    network: Network, extra: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float, name: str = "adamw"
) -> torch.optim.Optimizer:
    """Return the optimiser over what is trained: frozen parameters hold no gradient and no optimiser state.

    No weight decay on biases, norms, scales and what the method exempts (prompts, gates).

    Args:
        extra: Parameters of the objective (projectors), by name.
        name: One of ``train.optimizer``.
    """
    exempt = set(network.attached.no_decay)
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for path, parameter in [*network.trained.items(), *extra]:
        (undecayed if path in exempt or parameter.ndim <= 1 else decayed).append(parameter)
    groups = [
        {"params": kind, "weight_decay": decay}
        for chosen, decay in ((decayed, weight_decay), (undecayed, 0.0))
        for kind in _by_kind(chosen)
    ]
    if name != "adamw":
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, momentum=0.9)
    # Fused: one kernel for all small tensors, which are most of what these methods train.
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def state_after_a_step(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Return what the optimiser stores of each parameter, by the parameter's id: names, shapes and types.

    Found out by a step of zeros on the CPU; parameters of one shape in one group have the same.
    """
    # Shallow, and with other groups and state below: no real parameter or moment is touched.
    probe, stand_of, groups = copy.copy(optimizer), dict[int, nn.Parameter](), []
    for group in optimizer.param_groups:
        stands: dict[tuple[torch.Size, torch.dtype], nn.Parameter] = {}
        for parameter in group["params"]:
            kind = (parameter.shape, parameter.dtype)
            if kind not in stands:
                # The shape of a sharded parameter is the full one, as in a file.
                stands[kind] = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
                stands[kind].grad = torch.zeros_like(stands[kind])
            stand_of[id(parameter)] = stands[kind]
        groups.append({**group, "params": list(stands.values())})
    probe.state, probe.param_groups = defaultdict(dict), groups
    probe.step()
    return {key: dict(probe.state[stand]) for key, stand in stand_of.items()}


def _by_kind(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Separate sharded parameters from the others: one fused operation cannot take both."""
    parameters = list(parameters)
    kinds = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]


def learning_rate(spec: TrainSpec, peak: float, step: int, steps_per_epoch: int) -> float:
    """Return the rate of an update: linear warm-up to ``peak``, then a cosine to ``spec.min_lr``.

    The cosine is that of Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts.

    Args:
        step: Number of the update over the whole run, from 0.
    """
    epochs = spec.epochs / 10 if spec.warmup_epochs is None else spec.warmup_epochs
    warmup = round(epochs * steps_per_epoch)
    # (step + 1): the first update would otherwise have a rate of 0.
    if step < warmup:
        return peak * (step + 1) / warmup
    total = spec.epochs * steps_per_epoch
    progress = (step - warmup) / max(1, total - warmup)
    return spec.min_lr + (peak - spec.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale all gradients so that their joint norm is at most ``limit`` (None: no limit); return the norm before."""
    kinds = _by_kind(p for p in parameters if p.grad is not None)
    gradients = [[p.grad for p in kind if p.grad is not None] for kind in kinds]
    # Of shards each process has a part of the norm, and all need the complete one.
    norms = [gather_full(torch.nn.utils.get_total_norm(kind)) for kind in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    # Without a limit the factor is 1, and the same operations run.
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, float("inf") if limit is None else limit, norm)
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
