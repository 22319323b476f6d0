"""Any other network of timm, read through timm's own interface and by watching one forward pass.

Letters: B batch, D channels of a stage, h and w its rows and columns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.func import functional_call

from remap.backbones.anatomy import Anatomy, ConvSite, Projection, StageBlock, plain_class
from remap.backbones.families.base import Family
from remap.backbones.families.reading import configured_image_size, linear, norm_paths
from remap.backbones.typed import as_timm
from remap.errors import BackboneError

# A change of low rank saves nothing on a layer that is narrower than this.
NARROWEST = 16
Layer = nn.Linear | nn.Conv2d


class Generic(Family[nn.Module]):
    """Any network with timm's ``forward_intermediates``; its blocks are the stages whose outputs that returns.

    What cannot be read from timm's interface is measured: one image of the meta device goes through, which computes
    nothing. Layers whose call is not seen there, and all that are more than a product with a matrix, count as not
    called: methods then change their weights, which works however a network reads them.
    """

    name = "generic"
    reenters = False

    def matches(self, model: nn.Module) -> bool:
        return all(callable(getattr(model, name, None)) for name in ("forward_intermediates", "get_classifier"))

    def read(self, model: nn.Module) -> Anatomy:
        image = configured_image_size(model)
        heads, averaged = _classifiers(model)
        seen = _watched(model, heads, image)
        blocks = _blocks(model, heads, seen)
        return Anatomy(
            family=self.name,
            width=(seen.features[0] if averaged else sum(seen.features)) or as_timm(model).num_features,
            depth=len(blocks),
            image_size=image,
            patch_size=(round(image[0] / blocks[0].grid[0]), round(image[1] / blocks[0].grid[1])),
            grid=blocks[-1].grid,
            input_module=_deepest(seen.takes_image),
            embedding_norms=(),
            final_norm=None,
            classifier_heads=tuple(heads),
            averaged_heads=averaged,
            blocks=blocks,
        )

    def size_arguments(self, model: nn.Module, anatomy: Anatomy, image_size: int) -> dict[str, Any]:
        # Some architectures are built for a size, some take any, and a few accept the argument and ignore it.
        architecture, problem = as_timm(model).pretrained_cfg["architecture"], ""
        for arguments in ({"img_size": image_size}, {}):
            try:
                with torch.device("meta"):
                    other = timm.create_model(architecture, pretrained=False, **arguments)
                self.require_size(other, anatomy, (image_size, image_size))
            except (TypeError, BackboneError) as error:
                problem = problem or ("" if isinstance(error, TypeError) else str(error.given or error.what))
                continue
            return arguments
        raise _unfit_size(architecture, (image_size, image_size), problem)

    def require_size(self, model: nn.Module, anatomy: Anatomy, size: tuple[int, int]) -> None:
        _watched(model, _classifiers(model)[0], size)

    def rest_of_forward(self, model: nn.Module, index: int, x: Tensor) -> Tensor:
        raise NotImplementedError("see reenters")

    def stage_outputs(self, model: nn.Module, images_BCHW: Tensor, stages: Sequence[int]) -> tuple[Any, list[Tensor]]:
        interface: Any = model
        return interface.forward_intermediates(images_BCHW, indices=list(stages), output_fmt="NCHW")

    def _no_sequence(self, what: str, do: str) -> BackboneError:
        return BackboneError(
            f"a backbone of the family '{self.name}' cannot {what}: it has no attention over the whole image, or none "
            "that is known exactly",
            allowed="families with one sequence of tokens: plain, rotary and relative-position vision transformers",
            do=do,
        )


@dataclass
class _Seen:
    """What one pass showed.

    ``maps``: (D, h, w) of every stage; ``features``: width of what each classifier takes; ``called``: layers whose
    forward ran; ``norm_behind``: the norm that takes a convolution's output, by the convolution.
    """

    maps: list[tuple[int, int, int]] = field(default_factory=list)
    features: list[int] = field(default_factory=list)
    takes_image: list[str] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    norm_behind: dict[str, str] = field(default_factory=dict)


class _WholePass(nn.Module):
    """All of a network in one forward: logits, and the maps of its stages."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        model: Any = self.model
        features, maps = model.forward_intermediates(images_BCHW, output_fmt="NCHW")
        return [model.forward_head(features), *maps]


