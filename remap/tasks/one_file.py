"""``remap tasks export``: the tasks of a shelf in one ONNX file, an output for each, what they share in it once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remap import __version__
from remap.backbones.typed import as_timm
from remap.data import ACTIVATION, CLASSES, MULTILABEL
from remap.errors import RunError
from remap.exporting import FORMATS, snippets
from remap.exporting.check import Comparison, bytes_of, compare, require_equal
from remap.exporting.export import CARD, RECORD, making
from remap.exporting.format import ExportOptions, Format
from remap.exporting.model_card import SCRIPT, literal, table
from remap.exporting.onnx_file import answer_of, save_graph, traced
from remap.exporting.program import Program, example, input_in_words
from remap.exporting.task_source import DRAWN, SourceImages, licence_of_base_model, preprocessing_facts
from remap.io import atomic_write
from remap.io.human_size import number_of
from remap.io.paths import expanded
from remap.pipeline.student_api import Student
from remap.progress import Progress, Silent
from remap.runs.task_file import read_meta
from remap.tasks.shelf import Shelf

FILE = "tasks.onnx"
# Of ``ExportOptions``: what one graph can do for all tasks at once.
OPTIONS = ("input", "layout")
# A task that tunes more of the backbone than this brings most of a second backbone into the file.
MOST_OWN = 0.5


class _EveryTask(nn.Module):
    """Pixels to the logits of each task."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(pixels) for model in self.models)


def export_tasks(
    shelf: str | Path,
    output: str | Path,
    *,
    tasks: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Comparison]:
    """Export tasks of a shelf as one ONNX file, and check that each answers as it does alone.

    Weights and computations that tasks have in common are in the graph once: all of the backbone for tasks that train
    a classifier, up to the first block that a method changes for others. onnxruntime can run one output alone.

    Args:
        tasks: Their names; none for all.
        options: ``input`` and ``layout`` of ``ExportOptions``.

    Returns:
        What the check found, by task.

    Raises:
        RemapError: A task takes other images than the first, or tunes most of the backbone, a package is missing, or
            options are of one network's file only.
    """
    if others := [name for name in options if name not in OPTIONS]:
        what = "one file of many tasks does not take every option of an export"
        raise RunError(what, given=", ".join(others), allowed=OPTIONS, do="export the task by itself: remap export RUN")
    chosen, progress = ExportOptions(**options), progress or Silent()
    row = FORMATS.row("onnx")
    chosen.require_fit(row)
    form: Format = row.load()(row)
    form.require_packages()
    opened = Shelf(shelf)
    multi = opened.open("cpu")
    students = {name: multi.student(name) for name in tasks or multi.students}
    first = next(iter(students.values()))
    _require_one_graph(students, multi.backbone_parameters)
    spec, view = first.network.preprocess, first.view
    metas = {name: read_meta(opened.folder(name)) for name in students}
    pretrained_cfg = as_timm(first.network.model).pretrained_cfg
    facts = {
        "tasks": list(students),
        "classes": {name: list(student.classes) for name, student in students.items()},
        "activation": {name: ACTIVATION[student.network.task] for name, student in students.items()},
        "preprocessing": preprocessing_facts(spec, view),
        "input": input_in_words(view, chosen),
        "methods": {name: {"name": meta.method.name, **meta.method.options} for name, meta in metas.items()},
        "base_model": first.network.identity.model,
        "licence_of_base_model": licence_of_base_model(next(iter(metas.values())), pretrained_cfg),
        "remap": __version__,
    }
    with making(expanded(output), force) as folder:
        with progress.wait(f"writing {number_of(len(students), 'task')} as one graph"):
            folder.mkdir()
            program = Program(_EveryTask([one.model for one in students.values()]), spec, view, chosen)
            graph = traced(program, example(spec, view, chosen), list(students))
            _share(graph)
            save_graph(graph, folder / FILE, facts)
        size = (folder / FILE).stat().st_size
        draws = torch.Generator().manual_seed(0)
        views = torch.randint(0, 256, (DRAWN, *view.shape), generator=draws, dtype=torch.uint8)
        images, found = SourceImages(views, None, f"{DRAWN} random images"), {}
        for name, student in students.items():
            answer = answer_of(spec, folder / FILE, chosen, name)
            cut, sizes = 0.0 if student.network.task == MULTILABEL else None, (bytes_of(student.model), size)
            found[name] = compare(student.logits_of_views, answer, images, sizes, cut)
            require_equal(found[name], f"onnx (task {name})")
        usage = snippets.many_tasks(view, chosen, FILE)
        atomic_write.write_text(folder / SCRIPT, usage)
        atomic_write.write_text(folder / CARD, _card(facts, found, usage))
        record = facts | {"format": "onnx", "files": [CARD, SCRIPT, RECORD, FILE]}
        record["comparison"] = {name: one.to_dict() for name, one in found.items()}
        atomic_write.write_json(folder / RECORD, record)
    return found


