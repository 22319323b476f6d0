"""A page that shows a data set: its findings, and some images of every class. One HTML file, nothing is loaded."""

import base64
import io
from html import escape
from pathlib import Path

from remap.data.images import BadImage
from remap.data.splits import ImageData
from remap.inspection.data_check import Range, Report, decoded, sample_indices
from remap.io import atomic_write
from remap.io.names import plain

EACH, SIDE = 8, 96
_STYLE = """body{font:15px system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}
.bad{border-left:4px solid #c33}.note{border-left:4px solid #cc9}.finding{padding:.2em 1em;margin:1em 0}
img{margin:2px;border-radius:3px}li,td{overflow-wrap:anywhere}"""


def write_contact_sheet(path: Path, report: Report, data: ImageData) -> None:
    """Write the page.

    Raises:
        RunError: It cannot be written.
    """
    parts = [f"<!doctype html><meta charset=utf-8><title>{_text(report.source)}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{_text(report.source)}</h1><p>{_text(report.split_rule)}</p>")
    splits = list(report.counts)
    parts.append(f"<table><tr><th>class{''.join(f'<th>{_text(split)}' for split in splits)}")
    for name in data.classes:
        cells = "".join(f"<td>{report.counts[split][name]:,}" for split in splits)
        parts.append(f"<tr><td>{_text(name)}{cells}")
    sizes = "; ".join(f"{word} {width} x {height}" for word, (width, height) in report.sizes.items())
    parts.append(f"</table><p>Pixels: {_text(sizes)}</p><h2>Findings</h2>")
    for finding in report.findings:
        names = "".join(f"<li>{_text(name)}" for name in finding.files)
        head = f"<b>{_text(finding.what)}</b><br>{_text(finding.do)}"
        files = f"<details><summary>files</summary><ul>{names}</ul></details>"
        parts.append(f"<div class='finding {finding.severity}'>{head}{files}</div>")
    if not report.findings:
        parts.append("<p>Nothing odd was found.</p>")
    for label, indices in sample_indices(data.train, len(data.classes), EACH).items():
        pictures = "".join(_picture(data, index, report.value_range) for index in indices)
        parts.append(f"<h3>{_text(data.classes[label])}</h3>{pictures}")
    atomic_write.make_folder(path.parent)
    atomic_write.write_text(path, "\n".join(parts) + "\n")


def _text(text: str) -> str:
    return escape(plain(text))


def _picture(data: ImageData, index: int, value_range: Range) -> str:
    try:
        image = decoded(data.train.read(index), value_range)[0]
    except (BadImage, OSError):
        return ""
    scale = SIDE / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)  # ImageOps.contain makes slivers 0 high
    image = image.resize((width, height))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    name, content = _text(data.train.names[index]), base64.b64encode(encoded.getvalue()).decode()
    return f'<img alt="{name}" title="{name}" src="data:image/jpeg;base64,{content}">'
