"""Remove whole blocks of a network: which ones it misses least, and taking them out.

Letters: B images, D pooled features, L blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of, module_at, rest_of_forward
from remap.backbones.families.base import family_of
from remap.backbones.typed import as_timm, inputs_of, pool, pooled_features

Batches = Callable[[], Iterable[Tensor]]


def evenly(depth: int, count: int) -> list[int]:
    """Return ``count`` of ``depth`` blocks at even distances, with the first and the last; of one, the first."""
    if count == 1:
        return [0]
    return [round(index * (depth - 1) / (count - 1)) for index in range(count)]


@torch.no_grad()
def least_missed(model: nn.Module, count: int, batches: Batches) -> tuple[list[int], list[float]]:
    """Take ``count`` blocks out of ``model``, each time the one whose absence changes the pooled features least.

    The change is |f - f0|^2 / |f0|^2 over all images, f0 being the features of the unchanged network. One block at a
    time: a second one is chosen in the network without the first.

    Args:
        batches: Normalised images, (B, 3, S, S); called once for every block that goes.

    Returns:
        The blocks that stay, numbered as in the unchanged network, and the change after each one that went.
    """
    left = list(range(anatomy_of(model).depth))
    before = [pooled_features(model, images) for images in batches()]
    changes: list[float] = []
    for _ in range(count):
        pairs = zip(batches(), before, strict=True)
        change_L = reduce(torch.add, (_change_without_each(model, images, f0_BD) for images, f0_BD in pairs))
        index = int(change_L.argmin())
        changes.append(float(change_L[index] / sum(f0_BD.double().square().sum() for f0_BD in before)))
        take_out(model, [index])
        del left[index]
    return left, changes


def take_out(model: nn.Module, indices: Sequence[int]) -> None:
    """Remove blocks of a network that has one list of them; with no indices only check that.

    Raises:
        BackboneError: It has not, or its blocks depend on their number.
    """
    family_of(anatomy_of(model)).remove_blocks(model, indices)


def _change_without_each(model: nn.Module, images: Tensor, f0_BD: Tensor) -> Tensor:
    """Return the summed squared change of the features without each of the blocks, (L,)."""
    anatomy = anatomy_of(model)
    with inputs_of(*(module_at(model, block.block) for block in anatomy.blocks)) as inputs:
        as_timm(model).forward_features(images)
    # Without block i its input is what block i + 1 is given.
    found = [pool(model, rest_of_forward(model, anatomy, index + 1, x)) for index, x in enumerate(inputs)]
    return torch.stack([(one_BD - f0_BD).double().square().sum() for one_BD in found])
