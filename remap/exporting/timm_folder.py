"""``--to timm``: the student as a plain model of timm, its method merged into the weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remap.backbones.model_folder import is_known_to_timm, open_model_folder, save_model_folder
from remap.backbones.preprocess import Preprocess
from remap.backbones.typed import as_timm
from remap.errors import BackboneError
from remap.exporting import snippets
from remap.exporting.format import Answer, ExportOptions, Format
from remap.exporting.task_source import TaskSource
from remap.remapping.architecture.shrink import Shape


class TimmFolder(Format):
    """config.json and model.safetensors, for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

    def write(self, source: TaskSource, folder: Path, options: ExportOptions) -> dict[str, Any]:
        source.require_mergeable()
        network = source.network()
        model, anatomy = network.attached.merge().eval(), network.anatomy
        shape = {} if is_known_to_timm(model) else Shape.of(anatomy).arguments(anatomy)
        as_timm(model).pretrained_cfg = source.pretrained_cfg | preprocessing(source)
        try:
            save_model_folder(model, folder, shape, source.meta.classes)
        except BackboneError as error:
            raise source.refusal(error.what, str(error.given)) from error
        return {}

    def open(self, source: TaskSource, folder: Path, options: ExportOptions) -> Answer:
        return answer_of(source, open_model_folder(folder))

    def usage(self, source: TaskSource, options: ExportOptions) -> str:
        return snippets.timm_model(source)


def preprocessing(source: TaskSource) -> dict[str, Any]:
    """Return what timm's configuration says of the input."""
    spec, view = source.meta.preprocess, source.view
    return {
        "input_size": spec.shape,
        "mean": spec.mean,
        "std": spec.std,
        "crop_pct": view.crop_pct,
        "crop_mode": "center",
        "interpolation": view.interpolation,
    }


def answer_of(source: TaskSource, model: nn.Module) -> Answer:
    """Return what a model of timm answers."""
    prepare = Preprocess(source.meta.preprocess)

    @torch.no_grad()
    def answer(views_BCHW: Tensor) -> Tensor:
        return model(prepare(views_BCHW))

    return answer
