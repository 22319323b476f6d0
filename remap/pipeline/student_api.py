"""The Python API besides ``remap.distill``: attach a method to a model, load a tuned student."""

from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.data.views import View
from remap.distributed.launch import usable_device
from remap.errors import DataError, RecipeError
from remap.exporting.export import Exported, export_student
from remap.exporting.task_source import TaskSource
from remap.io.paths import expanded
from remap.network import Network, Runner, choose_kernels
from remap.recipe.problems import lines_of
from remap.runs.task import load_task, require_classifier
from remap.tuning import config_of, rows_of
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

# Images of one forward pass of ``Student.logits``.
AT_ONCE = 64


def attach(model: nn.Module, method: str, **options: Any) -> Attached:
    """Attach a tuning method to a timm model, in place.

    Everything but the method's own parameters is frozen, the classifier included; turn its ``requires_grad`` on if
    it is new.

    Args:
        method: A name from ``remap methods``, or several: "vpt_deep+lora".
        options: The method's options, e.g. ``num_prompts=10``; of several methods ``vpt_deep={"num_prompts": 10}``.

    Raises:
        RemapError: Unknown method or option, or a backbone the method does not fit.
    """
    # The table's error lists near names; pydantic's would not.
    rows_of(method)
    config = config_of(method)
    try:
        return attach_method(model, anatomy_of(model), method, options)
    except ValidationError as error:
        raise RecipeError(lines_of(error, config), f"options of {method}") from None


class Student:
    """A tuned student, ready for images.

    Attributes:
        model: The timm model with its method attached; takes preprocessed pixels.
        classes: Class names in the order of the logits.
        path: The run directory or task folder it was loaded from.
    """

    def __init__(self, network: Network, view: View, device: torch.device, path: Path) -> None:
        self.network, self.view, self.device, self.path = network, view, device, path
        self.model, self.classes = network.model.eval().to(device), network.classes or ()
        # Inference has no backward pass, but the device decides as in training.
        choose_kernels(network, "auto", device)
        self._runner = Runner(network).to(device)

    def pixels(self, image: Image.Image | bytes | Path | str) -> np.ndarray:
        """Return the raw view of one image, uint8 (C, H, W).

        Raises:
            BadImage: The image cannot be read.
        """
        return self.view.read(expanded(image) if isinstance(image, str) else image)

    @torch.no_grad()
    def logits(self, images: Sequence[Image.Image | bytes | Path | str]) -> Tensor:
        """Return logits (B, C), float32, on the CPU; of many images, as many at once as ``AT_ONCE``.

        Raises:
            DataError: One image is given, not a list.
            BadImage: An image cannot be read.
        """
        images = several(images)
        found = [torch.empty(0, len(self.classes))]
        for start in range(0, len(images), AT_ONCE):
            views = [self.pixels(image) for image in images[start : start + AT_ONCE]]
            found.append(self.logits_of_views(torch.from_numpy(np.stack(views))))
        return torch.cat(found)

    @torch.no_grad()
    def logits_of_views(self, images_BCHW: Tensor) -> Tensor:
        """Return logits (B, C) of views already made (uint8), as ``pixels`` makes them.

        Raises:
            DataError: They are not.
        """
        self.require_views(images_BCHW)
        return self._runner(images_BCHW.to(self.device)).logits_BC.float().cpu()

    def require_views(self, images_BCHW: Tensor) -> None:
        """Refuse what would be read as other pixels: numbers from 0 to 1 are black images, and another size is cut."""
        shape, given = self.view.shape, f"{type(images_BCHW).__name__}"
        if isinstance(images_BCHW, Tensor):
            if images_BCHW.dtype == torch.uint8 and images_BCHW.ndim == 4 and tuple(images_BCHW.shape[1:]) == shape:
                return
            given = f"{images_BCHW.dtype} {tuple(images_BCHW.shape)}"
        raise DataError(
            "these are not views of this student",
            given=given,
            allowed=f"a torch.uint8 tensor of (images, {', '.join(map(str, shape))}), values 0 to 255",
            do="make them with `pixels`, or give images to `logits`",
        )

    def predict(self, images: Sequence[Image.Image | bytes | Path | str]) -> list[tuple[str, float]]:
        """Return the likeliest class of each image and its probability."""
        best = self.network.probabilities(self.logits(images)).max(dim=-1)
        return [(self.classes[i], float(p)) for p, i in zip(best.values, best.indices, strict=True)]

    def predict_all(
        self, images: Sequence[Image.Image | bytes | Path | str], threshold: float = 0.5
    ) -> list[list[tuple[str, float]]]:
        """Return all classes of each image that are as likely as ``threshold``, with their probabilities."""
        require_share(threshold)
        rows = self.network.probabilities(self.logits(images)).tolist()
        return [[(name, p) for name, p in zip(self.classes, row, strict=True) if p >= threshold] for row in rows]

    def export(self, to: str, output: str | Path | None = None, **options: Any) -> Exported:
        """Write files that other programs load, and check them; see ``remap.exporting.export.export_student``."""
        return export_student(self.path, to, output, **options)

    def save(self, output: str | Path, **options: Any) -> Exported:
        """Copy the task folder: what was trained, never the backbone. ``load_student`` opens it."""
        return self.export("task", output, **options)

    def merge(self) -> nn.Module:
        """Return a plain timm model, in eval, with the method folded into its weights. The student stays as it is.

        Raises:
            RunError: The method cannot be folded.
        """
        # Opened anew: folding writes into the weights, and this student keeps its own.
        source = TaskSource(self.path)
        source.require_mergeable()
        return source.plain_model().to(self.device)


def several(images: Iterable[Image.Image | bytes | Path | str]) -> list[Image.Image | bytes | Path | str]:
    """Return images as a list.

    Raises:
        DataError: One image is given, or something that holds none.
    """
    if isinstance(images, str | bytes | Path | Image.Image):
        given = images if isinstance(images, str | Path) else type(images).__name__
        raise DataError("one image is given, where a list is read", given=given, do="write [image]")
    kinds = "a list of paths, bytes or PIL images"
    if not isinstance(images, Iterable):
        raise DataError("images are not a list", given=type(images).__name__, allowed=kinds)
    found = list(images)
    if wrong := [one for one in found if not isinstance(one, str | bytes | Path | Image.Image)]:
        raise DataError("images are of another kind", given=type(wrong[0]).__name__, allowed=kinds)
    return found


def require_share(threshold: float | None) -> None:
    """Refuse a threshold that no probability can have.

    Raises:
        RecipeError: It is not a number from 0 to 1.
    """
    if threshold is not None and not (isinstance(threshold, Real) and 0 <= threshold <= 1):
        raise RecipeError([f"threshold: should be a number from 0 to 1, got {threshold!r}"], "prediction")


def load_student(run_dir: str | Path, device: str | torch.device | None = None) -> Student:
    """Load the tuned student of a run directory (or of a copy of its task folder).

    Args:
        run_dir: The run directory or task folder.
        device: Where it computes; None is the accelerator if there is one, else the CPU.

    Raises:
        RunError: The files are damaged, the backbone is another one, the student has no classifier, or the device
            cannot be used.
    """
    path = expanded(run_dir)
    network, view = load_task(path)
    require_classifier(network, path)
    return Student(network, view, usable_device(device), path)
