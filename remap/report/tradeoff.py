"""The figure of a comparison: accuracy against trained parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from remap.io.names import plain
from remap.report.figures import COLOURS, SERIES, WIDTH, Drawing

# Left, bottom, right and top, in points.
_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A method of a comparison: trained parameters, mean accuracy in % and its spread, with or without the teacher.

    Attributes:
        on_front: Whether no other method is as accurate with as few trained parameters.
    """

    name: str
    group: str
    parameters: int
    mean: float
    spread: float | None
    filled: bool
    on_front: bool = False


def tradeoff(name: str, points: Sequence[Point], lines: Mapping[str, float], metric: str) -> Drawing:
    """Draw a metric against trained parameters; colour is the category, filled is with the teacher."""
    groups = list(dict.fromkeys(point.group for point in points))

    def paint(axes: Axes) -> None:
        for number, (label, value) in enumerate(lines.items()):
            style = ((0, (1, 1.5)), (0, (4, 2)), (0, (6, 2, 1, 2)), "-")[number % 4]
            axes.axhline(
                value, color=COLOURS["muted"], linewidth=1, linestyle=style, label=f"{plain(label)} {value:.1f}"
            )
        front = sorted((point.parameters, point.mean) for point in points if point.on_front)
        if front:
            axes.step(*zip(*front, strict=True), where="post", color=COLOURS["muted"], alpha=0.6, zorder=1)
        for point in points:
            colour = COLOURS[SERIES[groups.index(point.group) % 6]]
            fill = colour if point.filled else COLOURS["surface"]
            axes.errorbar(
                point.parameters,
                point.mean,
                yerr=point.spread,
                fmt="o",
                color=colour,
                mfc=fill,
                ms=7,
                capsize=3,
                zorder=3,
            )
        for group in groups:
            axes.plot([], [], "o", color=COLOURS[SERIES[groups.index(group) % 6]], label=plain(group))
        axes.plot([], [], "o", color=COLOURS["ink"], mfc=COLOURS["surface"], label="labels only (hollow)")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.14, y=0.12)
        axes.set_xlabel("trained parameters")
        axes.set_ylabel(f"{metric}, %")
        _label(axes, points)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=9.5)

    below = 0.75 + 0.21 * ceil((len(lines) + len(groups) + 1) / 2)
    size, margins = (WIDTH, 3.2 + below), (0.74, below, 0.1, 0.1)
    return Drawing(name, f"{metric} against trained parameters", paint, size, margins)


def _thousands(value: float) -> str:
    """Return 10,000 as "10 k"."""
    unit, word = next((one for one in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if value >= one[0]), (1, ""))
    return f"{value / unit:g}{word}"


# Where the name of a dot may stand, in points from its centre, the best first: across, up, and how it is aligned.
_SIDES = (
    *((9, 0, "left"), (-9, 0, "right"), (0, 12, "center"), (0, -12, "center")),
    *((8, 10, "left"), (8, -10, "left"), (-8, 10, "right"), (-8, -10, "right"), (0, 24, "center"), (0, -24, "center")),
)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Write the names of the filled dots where they cover the fewest dots, error bars and other names."""
    axes.autoscale_view()

    def at(point: Point, height: float) -> tuple[float, float]:
        x, y = axes.transData.transform((point.parameters, height)) * 72 / axes.figure.dpi
        return float(x), float(y)

    taken: list[_Box] = []
    for point in points:
        (x, low), (_, high) = (at(point, point.mean + sign * (point.spread or 0.0)) for sign in (-1, 1))
        taken.append((x - 4, low - 4, x + 4, high + 4))
    edges = np.asarray(axes.bbox.extents) * 72 / axes.figure.dpi
    for point in sorted((one for one in points if one.filled), key=lambda one: one.mean):
        x, y = at(point, point.mean)
        width = 5.2 * len(point.name)
        options: list[tuple[int, int, _Box]] = []
        for across, up, align in _SIDES:
            left = x + across - {"left": 0.0, "center": width / 2, "right": width}[align]
            box = (left, y + up - 5, left + width, y + up + 5)
            outside = box[0] < edges[0] or box[2] > edges[2] or box[1] < edges[1] or box[3] > edges[3]
            options.append((sum(_overlap(box, other) for other in taken) + 3 * outside, len(options), box))
        _, chosen, box = min(options)
        taken.append(box)
        across, up, align = _SIDES[chosen]
        text: dict[str, Any] = {"ha": align, "va": "center", "fontsize": 9, "textcoords": "offset points"}
        axes.annotate(plain(point.name), (point.parameters, point.mean), (across, up), **text)


def _overlap(first: _Box, second: _Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
