"""SSF (Lian et al. 2022, arXiv 2210.08823): scale and shift the features behind every layer.

Letters: D channels of a layer's output.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, AttentionBlock, ConvBlock, module_at
from remap.backbones.families.stages import StageBlock
from remap.backbones.typed import standardises_weight
from remap.tuning.base import Attachment, Edits, Fold, Method
from remap.tuning.layers import by_layer
from remap.tuning.weights import channels_first, own_bias, recompute_at, registered, registered_at


class SSF(Method):
    """y = gamma * x + beta behind the layers: 205,824 parameters on ViT-B/16.

    These are the patch embedding, every norm and every linear layer of a block, and the norms between and behind the
    blocks. Norms inside the attention or the MLP get none; the spatial convolutions of convolutional blocks do. gamma
    is 1 and beta 0 at first, where the paper draws them around 1 and 0: tuning begins at the pretrained network.

    A layer without a bias gets no beta: plain weights have no tensor for it. The key bias that BEiT and EVA-02
    fix at zero is not in them either.
    """

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        edits = Edits(model)
        scaled: list[tuple[_ScaledLayer, ScaleShift]] = []
        for target in list(_scaled_layers(model, anatomy)):
            layer = module_at(model, target.path)
            like = registered(layer, "weight")
            affine = ScaleShift(len(like), tuple(rows for _, rows in target.biases))
            edits.insert(f"{target.path}.remap_ssf", affine, like)
            scaled.append((target, affine))
            if not target.read_past:
                # The scale of a norm is part of the norm: what other methods do with its output comes behind it.
                edits.after(target.path, partial(_on_output, affine, channels_first(layer)), first=target.is_norm)
                continue
            recompute_at(edits, f"{target.path}.weight", affine.on_weight)
            for bias, rows in target.biases:
                recompute_at(edits, bias, partial(affine.on_bias, rows))
        return Attachment(edits, fold=Fold(partial(_fold, model, scaled), stage=2))


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
        """Scale (D, ...), row by row."""
        return weight * self.gamma.view(-1, *[1] * (weight.ndim - 1))

    def on_bias(self, rows: slice, bias: Tensor) -> Tensor:
        """Scale and shift the bias of the channels ``rows``, one of the ranges."""
        assert self.beta is not None
        start = self.starts[rows.start]
        return bias * self.gamma[rows] + self.beta[start : start + rows.stop - rows.start]


@dataclass(frozen=True)
class _ScaledLayer:
    """A layer; the paths of the biases of its channels, with the channels.

    ``is_norm``: of a block or behind the blocks; ``read_past``: a hook would not see all reads of the layer.
    """

    path: str
    biases: tuple[tuple[str, slice], ...]
    is_norm: bool = False
    read_past: bool = False


def _fold(model: nn.Module, scaled: list[tuple[_ScaledLayer, ScaleShift]]) -> None:
    for target, affine in scaled:
        weight = registered_at(model, f"{target.path}.weight")
        weight.copy_(affine.on_weight(weight))
        for name, rows in target.biases:
            bias = registered_at(model, name)
            bias.copy_(affine.on_bias(rows, bias))


def _scaled_layers(model: nn.Module, anatomy: Anatomy) -> Iterator[_ScaledLayer]:
    embedding = module_at(model, anatomy.input_module)
    layers = [name for name, module in embedding.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    # A text tower looks its tokens up; where several modules take the image, they are layers of the first stage.
    if layers and anatomy.input_module:
        yield _called(model, ".".join(filter(None, (anatomy.input_module, layers[-1]))))
    for norm in (*anatomy.embedding_norms, anatomy.final_norm):
        if norm is not None and module_at(model, norm)._parameters.get("weight") is not None:
            yield _called(model, norm, is_norm=True)
    for block in anatomy.blocks:
        if isinstance(block, StageBlock):
            yield from _stage_layers(model, block)
            continue
        convolutions = [site.conv for site in block.convs] if isinstance(block, ConvBlock) else []
        for path in convolutions:
            yield _called(model, path)
        # Not those inside the attention or the MLP.
        for path in (block.norm1, block.norm2) if isinstance(block, AttentionBlock) else block.norms:
            yield _called(model, path, is_norm=True)
        for path, projections in by_layer(block.projections.values()).items():
            if path in convolutions:
                continue
            if all(p.called and p.bias in (None, f"{path}.bias") for p in projections):
                yield _called(model, path)
                continue
            # Biases that the owner of the layer adds, each a separate tensor. Buffers are not in plain weights.
            biases = ((p.bias, p.rows) for p in projections if p.bias is not None and own_bias(model, p) is not None)
            yield _ScaledLayer(path, tuple(biases), read_past=True)


def _stage_layers(model: nn.Module, block: StageBlock) -> Iterator[_ScaledLayer]:
    """Yield the layers of a stage. Tensors of norms are changed, because some norms end in an activation."""
    called = [*(site.conv for site in block.convs), *(p.path for p in block.projections.values() if p.called)]
    layers = [*called, *block.norms, *(p.path for p in block.projections.values())]
    for path in dict.fromkeys(layers):
        module = module_at(model, path)
        if module._parameters.get("weight") is not None:
            # Behind the layer, as elsewhere: what other methods add to its output is scaled, too. A convolution that
            # standardises its weight (StdConv2d) would undo a scale that is folded into that.
            outside = path in called and not standardises_weight(module)
            yield replace(_called(model, path), read_past=not outside)


def _called(model: nn.Module, layer: str, *, is_norm: bool = False) -> _ScaledLayer:
    """Describe a layer that is called and adds its own bias, if any."""
    module = module_at(model, layer)
    bias = getattr(module, "bias", None)
    return _ScaledLayer(layer, () if bias is None else ((f"{layer}.bias", slice(0, len(bias))),), is_norm)


def _on_output(affine: ScaleShift, first: bool, _layer: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    gamma: Tensor = affine.gamma
    beta: Tensor | None = affine.beta
    if first:
        gamma, beta = gamma[:, None, None], None if beta is None else beta[:, None, None]
    # Under autocast the sum is taken in the parameters' precision, which the output has not.
    shifted = output * gamma if beta is None else torch.addcmul(beta, output, gamma)
    return shifted.to(output.dtype)
