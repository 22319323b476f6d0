"""README.md of an export: what it is, how good, whose weights, and Python that uses it."""

import json
import re
from collections.abc import Sequence
from typing import Any

from remap.exporting import FormatEntry
from remap.exporting.task_source import UNKNOWN_LICENCE, TaskSource
from remap.io.names import plain

# The card's Python as a file.
SCRIPT = "classify.py"
# Class names shown in the card; all of them are in the metadata.
_SHOWN = 20


def model_card(source: TaskSource, row: FormatEntry, record: dict[str, Any], usage: str) -> str:
    """Return the card in Markdown, its head as the Hugging Face hub reads it."""
    licences = [record["licence_of_base_model"], *(one["licence"] for one in record["teachers"])]
    classes, accuracy, view = record["classes"], record["accuracy"], record["preprocessing"]
    shown = ", ".join(map(literal, classes[:_SHOWN])) + (", ..." if len(classes) > _SHOWN else "")
    height, width = view["size"]
    lines = [
        "---",
        f"license: {licences[0] if len(set(licences)) == 1 and licences[0] != UNKNOWN_LICENCE else 'other'}",
        "pipeline_tag: image-classification",
        f"library_name: {row.name if row.name in ('onnx', 'peft', 'timm') else 'remap'}",
        f"base_model: {json.dumps(plain(record['base_model']))}",
        "tags: [image-classification, remap, knowledge-distillation]",
        "---",
        "",
        f"# {literal(source.path.resolve().name)}: {len(classes)} classes, as {row.name}",
        "",
        f"{row.summary[0].upper()}{row.summary[1:]}. Written by remap {record['remap']}.",
        "",
    ]
    rows = [
        ("classes", shown),
        *([("task", "multilabel: any number of them, each by a sigmoid")] if record["task"] != "classes" else []),
        (record["metric"], "unknown" if accuracy is None else f"{accuracy:.2%} on images it was not trained on"),
        ("method", f"`{json.dumps(record['method'])}`"),
        (
            "base model",
            f"{literal(record['base_model'])}{_weights(record)}, licence: {record['licence_of_base_model']}",
        ),
        *(("teacher", f"{literal(one['model'])}, licence: {one['licence']}") for one in record["teachers"]),
        (
            "preprocessing",
            f"{view['crop_pct']:.1%} of the largest centred box of that shape, {height} x {width} pixels"
            f" ({view['interpolation']}), {view['channels']} channels; pixels / 255 have mean {view['mean']} and"
            f" standard deviation {view['std']}",
        ),
    ]
    if "input" in record:
        shape = " x ".join(map(str, record["input"]["shape"]))
        named = f"`{record['input']['name']}`: " if "name" in record["input"] else ""
        rows.append(("input", f"{named}{record['input']['type']}, {shape}"))
        rows.append(("output", f"{record['output']}, {record['input']['shape'][0]} x {len(classes)}"))
    if record.get("int8"):
        rows.append(("int8", f"`{json.dumps(record['int8'])}`"))
    if found := record["comparison"]:
        what = f"{found['same_labels']} of {found['count']} labels equal, difference {found['difference']:.1e}"
        rows.append(("checked against the student", f"{what}; {found['images']}"))
    if record["command"]:
        rows.append(("command", _code(record["command"])))
    lines += table(rows)
    lines += ["", "Licences of teacher and base model may bind what was made of them: read both before you ship.", ""]
    if usage:
        run = f"In this folder, `python {SCRIPT} PHOTO`; {SCRIPT} is"
        lines += ["## Classify a photograph", "", run, "", "```python"]
        lines += [usage.rstrip(), "```", ""]
    return "\n".join(lines)


def _weights(record: dict[str, Any]) -> str:
    """Return where the base model's weights are from, unless its name says it."""
    if record["base_weights"] == "pretrained":
        return ""
    if record["base_weights"] == "none":
        return ", from random weights"
    known = record["base_weights_sha256"]
    return f", weights of the file {record['base_weights']}" + (f" (SHA-256 {known})" if known else "")


def literal(text: str) -> str:
    """Return a name from anywhere as Markdown shows it: no markup, link or HTML begins in it."""
    return re.sub(r"([\\\\<\[`*])", r"\\\1", plain(text))


def _code(text: str) -> str:
    """Return text as code, between more backticks than it has in a row."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def table(rows: Sequence[tuple[str, ...]], heads: Sequence[str] = ("", "")) -> list[str]:
    """Return a Markdown table of texts from anywhere: a bar in a text would end its cell."""
    cells = [[plain(text).replace("|", r"\|") for text in row] for row in (heads, *rows)]
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return [first, "|---" * len(heads) + "|", *others]
