"""From one batch of raw pixels to what a given model expects: its own size, interpolation and normalisation."""

from dataclasses import asdict, dataclass

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PreprocessSpec:
    """What a model's weights were trained to see.

    Attributes:
        size: Side of the square input in pixels.
        crop_pct: Share of the shorter side kept by the centre crop in evaluation.
        mean, std: Per channel, of pixels scaled to [0, 1].
    """

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "PreprocessSpec":
        return PreprocessSpec(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    @staticmethod
    def of(model: nn.Module) -> "PreprocessSpec":
        """Return the specification in the model's timm configuration."""
        config = resolve_data_config({}, model=model)
        known = config["interpolation"] if config["interpolation"] in ("bicubic", "bilinear", "nearest") else "bicubic"
        return PreprocessSpec(
            size=int(config["input_size"][-1]),
            crop_pct=float(config["crop_pct"]),
            interpolation=known,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )


class Preprocess(nn.Module):
    """uint8 (B, 3, V, V) -> float32 (B, 3, S, S), resized only when the view is not already of the model's size."""

    shift: Tensor
    scale: Tensor

    def __init__(self, spec: PreprocessSpec) -> None:
        super().__init__()
        self.spec = spec
        mean, std = torch.tensor(spec.mean).view(1, 3, 1, 1) * 255.0, torch.tensor(spec.std).view(1, 3, 1, 1) * 255.0
        self.register_buffer("shift", mean, persistent=False)
        self.register_buffer("scale", 1.0 / std, persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pixels = images_BCHW.float()
        if pixels.shape[-1] != self.spec.size:
            size = (self.spec.size, self.spec.size)
            if self.spec.interpolation == "nearest":
                pixels = F.interpolate(pixels, size, mode="nearest")
            else:
                pixels = F.interpolate(
                    pixels, size, mode=self.spec.interpolation, antialias=True, align_corners=False
                ).clamp(0.0, 255.0)
        return (pixels - self.shift) * self.scale
