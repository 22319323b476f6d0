"""The student as one function of tensors, for the exporters of torch: preprocessing, model, softmax.

Letters: B images, C channels, H and W the view's height and width, h and w the model's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.preprocess import LUMA, Preprocess, PreprocessSpec
from remap.data import CLASSES
from remap.data.views import View
from remap.errors import RunError
from remap.exporting.format import ExportOptions


class Program(nn.Module):
    """Images as ``ExportOptions`` describes them to logits or probabilities (B, classes).

    Raises:
        RunError: Normalised floats are asked for, and the model's input has another size than the view.
    """

    def __init__(
        self, model: nn.Module, spec: PreprocessSpec, view: View, options: ExportOptions, task: str = CLASSES
    ) -> None:
        super().__init__()
        if options.input == "float" and spec.shape != view.shape:
            raise RunError(
                "the network resizes its views, which normalised floats would have to be already",
                given=f"views {view.shape}, network {spec.shape}",
                do="add --input uint8, which puts resizing and normalisation into the file",
            )
        self.options, self.task = options, task
        self.model = model
        self.prepare = PrepareInGraph(spec, view) if options.input == "uint8" else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        if self.options.layout == "nhwc":
            images = images.permute(0, 3, 1, 2)
        logits_BC = self.model(self.prepare(images))
        if not self.options.softmax:
            return logits_BC
        return logits_BC.softmax(dim=-1) if self.task == CLASSES else logits_BC.sigmoid()


@torch.no_grad()
def run_once(program: Program, images: Tensor) -> Program:
    """Let a program answer before it is traced: texts that it reads when they are first needed cannot be read then."""
    program.eval()(images)
    return program


class PrepareInGraph(nn.Module):
    """``Preprocess`` in operations that every exporter knows: resizing is a product with a matrix from each side.

    Resizing is linear and separable: its matrices are what it makes of unit images.
    """

    rows_hH: Tensor
    columns_Ww: Tensor

    def __init__(self, spec: PreprocessSpec, view: View) -> None:
        super().__init__()
        self.normalise = Preprocess(spec)  # finds nothing to resize any more
        (channels, *size), (view_channels, *view_size) = spec.shape, view.shape
        self.to_grey, self.resizes = channels == 1 and view_channels == 3, size != view_size
        if self.resizes:
            self.register_buffer("rows_hH", _resize_matrix(view_size[0], size[0], spec.interpolation))
            self.register_buffer("columns_Ww", _resize_matrix(view_size[1], size[1], spec.interpolation).T.contiguous())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pixels = images_BCHW.float()
        if self.to_grey:
            pixels = (pixels * pixels.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        if self.resizes:
            pixels = (self.rows_hH @ pixels @ self.columns_Ww).clamp(0.0, 255.0)
        return (pixels - self.normalise.shift) * self.normalise.scale


def _resize_matrix(old: int, new: int, interpolation: str) -> Tensor:
    """Return (new, old), what resizing a column of pixels multiplies it with."""
    unit = torch.eye(old)[None, None]
    if interpolation == "nearest":
        return F.interpolate(unit, (new, old), mode="nearest")[0, 0]
    return F.interpolate(unit, (new, old), mode=interpolation, antialias=True, align_corners=False)[0, 0]


def outside(spec: PreprocessSpec, options: ExportOptions, views_BCHW: Tensor) -> Tensor:
    """Return what a user of the file makes of views before they are its input."""
    images = views_BCHW if options.input == "uint8" else Preprocess(spec)(views_BCHW)
    return (images.permute(0, 2, 3, 1) if options.layout == "nhwc" else images).contiguous()


def example(spec: PreprocessSpec, view: View, options: ExportOptions) -> Tensor:
    """Return an input of two images, to trace with."""
    return outside(spec, options, torch.zeros(2, *view.shape, dtype=torch.uint8))


def input_in_words(view: View, options: ExportOptions) -> dict[str, object]:
    """Return what the file takes, for its metadata."""
    channels, height, width = view.shape
    axes = {"nchw": ["B", channels, height, width], "nhwc": ["B", height, width, channels]}[options.layout]
    kind = {"uint8": "uint8", "float": "float32, (pixel / 255 - mean) / std"}[options.input]
    return {"name": "images", "type": kind, "shape": axes}
