"""Runtimes that the package timmx converts for, from the merged timm folder; it checks its conversions itself."""

import shutil
from pathlib import Path
from typing import Any

from remap.errors import RunError
from remap.exporting import FormatEntry, snippets
from remap.exporting.format import ExportOptions, Format
from remap.exporting.task_source import TaskSource
from remap.exporting.timm_folder import TimmFolder

# What timmx wants the output to be called.
_FILES = {
    "openvino": "model.xml",
    "coreml": "model.mlpackage",
    "litert": "model.tflite",
    "ncnn": "model",
    "tensorrt": "model.engine",
    "executorch": "model.pte",
}


class OtherRuntime(Format):
    """The file of a runtime, batch 1, normalised floats to logits."""

    def __init__(self, row: FormatEntry) -> None:
        super().__init__(row)
        self.file = _FILES[row.name]

    def write(self, source: TaskSource, folder: Path, options: ExportOptions) -> dict[str, Any]:
        import timmx  # installed by the user

        plain = folder.with_name(f"{folder.name}.timm")
        try:
            TimmFolder(self.row).write(source, plain, options)
            folder.mkdir()
            timmx.export_model(self.row.name, f"local-dir:{plain}", pretrained=True, output=str(folder / self.file))
        except timmx.TimmxError as error:
            do = f"see `timmx doctor`; {self.row.install_command}"
            raise RunError(f"timmx cannot write {self.row.name}", given=str(error), do=do) from error
        finally:
            shutil.rmtree(plain, ignore_errors=True)
        # Without a name: each runtime has one of its own.
        taken = {"type": "float32, (pixel / 255 - mean) / std", "shape": [1, *source.meta.preprocess.shape]}
        return {"input": taken, "output": "logits"}

    def open(self, source: TaskSource, folder: Path, options: ExportOptions) -> None:
        """Run nothing: timmx has compared its file with torch, and ends with an error where they differ."""

    def usage(self, source: TaskSource, options: ExportOptions) -> str:
        """Return Python for OpenVINO; the other runtimes have code of their own for each device."""
        return snippets.openvino(source, self.file) if self.row.name == "openvino" else ""
