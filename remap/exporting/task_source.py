"""What is exported: a tuned student by its run directory or task folder, and all that is known of it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from remap import __version__
from remap.backbones.hub import licence_of
from remap.backbones.names import is_weights_file
from remap.backbones.preprocess import PreprocessSpec
from remap.backbones.typed import as_timm
from remap.data import ACTIVATION, CLASSES, METRIC
from remap.data.splits import ImageData, Split
from remap.data.views import View, ViewSource
from remap.errors import DataError, RemapError, RunError
from remap.exporting import FORMATS
from remap.io.checked_read import sha256_of
from remap.io.paths import expanded
from remap.network import Network
from remap.runs.run_dir import RunDir
from remap.runs.run_images import images_of_run
from remap.runs.task import load_task, require_classifier
from remap.runs.task_file import TaskMeta, folder_of, read_meta

UNKNOWN_LICENCE = "unknown, check"
# Of a check without the run's own images: one batch of 64, and 7 more.
DRAWN = 71


@dataclass(frozen=True)
class SourceImages:
    """Images of the run as views; labels (N,) are None for drawn ones.

    Attributes:
        what: What they are, in words.
    """

    views_NCHW: Tensor
    labels_N: NDArray[np.int64] | None
    what: str


class TaskSource:
    """A tuned student on disk.

    Raises:
        RunError: There is no task, it is damaged, or the student has no classifier.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        self.folder = folder_of(self.path)
        self.meta = read_meta(self.folder)
        self.view = self.meta.view
        self.run = RunDir(self.path) if (self.path / "recipe.yaml").is_file() else None
        self.tuned = self.network()
        require_classifier(self.tuned, self.path)
        self.mergeable = self.tuned.attached.mergeable
        # Without a method's modules nothing tells any more that they were there.
        self.pretrained_cfg = dict(as_timm(self.tuned.model).pretrained_cfg)

    def network(self) -> Network:
        """Load the student once more, in eval, on the CPU."""
        network, _ = load_task(self.path)
        network.model.eval().requires_grad_(False)
        return network

    def plain_model(self) -> nn.Module:
        """Return the model without a trace of its method, where that can be merged, else with it."""
        network = self.network()
        return network.attached.merge().requires_grad_(False) if self.mergeable else network.model

    def require_mergeable(self) -> None:
        """Refuse a method that cannot be folded into the backbone's weights.

        Raises:
            RunError: Names the formats that work.
        """
        if not self.mergeable:
            name = self.meta.method.name
            raise self.refusal(f"{name} cannot be folded into the backbone's weights, which this format needs")

    def refusal(self, what: str, given: str | None = None) -> RunError:
        """Return an error that names the formats which take any student."""
        return RunError(
            what,
            given=given,
            allowed=f"--to {', '.join(row.name for row in FORMATS if not row.folded and row.name != 'peft')}",
            do=f"remap export {shlex.quote(str(self.path))} --to onnx, which has prompts and adapters in its graph",
        )

    def cut(self, probabilities: bool) -> float | None:
        """Return above which answer a class is named; None where the likeliest class is the answer."""
        return None if self.meta.task == CLASSES else 0.5 if probabilities else 0.0

    def images(self, most: int) -> SourceImages:
        """Return images that the student was evaluated on, evenly chosen; drawn ones where there are none at hand."""
        if isinstance(self._data, str):
            pixels = torch.randint(0, 256, (DRAWN, *self.view.shape), generator=torch.Generator().manual_seed(0))
            return SourceImages(pixels.byte(), None, f"random pixels, since {self._data}")
        test, unlabeled = self._data.test, self._data.unlabeled
        if unlabeled is not None and not len(self._data.val):
            views, _ = self._read(unlabeled, most)
            return SourceImages(views, None, f"{len(views)} images without labels of {self._data.source}")
        split, name = (self._data.val, "evaluation") if test is None else (test, "test")
        views, labels = self._read(split, most)
        return SourceImages(views, labels, f"{len(views)} {name} images of {self._data.source}")

    def training_images(self, most: int) -> Tensor:
        """Return training images as views, evenly chosen.

        Raises:
            RunError: They are not at hand.
        """
        self.require_images()
        assert not isinstance(self._data, str)
        return self._read(self._data.to_look_at, most)[0]

    @cached_property
    def _data(self) -> ImageData | str:
        """Return the images of the run; a reason in words where they are not at hand."""
        if self.run is None:
            return "a task folder does not say where its images are"
        spec = self.run.recipe().data
        try:
            data = images_of_run(spec)
        except DataError as error:
            return f"the images of the run cannot be opened ({error.what})"
        if data.classes != self.meta.classes:
            return "the images of the run have other classes now"
        return data

    def require_images(self) -> None:
        """Refuse what is measured on images of the run, before hours of work.

        Raises:
            RunError: They are not at hand.
        """
        if isinstance(self._data, str):
            do = "bring them back" if self.run is not None else "name the run directory, which does"
            raise RunError(f"int8 needs the images of the run, and {self._data}", do=f"{do}, or export without --int8")

    def _read(self, split: Split, most: int) -> tuple[Tensor, NDArray[np.int64]]:
        chosen = np.unique(np.linspace(0, len(split) - 1, min(most, len(split))).round().astype(np.int64))
        views, readable = ViewSource(split, self.view, memory_bytes=0.0).batch(chosen)
        if not len(views):
            raise DataError("none of the images can be read", given=split.names[0])
        return views, split.labels[readable]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What every export says of itself: names, classes, preprocessing, licences, accuracy, versions."""
        summary = self._summary()
        student, meta = summary.get("student", {}), self.meta
        teachers = [one for one in (summary.get("teacher"), *summary.get("more_teachers", [])) if one]
        return {
            "classes": list(meta.classes),
            "task": meta.task,
            "activation": ACTIVATION[meta.task],
            "metric": METRIC[meta.task],
            "preprocessing": preprocessing_facts(meta.preprocess, self.view),
            "base_model": meta.backbone.model,
            "base_model_sha256": meta.backbone.sha256,
            **self._weights(),
            "method": {"name": meta.method.name, **meta.method.options},
            "accuracy": student.get("test_accuracy", student.get("accuracy")),
            "data": summary.get("data", {}).get("source"),
            "licence_of_base_model": licence_of_base_model(meta, self.pretrained_cfg),
            "teachers": [
                {"model": one["model"], "licence": licence_of(one["model"]) or UNKNOWN_LICENCE} for one in teachers
            ],
            "command": self._command(),
            "remap": __version__,
        }

    def _weights(self) -> dict[str, str | None]:
        """Return where the base model's weights are from: "pretrained", "none", or a file by its name and hash."""
        weights = self.meta.backbone.weights
        if not is_weights_file(weights):
            return {"base_weights": weights}
        file = Path(weights)
        # Where the task holds all weights itself, the file may be gone.
        return {"base_weights": file.name, "base_weights_sha256": sha256_of(file) if file.is_file() else None}

    def _summary(self) -> dict[str, Any]:
        try:
            return self.run.summary() if self.run is not None else {}
        except RemapError:  # a run that was stopped has a task of its last checkpoint, and no summary
            return {}

    def _command(self) -> str | None:
        file = self.run.path / "command.txt" if self.run is not None else None
        return file.read_text(errors="replace").strip() if file is not None and file.is_file() else None


def licence_of_base_model(meta: TaskMeta, pretrained_cfg: Mapping[str, Any]) -> str:
    """Return the licence of a task's backbone: that which timm names is of its own weights, not of those in a file."""
    return str((not is_weights_file(meta.backbone.weights) and pretrained_cfg.get("license")) or UNKNOWN_LICENCE)


def preprocessing_facts(spec: PreprocessSpec, view: View) -> dict[str, Any]:
    """Return how a picture becomes the input of an export."""
    return {
        "size": list(view.shape[1:]),
        "crop_pct": view.crop_pct,
        "interpolation": view.interpolation,
        "channels": view.pixels.channels,
        "alpha": view.pixels.alpha,
        "value_range": view.pixels.value_range,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
