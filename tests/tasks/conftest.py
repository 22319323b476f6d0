"""Task folders on one tiny backbone, without training: what a method inserts is drawn at random instead."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remap.data.views import View
from remap.network import tuned
from remap.recipe.schema import ModelSpec
from remap.runs.task import open_backbone, save_task

MakeTask = Callable[..., Path]


@pytest.fixture
def make_task(tiny: Any, tmp_path: Path) -> MakeTask:
    """Write a task folder: name, method, classes, share of a picture that is seen, task, and the method's options."""

    def make(
        name: str,
        method: str,
        classes: tuple[str, ...] = ("a", "b", "c"),
        model: str = "",
        crop: float = 1.0,
        task: str = "classes",
        **options: Any,
    ) -> Path:
        torch.manual_seed(len(name) + 7 * len(method))
        backbone = open_backbone(ModelSpec(model=model or tiny.student), len(classes))
        network = tuned(backbone, method, options)
        with torch.no_grad():
            for parameter in network.trained.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        network.classes, network.task = classes, task
        side = network.preprocess.size
        save_task(tmp_path / name, network, View(side, crop, "bicubic"), method, options)
        return tmp_path / name

    return make
