"""Parameter groups, AdamW and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from remap.distributed.sharding import gather_full
from remap.network import Network
from remap.recipe.schema import TrainSpec


def adamw(
    network: Network, extra: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over what is trained: frozen parameters hold no gradient and no optimiser state.

    No weight decay on biases, norms, scales and whatever the method exempts (prompts, gates).

    Args:
        extra: Parameters of the objective (projectors), by name.
    """
    exempt = set(network.attached.no_decay)
    decayed, plain = [], []
    for name, parameter in [*network.trained.items(), *extra]:
        (plain if name in exempt or parameter.ndim <= 1 else decayed).append(parameter)
    groups = [
        {"params": alike, "weight_decay": decay}
        for chosen, decay in ((decayed, weight_decay), (plain, 0.0))
        for alike in _by_kind(chosen)
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def _by_kind(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Sharded ones apart from the others: one operation cannot take both."""
    parameters = list(parameters)
    kinds = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]


def learning_rate(spec: TrainSpec, peak: float, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up from peak/warm-up steps, then a cosine to ``min_lr``; ``step`` counts updates from 0."""
    epochs = spec.epochs / 10 if spec.warmup_epochs is None else spec.warmup_epochs
    warmup = round(epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    total = spec.epochs * steps_per_epoch
    progress = (step - warmup) / max(1, total - warmup)
    return spec.min_lr + (peak - spec.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale all gradients so that their joint norm is at most ``limit`` (None: no limit); gives the norm before."""
    kinds = _by_kind(p for p in parameters if p.grad is not None)
    norms = [gather_full(torch.nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, float("inf") if limit is None else limit, norm)
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