@torch.enable_grad()
def _watched(model: nn.Module, heads: Sequence[str], size: tuple[int, int]) -> _Seen:
    """Send one image through a network and return what was seen, without computing anything where that is possible.

    Raises:
        BackboneError: It takes no images of this size.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    tensors = {f"model.{name}": t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for device in ("meta", like.device):
            # A graph leads from the image to all that it gets to in other ways than through a module that takes it.
            images = torch.zeros(1, _channels(model), *size, dtype=like.dtype, device=device, requires_grad=True) + 0
            moved = {name: t.to(device) for name, t in tensors.items()}
            try:
                with _watching(model, heads, images) as seen:
                    outputs = functional_call(_WholePass(model), moved, (images,))
                break
            except Exception:  # few networks read values of tensors, or hold some that are not parameters
                if like.device == device:
                    raise
    except Exception as error:  # networks of timm refuse a size in many ways
        raise _unfit_size(type(model).__name__, size, " ".join(str(error).split())[:200]) from error
    finally:
        for module, mode in modes:
            module.training = mode
    logits, *maps = outputs
    seen.maps = [tuple(output.shape[1:]) for output in maps]
    if logits.requires_grad:
        seen.takes_image = []
    return seen


@contextmanager
def _watching(model: nn.Module, heads: Sequence[str], images: Tensor) -> Iterator[_Seen]:
    """Record while the block runs the network on these very images."""
    seen, norms, cut = _Seen(), norm_paths(model), images.detach()
    outputs: dict[int, tuple[str, Tensor]] = {}  # by identity; held, so that no other tensor can have it
    features: dict[str, int] = {}

    def before(path: str, args: tuple) -> tuple:
        if args and (args[0] is images or args[0] is cut):
            seen.takes_image.append(path)
            args = (cut, *args[1:])
        if path in norms and args and id(args[0]) in outputs:
            seen.norm_behind.setdefault(outputs[id(args[0])][0], path)
        if path in heads:
            features[path] = args[0].shape[1] if args[0].shape[2:].numel() == 1 else 0
        return args

    def after(path: str, module: nn.Module, output: Tensor) -> None:
        if isinstance(module, Layer):
            seen.called.add(path)
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = (path, output)

    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(lambda _m, args, path=path: before(path, args)))
            handles.append(module.register_forward_hook(lambda m, _args, out, path=path: after(path, m, out)))
    try:
        yield seen
        seen.features = [features[path] for path in heads]
    finally:
        for handle in handles:
            handle.remove()


def _classifiers(model: nn.Module) -> tuple[list[str], bool]:
    """Return the paths of the classifiers, and whether the logits are their mean over features of one width.

    timm averages the two classifiers of distilled models. Lists of classifiers, one for every branch or stage, read
    features of their own and may be weighted.

    Raises:
        BackboneError: There is none, and none can be made.
    """
    found: Any = model.get_classifier()  # type: ignore[operator] # see matches
    tops = list(found) if isinstance(found, (tuple, list)) else [found]
    if not all(isinstance(top, nn.Module) for top in tops) or not hasattr(model, "reset_classifier"):
        raise BackboneError(
            f"{type(model).__name__} is a network without a classifier, and timm cannot give it one",
            do="choose another network; `remap models WORD` lists them",
        )
    lists = any(isinstance(top, nn.ModuleList) for top in tops)
    modules = [m for top in tops for part in (top if isinstance(top, nn.ModuleList) else (top,)) for m in _layers(part)]
    paths = {id(module): path for path, module in model.named_modules()}
    heads = [paths[id(module)] for module in modules]
    named = as_timm(model).pretrained_cfg.get("classifier") or ()
    # A classifier of the tokens next to that of the pooled features (VOLO) is in the configuration alone.
    beside = [path for path in ((named,) if isinstance(named, str) else named) if path in paths.values()]
    beside = [path for path in beside if not f"{path}.".startswith(tuple(f"{head}." for head in heads))]
    return [*heads, *beside], not lists and not beside


def _layers(classifier: nn.Module) -> list[nn.Module]:
    """Return the layers of a classifier that is a pooling or a norm and such layers; else, and if it has none, itself.

    A hidden layer begins anew with the classifier, and is a part of it.
    """
    layers = [module for module in classifier.modules() if isinstance(module, Layer)]
    out = {layer.weight.shape[0] for layer in layers}
    return layers if len(out) == 1 else [classifier]


def _blocks(model: nn.Module, heads: Sequence[str], seen: _Seen) -> tuple[StageBlock, ...]:
    stage_of = _stage_of(model, len(seen.maps))
    classifier = tuple(f"{path}." for path in heads)
    stem, norms = _deepest(seen.takes_image), norm_paths(model)
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
        if min(layer.weight.flatten(1).shape) >= NARROWEST:
            word = "linear" if layer.weight.shape[2:].numel() == 1 and getattr(layer, "groups", 1) == 1 else "conv"
            key = f"{word}:{path.replace('.', '_')}"
            projections[stage][key] = linear(model, path, called=path in seen.called and _is_product(layer))
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
        own = {name: groups[f"{path}.{name}".removeprefix(".")] for name, _ in module.named_parameters()}
        reached[path] = max(own.values(), default=last)
        last = max((groups for name, groups in own.items() if "." not in name), default=last)
    ends = list(accumulate((reached[path] if path else -1 for path in _stage_ends(model, count)), max))
    return {name: next((stage for stage, end in enumerate(ends) if groups[name] <= end), count - 1) for name in names}


def _deepest(takes_image: Sequence[str]) -> str:
    """Return the innermost module through which alone the image enters, "" where there is none."""

    def nested(path: str, other: str) -> bool:
        return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")

    return max((p for p in takes_image if all(nested(p, other) for other in takes_image)), key=len, default="")


def _channels(model: nn.Module) -> int:
    return int(as_timm(model).pretrained_cfg.get("input_size", (3,))[0])


def _unfit_size(name: str, size: tuple[int, int], why: str) -> BackboneError:
    return BackboneError(
        f"{name} takes no images of {size[0]} x {size[1]} pixels",
        given=why or None,
        do="leave image_size out, or choose a multiple of its largest stride",
    )
