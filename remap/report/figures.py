"""Figures of a report, each as SVG for the page and as PNG beside it."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from remap.io.names import plain

# Of the light page and the PNG; in the SVG each becomes a variable of the page, which knows light and dark.
COLOURS = {
    "ink": "#1c2430",
    "muted": "#66707d",
    "line": "#dfe3e8",
    "surface": "#fefefe",
    "c1": "#2563ab",
    "c2": "#d1603d",
    "c3": "#3a8159",
    "c4": "#a8761a",
    "c5": "#7a54a3",
    "c6": "#5d6b78",
}
SERIES = tuple(name for name in COLOURS if name.startswith("c"))
WIDTH, HEIGHT = 4.6, 3.1  # inches; the page shows 72 units an inch
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "figure.facecolor": COLOURS["surface"],
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Drawing:
    """A figure: its name, what it shows in words, what draws it on a pair of axes, its size and margins in inches.

    Attributes:
        margins: Left, bottom, right, top. Fixed, since to measure texts takes longer than to draw them.
    """

    name: str
    alt: str
    paint: Callable[[Axes], None]
    size: tuple[float, float] = (WIDTH, HEIGHT)
    margins: tuple[float, float, float, float] = (0.62, 0.5, 0.1, 0.12)

    def svg(self) -> str:
        """Return what stands in the page: text as text, with the colours and fonts of the page."""
        return _inline(self._saved("svg", transparent=True, metadata={"Date": None}).decode(), self.name)

    def png(self) -> bytes:
        return self._saved("png", dpi=200)

    def _saved(self, kind: str, **options: Any) -> bytes:
        style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": self.name}
        with rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that the font of the PNG lacks; the page has its reader's fonts
            (width, height), (left, bottom, right, top) = self.size, self.margins
            box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
            figure, file = Figure(figsize=self.size), io.BytesIO()
            FigureCanvasAgg(figure)
            self.paint(figure.add_axes(box))
            figure.savefig(file, format=kind, **options)
        return file.getvalue()


def _inline(svg: str, name: str) -> str:
    """Return what stands in the page: no prologue, no names that two figures share, colours and fonts of the page."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<g|<svg) id="[^"]*"', r"\1", svg)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = re.sub(r"(font: [^'\"]*?)'[^\"]*?sans-serif", r"\1system-ui, sans-serif", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def curve(name: str, title: str, lines: Mapping[str, Sequence[tuple[int, float]]], percent: bool = False) -> Drawing:
    """Draw numbers by epoch; the second line, of the evaluation images, is dashed."""

    def paint(axes: Axes) -> None:
        for number, (label, points) in enumerate(lines.items()):
            epochs, values = zip(*points, strict=True)
            few: dict[str, Any] = {"marker": "o", "markersize": 4} if len(points) < 30 else {}
            colour, style = COLOURS[SERIES[number]], "--" if number else "-"
            axes.plot(epochs, values, style, color=colour, label=plain(label), linewidth=1.8, **few)
        axes.set_title(plain(title))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.margins(y=0.12)
        most = max(value for points in lines.values() for _, value in points)
        if not percent and most > 0 and all(value >= 0 for points in lines.values() for _, value in points):
            axes.set_ylim(0, 1.12 * most)
        if len(lines) > 1:
            axes.legend()

    return Drawing(name, f"{title} by epoch", paint, (WIDTH, 2.7), (0.55, 0.48, 0.1, 0.3))


def confusion(name: str, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Drawing:
    """Draw a confusion matrix: shares of each row by depth of colour, counts as numbers."""
    names, size = [_short(one) for one in classes], len(classes)

    def paint(axes: Axes) -> None:
        axes.grid(visible=False)
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                share = count / max(1, sum(line))
                colour = COLOURS["c1" if row == column else "c2"]
                axes.add_patch(
                    Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, color=colour, alpha=share, linewidth=0)
                )
                if count:
                    ink = COLOURS["surface" if share > 0.55 else "ink"]
                    axes.text(
                        column, row, str(count), ha="center", va="center", color=ink, fontsize=10 if size < 13 else 7
                    )
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.set_xticks(range(size), names, rotation=45 if size < 5 else 90, fontsize=9 if size < 13 else 8)
        axes.set_yticks(range(size), names, fontsize=9 if size < 13 else 8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("the student's answer")
        axes.set_ylabel("label")

    room = 0.35 + 0.085 * max(map(len, names))
    return Drawing(name, "confusion matrix", paint, (WIDTH + 0.4, WIDTH + 0.4), (room + 0.1, room + 0.1, 0.05, 0.05))


def _short(name: str, length: int = 16) -> str:
    name = plain(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def reliability(name: str, bins: Sequence[tuple[float, float, int]]) -> Drawing:
    """Draw the share that is right by confidence; ``bins`` are (mean confidence, share, images), none of them empty."""
    most = max(images for _, _, images in bins)

    def paint(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=COLOURS["muted"], linewidth=1, linestyle=":", label="as sure as right")
        for confidence, share, images in bins:
            x, y = 100 * confidence, 100 * share
            axes.plot([x, x], [x, y], color=COLOURS["c2"], linewidth=1.2, alpha=0.7)
            axes.scatter([x], [y], s=18 + 130 * images / most, color=COLOURS["c1"], zorder=3)
        axes.set_xlim(0, 103)
        axes.set_ylim(-3, 105)
        axes.set_xlabel("confidence of the answer, %")
        axes.set_ylabel("right, %")
        # Above the axes: inside, few right answers of low confidence leave no corner free.
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), borderaxespad=0)

    margins = (0.62, 0.5, 0.1, 0.36)
    return Drawing(name, "share of right answers by confidence", paint, (WIDTH, HEIGHT + 0.24), margins)


def blocks(name: str, pairs: Mapping[str, Sequence[tuple[int, int]]], student: int, teacher: int) -> Drawing:
    """Draw which teacher block taught which student block; blocks are counted from 0."""

    def paint(axes: Axes) -> None:
        for number, (loss, chosen) in enumerate(pairs.items()):
            for index, (ours, theirs) in enumerate(chosen):
                places = (theirs + 0.5) / (teacher + 1), (ours + 0.5) / (student + 1)
                label = plain(loss) if not index else None
                axes.plot(places, (1, 0), color=COLOURS[SERIES[number % 6]], linewidth=2, alpha=0.85, label=label)
        for height, depth, who in ((1, teacher, "teacher"), (0, student, "student")):
            step = ceil(depth / 12)
            for block in range(depth + 1):
                x = (block + 0.5) / (depth + 1)
                axes.scatter([x], [height], s=60, color=COLOURS["surface"], edgecolor=COLOURS["muted"], zorder=3)
                if block == depth or block % step == 0:
                    text = "norm" if block == depth else str(block)
                    axes.text(x, height + (0.14 if height else -0.14), text, ha="center", va="center", fontsize=9)
            axes.text(-0.02, height, who, ha="right", va="center", color=COLOURS["muted"])
        axes.set_xlim(-0.16, 1)
        axes.set_ylim(-0.3, 1.3)
        axes.axis("off")
        axes.legend(loc="upper center", bbox_to_anchor=(0.55, -0.02), ncols=3)

    size, margins = (WIDTH * 1.2, 2.3), (0.05, 0.3, 0.05, 0.05)
    return Drawing(name, "which teacher block taught which student block", paint, size, margins)
