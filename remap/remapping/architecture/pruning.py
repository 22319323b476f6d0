"""Channels, heads and MLP units of a plain vision transformer, removed with Torch-Pruning.

Torch-Pruning (Fang et al. 2023, "DepGraph", arXiv 2301.12900) finds everything that a channel of the residual stream
or a unit of an MLP goes through, scores it and cuts it. Its groups give one index to the rows of q, k and v and run
past the end of a norm over a head, so heads and their dimensions are scored here and cut with its functions.

Letters: B images, D width and pooled features, H heads, h head width, F hidden units of an MLP.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, AttentionBlock, anatomy_of, module_at, set_fused_attention
from remap.backbones.families.base import family_of
from remap.backbones.typed import input_channels, layer_at, pooled_features
from remap.remapping.architecture.remove_blocks import Batches

Criterion = Literal["taylor", "magnitude"]
Scores = Callable[[], dict[str, Tensor]]


def prune_inside(
    model: nn.Module, heads: int, head_dim: int, hidden: int, criterion: Criterion, batches: Batches
) -> None:
    """Cut every block to ``heads`` heads of ``head_dim`` dimensions and ``hidden`` MLP units; the width stays.

    Each block keeps its own best. Removing what contributes nothing changes nothing: where heads get narrower, the
    queries take up the new scale of attention.

    Args:
        batches: Normalised images (B, 3, S, S); not read for "magnitude".
    """
    anatomy = _opened(model)
    graph, importance = _graph(model, anatomy), _importance(criterion)
    units = {
        block.block: _group(graph, module_at(model, block.fc1), range(block.mlp_hidden))
        for block in anatomy.attention_blocks
        if hidden < block.mlp_hidden
    }
    fewer_heads = (heads, head_dim) != (anatomy.heads, anatomy.head_dim)

    def scores() -> dict[str, Tensor]:
        found = {f"units {path}": importance(group) for path, group in units.items()}
        if fewer_heads:
            found |= {
                f"heads {block.block}": _head_scores(model, block, criterion) for block in anatomy.attention_blocks
            }
        return found

    found = _summed(scores, model, criterion, batches)
    for block in anatomy.attention_blocks:
        if block.block in units:
            gone = _without_best(found[f"units {block.block}"], hidden)
            _group(graph, module_at(model, block.fc1), gone).prune()
    # The graph has no view of heads: it is done with before they go.
    if fewer_heads:
        for block in anatomy.attention_blocks:
            _cut_heads(model, block, found[f"heads {block.block}"], heads, head_dim)


def prune_width(model: nn.Module, width: int, criterion: Criterion, batches: Batches) -> None:
    """Cut the residual stream to ``width`` channels, wherever it is read or written.

    That is in embeddings, tokens, norms, LayerScale and layers. The norms then see fewer channels, so the function
    changes even where those were all zero.

    Args:
        batches: As for ``prune_inside``.
    """
    anatomy = _opened(model)
    graph, importance = _graph(model, anatomy), _importance(criterion)
    writer = module_at(model, anatomy.attention_blocks[0].proj)
    everything = _group(graph, writer, range(anatomy.width))
    found = _summed(lambda: {"channels": importance(everything)}, model, criterion, batches)
    _group(graph, writer, _without_best(found["channels"], width)).prune()
    family_of(anatomy).set_width(model, width)


def _opened(model: nn.Module) -> Anatomy:
    """Return the anatomy of a model made ready: everything gets a gradient, attention is readable by the graph."""
    anatomy = anatomy_of(model.eval().requires_grad_(True))
    set_fused_attention(model, anatomy, False)
    return anatomy


def _graph(model: nn.Module, anatomy: Anatomy) -> tp.DependencyGraph:
    images_BCHW = torch.zeros(1, input_channels(model), *anatomy.image_size, device=next(model.parameters()).device)
    layers = (nn.Linear, nn.Conv2d, nn.LayerNorm)
    wrapped = {id(p) for module in model.modules() if isinstance(module, layers) for p in module.parameters()}
    # Tokens, positions and LayerScale have the channels last.
    loose = [(p, p.ndim - 1) for p in model.parameters() if id(p) not in wrapped]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(model, example_inputs=images_BCHW, unwrapped_parameters=loose)


def _group(graph: tp.DependencyGraph, layer: nn.Module, outputs: Iterable[int]) -> tp.Group:
    """Return the group of all that goes with some output features of a linear layer."""
    return graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs=list(outputs))


def _importance(criterion: Criterion) -> Callable[[tp.Group], Tensor]:
    kind = tp.importance.GroupTaylorImportance if criterion == "taylor" else tp.importance.GroupMagnitudeImportance
    return kind(group_reduction="sum", normalizer=None, bias=True)


def _summed(scores: Scores, model: nn.Module, criterion: Criterion, batches: Batches) -> dict[str, Tensor]:
    """Return the scores, for "taylor" summed over the batches."""
    total: dict[str, Tensor] = {}
    for _ in _gradients(model, batches) if criterion == "taylor" else (None,):
        for name, score in scores().items():
            total[name] = total[name] + score if name in total else score
    model.zero_grad()
    return total


def _gradients(model: nn.Module, batches: Batches) -> Iterator[None]:
    """For every batch, leave in ``.grad`` the gradient of the pooled features, summed with random signs.

    The squared first-order change of the features when weights w go is |J w|^2, and the mean of (g w)^2 over random
    signs r is just that, g = r J (Hutchinson's estimator). It needs neither labels nor a classifier. The features'
    norm would not do: the final norm holds it nearly constant.
    """
    draws = torch.Generator().manual_seed(0)
    for images_BCHW in batches():
        model.zero_grad()
        features_BD = pooled_features(model, images_BCHW)
        signs_BD = torch.randint(0, 2, features_BD.shape, generator=draws) * 2.0 - 1.0
        (features_BD * signs_BD.to(features_BD.device)).sum().backward()
        for parameter in model.parameters():
            if parameter.grad is None:  # a classifier, which is behind the features
                parameter.grad = torch.zeros_like(parameter)
        yield


def _strength(tensor: Tensor, criterion: Criterion) -> Tensor:
    """Return what Torch-Pruning sums up for a weight: |w dL/dw|, or w^2."""
    weight = tensor.detach()
    if criterion == "magnitude":
        return weight.square()
    assert tensor.grad is not None
    return (weight * tensor.grad).abs()


def _head_scores(model: nn.Module, block: AttentionBlock, criterion: Criterion) -> Tensor:
    """Score the pairs of query and key dimensions, and the value dimensions with what reads them, (2, H, h)."""
    qkv, proj = layer_at(model, block.projections["q"].path), layer_at(model, block.proj)
    rows = _strength(qkv.weight, criterion).sum(dim=1)
    if qkv.bias is not None:
        rows = rows + _strength(qkv.bias, criterion)
    q_Hh, k_Hh, v_Hh = rows.view(3, block.heads, block.head_dim)
    read_Hh = _strength(proj.weight, criterion).sum(dim=0).view(block.heads, block.head_dim)
    return torch.stack([q_Hh + k_Hh, v_Hh + read_Hh])


def _cut_heads(model: nn.Module, block: AttentionBlock, scores_2Hh: Tensor, heads: int, head_dim: int) -> None:
    qkv, proj = layer_at(model, block.projections["q"].path), layer_at(model, block.proj)
    kept = _best(scores_2Hh.sum(dim=(0, 2)), heads)
    # In every head that stays, its own best dimensions; those of queries and keys go in pairs.
    qk, v = ([head * block.head_dim + d for head in kept for d in _best(score[head], head_dim)] for score in scores_2Hh)
    size = block.heads * block.head_dim
    gone_qk, gone_v = (sorted(set(range(size)) - set(stay)) for stay in (qk, v))
    rows = [*gone_qk, *(size + index for index in gone_qk), *(2 * size + index for index in gone_v)]
    tp.prune_linear_out_channels(qkv, rows)
    tp.prune_linear_in_channels(proj, gone_v)
    if f"{block.attn}.norm" in block.norms:  # of all heads together
        tp.prune_layernorm_out_channels(module_at(model, f"{block.attn}.norm"), gone_v)
    family_of(anatomy_of(model)).set_heads(model, block, heads, head_dim)
    with torch.no_grad():  # the scale of the scores stays what it was
        factor = (head_dim / block.head_dim) ** 0.5
        qkv.weight[: heads * head_dim] *= factor
        if qkv.bias is not None:
            qkv.bias[: heads * head_dim] *= factor


def _best(score: Tensor, count: int) -> list[int]:
    return sorted(score.sort(descending=True, stable=True).indices[:count].tolist())


def _without_best(score: Tensor, count: int) -> list[int]:
    return sorted(set(range(len(score))) - set(_best(score, count)))
