"""``--to onnx``: one file by torch's exporter of graphs (dynamo), with prompts, adapters and metadata inside."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remap.backbones.preprocess import PreprocessSpec
from remap.errors import RemapError
from remap.exporting import snippets
from remap.exporting.format import Answer, ExportOptions, Format
from remap.exporting.program import Program, example, input_in_words, outside, run_once
from remap.exporting.task_source import TaskSource

# The lowest that torch's exporter writes, and so what most runtimes read.
OPSET = 18


class OnnxFile(Format):
    """``model.onnx``: input "images", output "logits" or "probabilities", any batch size."""

    file = "model.onnx"

    def write(self, source: TaskSource, folder: Path, options: ExportOptions) -> dict[str, Any]:
        folder.mkdir()
        return write_graph(source, folder / self.file, options, source.plain_model())

    def open(self, source: TaskSource, folder: Path, options: ExportOptions) -> Answer:
        return answer_of(source.meta.preprocess, folder / self.file, options)

    def usage(self, source: TaskSource, options: ExportOptions) -> str:
        return snippets.onnx(source, options, self.file)


def write_graph(source: TaskSource, path: Path, options: ExportOptions, model: nn.Module) -> dict[str, Any]:
    """Write a student's model, and return what the file says of itself besides what is known of the source."""
    spec, view = source.meta.preprocess, source.view
    facts = {"input": input_in_words(view, options), "output": output_name(options), "opset": OPSET}
    graph = traced(
        Program(model, spec, view, options, source.meta.task), example(spec, view, options), [output_name(options)]
    )
    save_graph(graph, path, source.facts | facts)
    return facts


def traced(program: Program, images: Tensor, outputs: Sequence[str]) -> torch.onnx.ONNXProgram:
    """Return the graph of a program, for batches of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        graph = torch.onnx.export(
            run_once(program, images),
            (images,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=outputs,
            verbose=False,
        )
    assert graph is not None  # of a path it would be
    return graph


def save_graph(graph: torch.onnx.ONNXProgram, path: Path, facts: dict[str, Any]) -> None:
    """Write a graph with its metadata.

    Raises:
        RemapError: The network is too large for one file.
    """
    # As texts, which is all that these files hold: lists and objects as JSON.
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    graph.model.metadata_props.update(texts)
    try:
        graph.save(path, external_data=False)
    except ValueError as error:  # of protobuf
        raise RemapError(
            "the network does not fit into one ONNX file, which holds 2 GB", do="export to another format"
        ) from error


def output_name(options: ExportOptions) -> str:
    """Return what the output is called."""
    return "probabilities" if options.softmax else "logits"


def answer_of(spec: PreprocessSpec, file: Path, options: ExportOptions, output: str | None = None) -> Answer:
    """Return what a file answers in onnxruntime, on one thread of the CPU.

    Args:
        output: One of several; what the others need is not computed.
    """
    import onnxruntime  # an extra

    settings, one = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    one.only_execute_path_to_fetches = output is not None
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

    def answer(views_BCHW: Tensor) -> Tensor:
        images = outside(spec, options, views_BCHW).numpy()
        return torch.from_numpy(session.run([output] if output else None, {"images": images}, one)[0])

    return answer
