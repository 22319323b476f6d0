"""From one batch of raw pixels to what a given model expects: its own channels, size, interpolation, normalisation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.typed import input_channels
from remap.errors import BackboneError

# Weights of red, green and blue (ITU-R BT.601), as in Pillow's greys.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class PreprocessSpec:
    """What a model's weights were trained to see.

    Attributes:
        size: Side of the square input in pixels, or (height, width).
        crop_pct: Share of the shorter side kept by the centre crop in evaluation.
        mean, std: Per channel, of pixels scaled to [0, 1].
    """

    size: int | tuple[int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        return (len(self.mean), *((self.size, self.size) if isinstance(self.size, int) else self.size))

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def of(model: nn.Module) -> "PreprocessSpec":
        """Return the specification in the model's timm configuration.

        Raises:
            BackboneError: Its mean and deviation are those of other channels.
        """
        config = resolve_data_config({}, model=model)
        height, width = map(int, config["input_size"][-2:])
        known = config["interpolation"] if config["interpolation"] in ("bicubic", "bilinear", "nearest") else "bicubic"
        return PreprocessSpec(
            size=width if height == width else (height, width),
            crop_pct=float(config["crop_pct"]),
            interpolation=known,
            mean=_per_channel(config["mean"], input_channels(model), "mean"),
            std=_per_channel(config["std"], input_channels(model), "std"),
        )


def _per_channel(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    """Return one value a channel: a single one is that of all, and greys have the average of three colours."""
    if len(values) == 1 or (channels == 1 and len(values) == 3):
        return (sum(values) / len(values),) * channels
    if len(values) != channels:
        raise BackboneError(
            f"the model takes {channels} channels, and its '{name}' is that of {len(values)}",
            given=f"{name} {tuple(values)}",
            do=f"write {channels} numbers, or one for all, in pretrained_cfg.{name} of its config.json",
        )
    return tuple(values)


def require_channels(view: int, network: int, name: str) -> None:
    """Check that a network can be given images of so many channels.

    Raises:
        BackboneError: Neither has the other's, and they are not greys and colours.
    """
    if view != network and {view, network} != {1, 3}:
        raise BackboneError(
            f"{name} takes images of {network} channels, other networks of this run {view}",
            allowed="the same number for all; or 1 (grey) and 3 (colours), where greys are made of the colours",
            do="take a teacher and a student of the same number of channels",
        )


class Preprocess(nn.Module):
    """uint8 (B, C', H', W') -> float32 (B, C, H, W), resized only when the view is not already of the model's size.

    A network of greys takes the luma of colours (ITU-R BT.601), one of colours takes grey as each of the three.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, spec: PreprocessSpec) -> None:
        super().__init__()
        self.spec = spec
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) * 255.0 for values in (spec.mean, spec.std))
        self.register_buffer("shift", mean, persistent=False)
        self.register_buffer("scale", 1.0 / std, persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pixels, (channels, *size) = images_BCHW.float(), self.spec.shape
        if channels == 1 and pixels.shape[1] == 3:
            pixels = (pixels * pixels.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        if list(pixels.shape[2:]) != size:
            if self.spec.interpolation == "nearest":
                pixels = F.interpolate(pixels, size, mode="nearest")
            else:
                pixels = F.interpolate(
                    pixels, size, mode=self.spec.interpolation, antialias=True, align_corners=False
                ).clamp(0.0, 255.0)
        return (pixels - self.shift) * self.scale
