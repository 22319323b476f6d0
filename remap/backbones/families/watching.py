"""Watch one pass through a network of timm, and read what its interface does not tell. B images, D channels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from remap.backbones.families.reading import norm_paths
from remap.backbones.typed import evaluating, input_channels
from remap.errors import BackboneError

Layer = nn.Linear | nn.Conv2d


@dataclass
class Seen:
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
def watched(model: nn.Module, heads: Sequence[str], size: tuple[int, int]) -> Seen:
    """Send one image through a network and return what was seen, without computing anything where that is possible.

    Raises:
        BackboneError: It takes no images of this size.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    tensors = {f"model.{name}": t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    shape = (1, input_channels(model), *size)
    try:
        with evaluating(model):
            for device in ("meta", like.device):
                # A graph leads from the image to all that it gets to in other ways than through a module that takes it.
                images = torch.zeros(shape, dtype=like.dtype, device=device, requires_grad=True) + 0
                moved = {name: t.to(device) for name, t in tensors.items()}
                try:
                    with _watching(model, heads, images) as seen:
                        # Untied: a module that stands at two paths would be swapped twice, and not come back.
                        outputs = functional_call(_WholePass(model), moved, (images,), tie_weights=False)
                    break
                except Exception:  # few networks read values of tensors, or hold some that are not parameters
                    if like.device == device:
                        raise
    except Exception as error:  # networks of timm refuse a size in many ways
        raise unfit_size(type(model).__name__, size, " ".join(str(error).split())[:200]) from error
    logits, *maps = outputs
    seen.maps = [tuple(output.shape[1:]) for output in maps]
    if logits.requires_grad:
        seen.takes_image = []
    return seen


@contextmanager
def _watching(model: nn.Module, heads: Sequence[str], images: Tensor) -> Iterator[Seen]:
    """Record while the block runs the network on these very images."""
    seen, norms, cut = Seen(), norm_paths(model), images.detach()
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


def deepest(takes_image: Sequence[str]) -> str:
    """Return the innermost module through which alone the image enters, "" where there is none."""

    def nested(path: str, other: str) -> bool:
        return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")

    return max((p for p in takes_image if all(nested(p, other) for other in takes_image)), key=len, default="")


def unfit_size(name: str, size: tuple[int, int], why: str) -> BackboneError:
    """Return the error for a height and width in pixels that a network cannot take."""
    return BackboneError(
        f"{name} takes no images of {size[0]} x {size[1]} pixels",
        given=why or None,
        do="leave image_size out, or choose a multiple of its largest stride",
    )
