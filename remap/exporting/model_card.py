"""README.md of an export: what it is, how good, whose weights, and Python that uses it."""

import json
from typing import Any

from remap.exporting import FormatEntry
from remap.exporting.task_source import UNKNOWN_LICENCE, TaskSource
from remap.io.names import plain

# Class names shown in the card; all of them are in the metadata.
_SHOWN = 20


def model_card(source: TaskSource, row: FormatEntry, record: dict[str, Any], usage: str) -> str:
    """Return the card in Markdown, its head as the Hugging Face hub reads it."""
    licences = [record["licence_of_base_model"], *(one["licence"] for one in record["teachers"])]
    classes, accuracy, view = record["classes"], record["accuracy"], record["preprocessing"]
    shown = ", ".join(map(plain, classes[:_SHOWN])) + (", ..." if len(classes) > _SHOWN else "")
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
        f"# {plain(source.path.name)}: {len(classes)} classes, as {row.name}",
        "",
        f"{row.summary[0].upper()}{row.summary[1:]}. Written by remap {record['remap']}.",
        "",
        "| | |",
        "|---|---|",
        f"| classes | {shown} |",
        f"| accuracy | {'unknown' if accuracy is None else f'{accuracy:.2%} on images it was not trained on'} |",
        f"| method | `{plain(json.dumps(record['method']))}` |",
        f"| base model | {plain(record['base_model'])}, licence: {record['licence_of_base_model']} |",
        *(f"| teacher | {plain(one['model'])}, licence: {one['licence']} |" for one in record["teachers"]),
        f"| preprocessing | {view['crop_pct']:.1%} of the largest centred box of that shape, {height} x {width} pixels"
        f" ({view['interpolation']}), {view['channels']} channels; pixels / 255 have mean {view['mean']} and standard"
        f" deviation {view['std']} |",
    ]
    if "input" in record:
        shape = " x ".join(map(str, record["input"]["shape"]))
        lines.append(f"| input | `images`: {record['input']['type']}, {shape} |")
        lines.append(f"| output | {record['output']}, B x {len(classes)} |")
    if record.get("int8"):
        lines.append(f"| int8 | `{json.dumps(record['int8'])}` |")
    if found := record["comparison"]:
        what = f"{found['same_labels']} of {found['count']} labels equal, difference {found['difference']:.1e}"
        lines.append(f"| checked against the student | {what}; {found['images']} |")
    if record["command"]:
        lines.append(f"| command | `{plain(record['command'])}` |")
    lines += ["", "Licences of teacher and base model may bind what was made of them: read both before you ship.", ""]
    if usage:
        save = "Save this as `classify.py` in this folder, then run `python classify.py PHOTO`."
        lines += ["## Classify a photograph", "", save, "", "```python"]
        lines += [usage.rstrip(), "```", ""]
    return "\n".join(lines)
