"""Whole blocks: which of them a network misses least, and taking them out.

Letters: B images, D pooled features, L blocks.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, anatomy_of, module_at, rest_of_forward
from remap.errors import BackboneError

Batches = Callable[[], Iterable[Tensor]]


def features(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, D): what the classifier is given, from what ``forward_features`` returns."""
    return model.forward_head(tokens, pre_logits=True)


def evenly(depth: int, count: int) -> list[int]:
    """``count`` of ``depth`` blocks at even distances, the first and the last among them; of one, the first."""
    if count == 1:
        return [0]
    return [round(index * (depth - 1) / (count - 1)) for index in range(count)]


@torch.no_grad()
def least_missed(model: nn.Module, count: int, batches: Batches) -> tuple[list[int], list[float]]:
    """Take ``count`` blocks out of ``model``, each time the one whose absence changes the pooled features least.

    The change is |f - f0|^2 / |f0|^2 over all images, f0 being the features of the whole network. One block at a time:
    a second one is chosen in the network without the first.

    Args:
        batches: Normalised images, (B, 3, S, S); asked for once for every block that goes.

    Returns:
        The blocks that stay, numbered as in the whole network, and the change after each one that went.
    """
    left = list(range(len(model.blocks)))
    whole = [features(model, model.forward_features(images)) for images in batches()]
    changes: list[float] = []
    for _ in range(count):
        change_L = sum(
            _change_without_each(model, images, whole_BD) for images, whole_BD in zip(batches(), whole, strict=True)
        )
        index = int(change_L.argmin())
        changes.append(float(change_L[index] / sum(whole_BD.double().square().sum() for whole_BD in whole)))
        take_out(model, [index])
        del left[index]
    return left, changes


def take_out(model: nn.Module, indices: Sequence[int]) -> None:
    """Remove blocks of a network that has one list of them.

    Raises:
        BackboneError: It has not, or the blocks do not stand for themselves.
    """
    require_one_list(model)
    for index in sorted(indices, reverse=True):
        del model.blocks[index]


def has_one_list(anatomy: Anatomy) -> bool:
    """Whether the blocks are one list of equal ones, whose number is an argument of timm's constructor."""
    return "sequence" in anatomy.parts


def require_one_list(model: nn.Module) -> None:
    """
    Raises:
        BackboneError: The network's blocks are not one list of equal ones.
    """
    anatomy = anatomy_of(model)
    if not has_one_list(anatomy):
        raise BackboneError(
            f"blocks of the family '{anatomy.family}' cannot be taken out",
            given=type(model).__name__,
            allowed="networks with one list of equal blocks: vit, eva, beit",
        )
    if getattr(model, "rope_mixed", False):
        raise BackboneError(
            "blocks with rotations of their own cannot be taken out",
            given=f"{type(model).__name__} with a mixed rotary embedding",
            allowed="networks whose blocks share their positions",
        )


def _change_without_each(model: nn.Module, images: Tensor, whole_BD: Tensor) -> Tensor:
    """(L,): summed squared change of the features without each of the blocks."""
    anatomy = anatomy_of(model)
    inputs: list[Tensor] = []
    handles = [
        module_at(model, block.block).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for block in anatomy.blocks
    ]
    try:
        model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    # Without block i its input is what block i + 1 is given.
    found = [features(model, rest_of_forward(model, anatomy, index + 1, x)) for index, x in enumerate(inputs)]
    return torch.stack([(one_BD - whole_BD).double().square().sum() for one_BD in found])
