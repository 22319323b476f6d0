"""The stages of a network that is read by their outputs, and the layers in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from timm.models import group_parameters
from torch import nn

from remap.backbones.anatomy import ConvBlock, ConvSite, Projection, plain_class
from remap.backbones.families.reading import linear, norm_paths
from remap.backbones.families.watching import Layer, Seen, deepest
from remap.backbones.typed import as_timm, layer_at

# A change of low rank saves nothing on a layer that is narrower than this.
NARROWEST = 16


@dataclass(frozen=True)
class StageBlock(ConvBlock):
    """A stage of a network that is read by its outputs alone, (B, D, H, W).

    ``block`` is the module at whose output the stage ends, "" where that is unknown. ``projections`` are all its linear
    layers and convolutions, by "linear:" or "conv:" and a name; ``norms`` are in no certain order. ``parameters`` are
    the names of all that the stage has. ``heads`` and ``head_dim`` are those of its last attention, where they are
    known.
    """

    parameters: tuple[str, ...] = ()
    heads: int = 0
    head_dim: int = 0


def stage_blocks(model: nn.Module, heads: Sequence[str], seen: Seen) -> tuple[StageBlock, ...]:
    """Return a network's stages.

    Args:
        heads: Paths of its classifiers, which are in no stage.
        seen: What one pass through it showed.
    """
    stage_of = _stage_of(model, len(seen.maps))
    classifier = tuple(f"{path}." for path in heads)
    stem, norms = deepest(seen.takes_image), norm_paths(model)
    modules = dict(model.named_modules())
    projections: list[dict[str, Projection]] = [{} for _ in seen.maps]
    convs: list[list[ConvSite]] = [[] for _ in seen.maps]
    norms_of: list[list[str]] = [[] for _ in seen.maps]
    for name, stage in stage_of.items():
        path, _, tensor = name.rpartition(".")
        layer = modules[path]
        if name.startswith(classifier):
            continue
        if path in norms and path not in norms_of[stage]:
            norms_of[stage].append(path)
        if tensor != "weight" or not isinstance(layer, Layer) or path == stem:
            continue
        if _is_spatial(layer) and path in seen.called:
            convs[stage].append(ConvSite(path, seen.norm_behind.get(path)))
        projections[stage] |= matrix_of(model, path, called=path in seen.called)
    ends = _stage_ends(model, len(seen.maps))
    return tuple(
        StageBlock(
            block=ends[stage] or "",
            width=width,
            grid=(rows, columns),
            stage=stage,
            norms=tuple(norms_of[stage]),
            projections=projections[stage],
            channels_last=False,
            convs=tuple(convs[stage]),
            parameters=tuple(n for n, s in stage_of.items() if s == stage and not n.startswith(classifier)),
        )
        for stage, (width, rows, columns) in enumerate(seen.maps)
    )


def matrix_of(model: nn.Module, path: str, *, called: bool = True) -> dict[str, Projection]:
    """Return a layer's weight as one projection by "linear:" or "conv:" and a name; nothing where it is too narrow."""
    layer = layer_at(model, path)
    if min(layer.weight.flatten(1).shape) < NARROWEST:
        return {}
    word = "linear" if layer.weight.shape[2:].numel() == 1 and getattr(layer, "groups", 1) == 1 else "conv"
    return {f"{word}:{path.replace('.', '_')}": linear(model, path, called=called and _is_product(layer))}


def _is_product(layer: Layer) -> bool:
    """Return whether a layer multiplies each position with its matrix, adds its bias, and nothing else."""
    if plain_class(layer) is nn.Linear:
        return True
    return plain_class(layer) is nn.Conv2d and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == (
        (1, 1),
        (1, 1),
        (0, 0),
        1,
    )


def _is_spatial(layer: Layer) -> bool:
    """Return whether a layer is a plain convolution with a centre: 1x1 ones with its stride meet the same pixels."""
    if plain_class(layer) is not nn.Conv2d or layer.kernel_size == (1, 1):
        return False
    assert isinstance(layer, nn.Conv2d)
    middle = tuple(d * (k - 1) / 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    return layer.padding == middle and layer.padding_mode == "zeros"


def _stage_ends(model: nn.Module, count: int) -> list[str | None]:
    """Return the modules at whose outputs the stages end, as timm names them or usually does; None where neither is."""
    info = as_timm(model).feature_info
    named = [entry.get("module") for entry in info] if len(info) == count else [None] * count
    there = {path for path, _ in model.named_modules()}
    return [
        next((path for path in (name, f"stages.{stage}", f"blocks.{stage}") if path in there), None)
        for stage, name in enumerate(named)
    ]


def _stage_of(model: nn.Module, count: int) -> dict[str, int]:
    """Return which stage each parameter belongs to: timm's groups of layers up to that of the stage's last module.

    Groups behind the last stage count as a part of it. A module without parameters ends where those before it end.
    """
    names = [name for name, _ in model.named_parameters()]
    groups = {name: position for position, name in enumerate(names)}
    if (matcher := getattr(model, "group_matcher", None)) is not None:
        groups = group_parameters(model, matcher(coarse=False), reverse=True)
    reached, last = {}, -1
    for path, module in model.named_modules():
        names_of = {name: f"{path}.{name}".removeprefix(".") for name, _ in module.named_parameters()}
        # Of tensors that two modules share, one name is known.
        own = {name: groups[full] for name, full in names_of.items() if full in groups}
        reached[path] = max(own.values(), default=last)
        last = max((group for name, group in own.items() if "." not in name), default=last)
    ends = list(accumulate((reached[path] if path else -1 for path in _stage_ends(model, count)), max))
    return {name: next((stage for stage, end in enumerate(ends) if groups[name] <= end), count - 1) for name in names}
