"""SSF (Lian et al. 2022, arXiv 2210.08823): scale and shift the features behind every layer.

Letters: D channels of a layer's output.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionBlock, Block, ConvBlock, Projection, module_at
from remap.tuning.base import Attached, Method, insert_module, inserted_parameters
from remap.tuning.weights import channels_first, recompute, registered, registered_at

_NAME = "remap_ssf"


class SSF(Method):
    """y = gamma * x + beta behind the patch embedding, every norm and every linear layer of a block, and
    the norms between and behind the blocks: 205,824 parameters on ViT-B/16.

    Norms inside the attention or the MLP get none; the spatial convolutions of convolutional blocks do. gamma is 1
    and beta 0 at first, where the paper draws them around 1 and 0: tuning begins at the pretrained network.

    A layer without a bias gets no beta: plain weights would have no place for it. The key bias that BEiT and EVA-02
    fix at zero is no place either.
    """

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        handles: list[RemovableHandle] = []
        undo: list[Callable[[], None]] = []
        places = {f"{place.layer}.{_NAME}": place for place in _places(model, anatomy)}
        for path, place in places.items():
            layer = module_at(model, place.layer)
            like = registered(layer, "weight")
            shifted = tuple(rows for _, rows in place.biases)
            affine = ScaleShift(len(like), shifted).to(device=like.device, dtype=like.dtype)
            insert_module(model, path, affine)
            if not place.read_past:
                # The scale of a norm is part of the norm: what other methods do with its output comes behind it.
                hook = partial(_on_output, affine, channels_first(layer))
                handles.append(layer.register_forward_hook(hook, prepend=place.is_norm))
                continue
            undo.append(recompute(layer, "weight", affine.on_weight))
            for bias, rows in place.biases:
                owner, _, name = bias.rpartition(".")
                undo.append(recompute(module_at(model, owner), name, partial(affine.on_bias, rows)))
        names = inserted_parameters(model, places)
        return _Attached(
            model, anatomy, places, trainable=names, no_decay=names, added=places, handles=handles, undo=undo
        )


class ScaleShift(nn.Module):
    """gamma for all D channels of a layer, and beta for those in ``shifted``, ranges that ascend (None for none)."""

    def __init__(self, channels: int, shifted: tuple[slice, ...]) -> None:
        super().__init__()
        self.starts: dict[int, int] = {}
        count = 0
        for rows in shifted:
            self.starts[rows.start] = count
            count += rows.stop - rows.start
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(count)) if count else None

    def on_weight(self, weight: Tensor) -> Tensor:
        """(D, ...), row by row."""
        return weight * self.gamma.view(-1, *[1] * (weight.ndim - 1))

    def on_bias(self, rows: slice, bias: Tensor) -> Tensor:
        """The bias of the channels ``rows``, one of the ranges."""
        start = self.starts[rows.start]
        return bias * self.gamma[rows] + self.beta[start : start + rows.stop - rows.start]


@dataclass(frozen=True)
class _Place:
    """A layer; the paths of the biases of its channels, with the channels.

    ``is_norm``: of a block or behind the blocks; ``read_past``: a hook would not see all reads of the layer.
    """

    layer: str
    biases: tuple[tuple[str, slice], ...]
    is_norm: bool = False
    read_past: bool = False


class _Attached(Attached):
    fold_stage = 2

    def __init__(self, model: nn.Module, anatomy: Anatomy, places: dict[str, _Place], **facts: object) -> None:
        self.places = places
        super().__init__(model, anatomy, mergeable=True, **facts)

    def _fold(self) -> None:
        for path, place in self.places.items():
            affine = module_at(self.model, path)
            weight = registered_at(self.model, f"{place.layer}.weight")
            weight.copy_(affine.on_weight(weight))
            for name, rows in place.biases:
                bias = registered_at(self.model, name)
                bias.copy_(affine.on_bias(rows, bias))


def _places(model: nn.Module, anatomy: Anatomy) -> Iterator[_Place]:
    embedding = module_at(model, anatomy.input_module)
    convolutions = [name for name, module in embedding.named_modules() if isinstance(module, nn.Conv2d)]
    yield _whole(model, ".".join(filter(None, (anatomy.input_module, convolutions[-1]))))
    for norm in (*anatomy.embedding_norms, anatomy.final_norm):
        if norm is not None and registered_at(model, f"{norm}.weight") is not None:
            yield _whole(model, norm, is_norm=True)
    for block in anatomy.blocks:
        for path in _convolutions(block):
            yield _whole(model, path)
        for path in _norms(block):
            yield _whole(model, path, is_norm=True)
        layers: dict[str, list[Projection]] = {}
        for projection in sorted(block.projections.values(), key=lambda projection: projection.start):
            layers.setdefault(projection.path, []).append(projection)
        for path, projections in layers.items():
            own = all(p.called and p.bias in (None, f"{path}.bias") for p in projections)
            yield _whole(model, path) if own else _Place(path, tuple(_split_biases(model, projections)), read_past=True)


def _convolutions(block: Block) -> list[str]:
    return [site.conv for site in block.convs] if isinstance(block, ConvBlock) else []


def _norms(block: Block) -> list[str]:
    return [block.norm1, block.norm2] if isinstance(block, AttentionBlock) else [*block.norms]


def _whole(model: nn.Module, layer: str, *, is_norm: bool = False) -> _Place:
    """A layer that is called and adds its own bias, if any."""
    module = module_at(model, layer)
    bias = getattr(module, "bias", None)
    return _Place(layer, () if bias is None else ((f"{layer}.bias", slice(0, len(bias))),), is_norm)


def _split_biases(model: nn.Module, projections: list[Projection]) -> Iterator[tuple[str, slice]]:
    """Biases that the owner of the layer adds, each a tensor of its own. Buffers are not in plain weights."""
    for projection in projections:
        if projection.bias is not None and isinstance(registered_at(model, projection.bias), nn.Parameter):
            yield projection.bias, projection.rows


def _on_output(affine: ScaleShift, first: bool, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    gamma, beta = affine.gamma, affine.beta
    if first:
        gamma, beta = gamma[:, None, None], None if beta is None else beta[:, None, None]
    # Under autocast the sum is taken in the parameters' precision, which the output has not.
    shifted = output * gamma if beta is None else torch.addcmul(beta, output, gamma)
    return shifted.to(output.dtype)
