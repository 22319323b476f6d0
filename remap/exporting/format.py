"""What a format is, and what a user chooses about an export."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, get_args

from torch import Tensor

from remap.errors import RecipeError, RemapError, RunError
from remap.exporting import FORMATS, FormatEntry
from remap.exporting.task_source import TaskSource
from remap.registry import did_you_mean

Input = Literal["float", "uint8"]
Layout = Literal["nchw", "nhwc"]
Int8 = Literal["dynamic", "static", "qat"]
# From views, uint8 (B, C, H, W), to what the exported file answers, (B, classes).
Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExportOptions:
    """What a user chooses; each format takes some of it (``FormatEntry.options``).

    Attributes:
        input: What the graph takes: normalised floats, or uint8 of the view's size, resized and normalised inside.
        layout: Order of the input's axes.
        softmax: Answer with probabilities instead of logits; of task multilabel by a sigmoid.
        int8: Quantise to 8 bits: dynamic (weights, and activations as they come), static (calibrated) or qat (static,
            after quantisation-aware distillation).
        int8_epochs: Passes of qat over the training images; None is 3.
        max_drop: Accuracy that int8 may cost, in percentage points: over all images, and of the worst class; None is 1.
        images: Images to check on at most.
    """

    input: Input = "float"
    layout: Layout = "nchw"
    softmax: bool = False
    int8: Int8 | None = None
    int8_epochs: int | None = None
    max_drop: float | None = None
    images: int = 256

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Return options by name.

        Raises:
            RecipeError: A name is none of them.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            allowed = ", ".join(known)
            lines = [f"{name}: unknown option{did_you_mean(name, known)} (allowed: {allowed})" for name in unknown]
            raise RecipeError(lines, "options of an export")
        return cls(**options)

    def require_fit(self, row: FormatEntry) -> None:
        """Refuse values that do not exist, and options that the format does not take.

        Raises:
            RunError: What was given, and which formats take it.
        """
        for name, kind in {"input": Input, "layout": Layout, "int8": Int8}.items():
            if (value := getattr(self, name)) is not None and value not in get_args(kind):
                raise RunError(f"there is no such {name}", given=value, allowed=get_args(kind))
        for field in fields(self):
            if field.name == "images" or getattr(self, field.name) == field.default or field.name in row.options:
                continue
            flag = f"--{field.name.replace('_', '-')}"
            takes = [other.name for other in FORMATS if field.name in other.options]
            given = flag if field.type is bool else f"{flag} {getattr(self, field.name)}"
            raise RunError(f"the format {row.name} does not take {flag}", given=given, allowed=", ".join(takes))
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:  # False for NaN too
            raise RunError("--max-drop is a number of percentage points", given=self.max_drop, allowed="0 to 100")
        epochs = 1 if self.int8_epochs is None else self.int8_epochs
        for name, what, value in (("int8_epochs", "epochs", epochs), ("images", "images", self.images)):
            if not isinstance(value, int) or value < 1:
                flag = f"--{name.replace('_', '-')}"
                raise RunError(f"{flag} is a number of {what}", given=value, allowed="1 and more")
        if self.int8 != "qat" and self.int8_epochs is not None:
            raise RunError("--int8-epochs is for --int8 qat", given=f"--int8 {self.int8 or '(not given)'}")
        if self.int8 is None and self.max_drop is not None:
            raise RunError("--max-drop bounds what int8 costs, and this export is not int8", do="add --int8 static")


class Format(ABC):
    """Writes a tuned student in one format, and opens what it wrote.

    Attributes:
        file: The file in the output folder that other programs load; empty where that is the folder.
        size_of: What the size is shown of.
    """

    file: str = ""

    def __init__(self, row: FormatEntry) -> None:
        self.row = row

    def require_packages(self) -> None:
        """Require what the format is written with.

        Raises:
            RemapError: Names what to install.
        """
        missing = [name for name in self.row.packages if find_spec(name) is None]
        if missing:
            raise RemapError(
                f"the format {self.row.name} needs {', '.join(missing)}, which is not installed",
                do=self.row.install_command,
            )

    @abstractmethod
    def write(self, source: TaskSource, folder: Path, options: ExportOptions) -> dict[str, Any]:
        """Write the student into a folder that is not there yet.

        Returns:
            What the card and ``export.json`` should say besides what is known of the source.
        """

    @abstractmethod
    def open(self, source: TaskSource, folder: Path, options: ExportOptions) -> Answer | None:
        """Return what the written files answer, loaded as a stranger would; None where nothing here can run them."""

    @abstractmethod
    def usage(self, source: TaskSource, options: ExportOptions) -> str:
        """Return Python, for the card, that classifies a picture with what was written."""
