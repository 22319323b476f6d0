"""One self-contained page: the template filled in, and the figures beside it as PNG."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from remap import __version__
from remap.errors import RunError
from remap.io import atomic_write
from remap.io.checked_read import read_regular
from remap.io.names import plain
from remap.report.figures import Drawing
from remap.runs.answers import PICTURES
from remap.runs.interval import limits

NAME = "report.html"
# Far above what a picture of a report takes.
_MOST_PICTURE_BYTES = 2**20


def write_page(folder: Path, template: str, figures: Sequence[Drawing], *, pngs: bool, **values: Any) -> Path:
    """Write ``report.html`` in a folder, and each figure as ``report/NAME.png`` where ``pngs``; return the page.

    Raises:
        DiskFull: There is no room.
        RunError: It cannot be written.
    """
    # Autoescape: names of classes, files and runs are text, whatever they hold.
    environment = Environment(
        loader=PackageLoader("remap.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "limits": limits, "count": count, "plain": plain}
    drawn: dict[str, Markup] = {figure.name: Markup(figure.svg()) for figure in figures}
    text = environment.get_template(template).render(
        **values, pngs=pngs, figures=drawn, alts={figure.name: figure.alt for figure in figures}, version=__version__
    )
    if pngs:
        atomic_write.make_folder(folder / PICTURES)
        for figure in figures:
            atomic_write.write_bytes(folder / PICTURES / f"{figure.name}.png", figure.png())
    atomic_write.write_text(folder / NAME, text)
    return folder / NAME


def picture(run: Path, name: str) -> str | None:
    """Return a picture of a run as a data URI; None where it cannot be read."""
    try:
        data = read_regular(run / PICTURES / name, _MOST_PICTURE_BYTES)
    except (OSError, RunError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data[:2] == b"\xff\xd8" else None


def percent(share: float | None, digits: int = 1) -> str:
    """Return 0.944 as "94.4%"; a dash for None."""
    return "–" if share is None else f"{share:.{digits}%}"


def count(number: int) -> str:
    """Return 38,400 as it is and 21,665,664 as 21.7 M."""
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:.1f} M"


def rows_of(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of a list of facts, without those that are None."""
    return [(name, plain(str(value), keep="\u00a0")) for name, value in values.items() if value is not None]
