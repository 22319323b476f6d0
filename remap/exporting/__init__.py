"""Students as files that other programs load. The table of formats; listing it imports no torch.

The package is not called ``export``: that is what a student does, ``Student.export``. Adding a format: a file here with
a subclass of ``remap.exporting.format.Format``, and a row.
"""

from dataclasses import dataclass

from remap.io.versions import install_command
from remap.registry import Entry, Registry


@dataclass(frozen=True, kw_only=True)
class FormatEntry(Entry):
    """One format; its target is a subclass of ``remap.exporting.format.Format``.

    Attributes:
        folded: It holds plain weights of the backbone, so only methods that can be merged fit.
        options: The fields of ``ExportOptions`` that it takes.
        packages: What must be installed.
        install: What pip installs for it; empty is what the extra of its name does.
    """

    category: str = "format"
    paper: str = ""
    folded: bool = False
    options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    install: str = ""

    @property
    def install_command(self) -> str:
        """Return the command that installs ``packages``."""
        return f"pip install {self.install}" if self.install else install_command(self.name)


_GRAPH = ("input", "layout", "softmax")
# Converted by the package timmx from the merged timm folder: name, file, what it is for.
_RUNTIMES = (
    ("openvino", "OpenVINO: processors and accelerators of Intel"),
    ("coreml", "Core ML: devices of Apple"),
    ("litert", "LiteRT (TensorFlow Lite): Android, microcontrollers"),
    ("ncnn", "ncnn: mobile processors"),
    ("tensorrt", "TensorRT: GPUs of NVIDIA"),
    ("executorch", "ExecuTorch: PyTorch on devices"),
)

FORMATS: Registry[FormatEntry] = Registry(
    "format",
    "export --help",
    [
        FormatEntry(
            name="onnx",
            target="remap.exporting.onnx_file:OnnxFile",
            summary="one ONNX file, prompts and adapters inside; runs without torch and remap",
            options=(*_GRAPH, "int8", "int8_epochs", "max_drop"),
            packages=("onnx", "onnxscript", "onnxruntime"),
        ),
        FormatEntry(
            name="torch",
            target="remap.exporting.torch_program:TorchProgram",
            summary="a program of torch.export (.pt2), prompts and adapters inside",
            options=_GRAPH,
        ),
        FormatEntry(
            name="timm",
            target="remap.exporting.timm_folder:TimmFolder",
            summary="a model folder for timm.create_model and the Hugging Face hub, the method merged",
            folded=True,
        ),
        FormatEntry(
            name="peft",
            target="remap.exporting.peft_folder:PeftFolder",
            summary="an adapter folder of Hugging Face PEFT, the classifier inside",
        ),
        FormatEntry(
            name="task",
            target="remap.exporting.task_folder:TaskFolder",
            summary="remap's own task folder: what was trained, never the backbone",
        ),
        *(
            FormatEntry(
                name=name,
                target="remap.exporting.other_runtimes:OtherRuntime",
                summary=f"{summary} (by timmx)",
                folded=True,
                packages=("timmx",),
                # TensorRT is no extra of it: its wheel comes from NVIDIA.
                install="timmx tensorrt" if name == "tensorrt" else f"'timmx[{name}]'",
            )
            for name, summary in _RUNTIMES
        ),
    ],
)
