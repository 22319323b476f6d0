"""``--to onnx``: one file by torch's exporter of graphs (dynamo), with prompts, adapters and metadata inside."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remap.errors import RemapError
from remap.exporting import snippets
from remap.exporting.format import Answer, ExportOptions, Format
from remap.exporting.program import Program, example, input_in_words, outside
from remap.exporting.task_source import TaskSource

# The lowest that torch's exporter writes, and so what most runtimes read.
OPSET = 18


class OnnxFile(Format):
    """``model.onnx``: input "images", output "logits" or "probabilities", any batch size."""

    file = "model.onnx"

    def write(self, source: TaskSource, folder: Path, options: ExportOptions) -> dict[str, Any]:
        folder.mkdir()
        path = folder / self.file
        facts = {"input": input_in_words(source, options), "output": output_name(options), "opset": OPSET}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.onnx.export(
                Program(source, options).eval(),
                (example(source, options),),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=[output_name(options)],
                verbose=False,
            )
        assert program is not None  # of a path it would be
        program.model.metadata_props.update(as_texts(source.facts | facts))
        try:
            program.save(path, external_data=False)
        except ValueError as error:  # of protobuf
            raise RemapError(
                "the network does not fit into one ONNX file, which holds 2 GB",
                given=f"{sum(p.numel() for p in source.tuned.model.parameters()):,} parameters",
                do="export to torch or timm instead",
            ) from error
        return facts

    def open(self, source: TaskSource, folder: Path, options: ExportOptions) -> Answer:
        return answer_of(source, folder / self.file, options)

    def usage(self, source: TaskSource, options: ExportOptions) -> str:
        return snippets.onnx(source, options, self.file)


def output_name(options: ExportOptions) -> str:
    """Return what the output is called."""
    return "probabilities" if options.softmax else "logits"


def as_texts(facts: dict[str, Any]) -> dict[str, str]:
    """Return metadata as texts, which is all that these files hold: lists and objects as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def answer_of(source: TaskSource, file: Path, options: ExportOptions) -> Answer:
    """Return what a file answers in onnxruntime, on one thread of the CPU."""
    import onnxruntime  # an extra

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

    def answer(views_BCHW: Tensor) -> Tensor:
        images = outside(source, options, views_BCHW).numpy()
        return torch.from_numpy(session.run(None, {"images": images})[0])

    return answer
