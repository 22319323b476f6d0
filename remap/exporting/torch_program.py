"""``--to torch``: a program of ``torch.export``, which torch loads without the code that made it."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remap.exporting import snippets
from remap.exporting.format import Answer, ExportOptions, Format
from remap.exporting.onnx_file import output_name
from remap.exporting.program import Program, example, input_in_words, outside, run_once
from remap.exporting.task_source import TaskSource

METADATA = "metadata.json"


class TorchProgram(Format):
    """``model.pt2``; its metadata is the extra file ``metadata.json`` inside."""

    file = "model.pt2"

    def write(self, source: TaskSource, folder: Path, options: ExportOptions) -> dict[str, Any]:
        folder.mkdir()
        spec, view = source.meta.preprocess, source.view
        facts = {"input": input_in_words(view, options), "output": output_name(options)}
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        images = example(spec, view, options)
        answers = run_once(Program(source.plain_model(), spec, view, options, source.meta.task), images)
        program = torch.export.export(answers, (images,), dynamic_shapes=sizes)
        # Through memory: where the disk is full, torch's writer of files aborts the process.
        packed = BytesIO()
        torch.export.save(program, packed, extra_files={METADATA: json.dumps(source.facts | facts)})
        (folder / self.file).write_bytes(packed.getbuffer())
        return facts

    def open(self, source: TaskSource, folder: Path, options: ExportOptions) -> Answer:
        run = torch.export.load(folder / self.file).module()

        @torch.no_grad()
        def answer(views_BCHW: Tensor) -> Tensor:
            return run(outside(source.meta.preprocess, options, views_BCHW))

        return answer

    def usage(self, source: TaskSource, options: ExportOptions) -> str:
        return snippets.torch_program(source, options, self.file)