def _require_one_graph(students: Mapping[str, Student], backbone: int) -> None:
    """Refuse tasks that would have little in common in one graph."""
    if "images" in students:
        raise RunError('a task cannot be called "images" in one graph: so is its input', do="add it by another name")
    first, *_ = students
    for name, student in students.items():
        other = students[first]
        if (student.view, student.network.preprocess) != (other.view, other.network.preprocess):
            what = f"{name} takes other images than {first}, and one graph has one input"
            shown = "; ".join(f"{one.view.to_dict()}, network {one.network.preprocess}" for one in (other, student))
            raise RunError(what, given=shown, do="name the tasks that fit each other with --task")
        anatomy = student.network.anatomy
        own = sum(p.numel() for key, p in student.network.trained.items() if not anatomy.is_head(key))
        if own > MOST_OWN * backbone:
            raise RunError(
                f"{name} tunes most of the backbone itself, so the file would hold most of it once more",
                given=f"{own:,} weights of its own, {backbone:,} of the backbone",
                do=f"export {name} alone: remap export RUN --to onnx; name the other tasks with --task",
            )


def _share(graph: torch.onnx.ONNXProgram) -> None:
    """Let equal weights and equal computations be one."""
    from onnx_ir.passes import common  # of onnxscript, an extra

    common.DeduplicateInitializersPass(size_limit=2**31)(graph.model)  # of any size that a file holds
    common.CommonSubexpressionEliminationPass()(graph.model)
    common.RemoveUnusedNodesPass()(graph.model)


def _card(facts: dict[str, Any], found: Mapping[str, Comparison], usage: str) -> str:
    shape = " x ".join(map(str, facts["input"]["shape"]))
    rows = [
        ("base model", f"{literal(facts['base_model'])}, licence: {facts['licence_of_base_model']}"),
        ("input", f"`images`: {facts['input']['type']}, {shape}"),
        ("outputs", "one a task, by its name"),
    ]
    tasks = []
    for name, classes in facts["classes"].items():
        one, several = found[name], facts["activation"][name] != ACTIVATION[CLASSES]
        shown = ", ".join(map(literal, classes)) + (" (any number of them)" if several else "")
        checked = f"{one.same_labels} of {one.count} labels equal, difference {one.difference:.1e}; {one.images}"
        tasks.append((literal(name), shown, f"`{json.dumps(facts['methods'][name])}`", checked))
    return "\n".join(
        [
            f"# {number_of(len(tasks), 'task')} on one backbone",
            "",
            f"Written by remap {facts['remap']}.",
            "",
            *table(rows),
            "",
            *table(tasks, ("task", "classes", "method", "checked against the task alone")),
            "",
            "Licences of the base model and of the teachers of these tasks may bind what was made of them: read them"
            " before you ship. What the teachers were is in the runs that the tasks are from.",
            "",
            f"In this folder, `python {SCRIPT} PHOTO TASK`; {SCRIPT} is",
            "",
            "```python",
            usage.rstrip(),
            "```",
            "",
        ]
    )
