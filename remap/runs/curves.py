"""The metrics of a run as one small SVG, written without a plotting library."""

from html import escape
from math import inf
from typing import Any

from remap.io.names import plain
from remap.remapping.schedule import is_scheduled

WIDTH, HEIGHT, LEFT, TOP, GAP = 720, 260, 52, 34, 60


def curves(history: list[dict[str, Any]], title: str) -> str:
    """Draw two panels over the epochs: each loss (unweighted; "loss" is their weighted sum), and accuracy in %."""
    half = (WIDTH - GAP) // 2
    losses = {
        name: [(r["epoch"], r[name]) for r in history if name in r]
        for name in dict.fromkeys(name for record in history for name in record)
        if name not in ("epoch", "seconds", "accuracy") and not is_scheduled(name)
    }
    accuracy = {"accuracy, %": [(r["epoch"], 100 * r["accuracy"]) for r in history if "accuracy" in r]}
    last = history[-1]["epoch"]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
            ' font-size="11" fill="#333">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{LEFT}" y="16" font-size="13" font-weight="bold">{escape(plain(title))}</text>',
            *_panel(losses, 0, half, last, lowest=0.0),
            *_panel(accuracy, half + GAP, half, last),
            "</svg>\n",
        ]
    )


_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#b8860b", "#6a4c93", "#555555")


def _panel(series: dict[str, list[tuple[int, float]]], x: int, width: int, last: int, lowest: float = inf) -> list[str]:
    """Draw one panel; its axis begins at ``lowest`` or below."""
    values = [value for points in series.values() for _, value in points]
    if not values:  # no epoch was evaluated yet
        return []
    low, high = min(lowest, *values), max(values)
    high = high if high > low else low + 1.0
    left, right, top, bottom = x + LEFT, x + width - 14, TOP + 14, HEIGHT - 30

    def place(epoch: int, value: float) -> str:
        across = left + (right - left) * (epoch - 1) / max(1, last - 1)
        return f"{across:.1f},{bottom - (bottom - top) * (value - low) / (high - low):.1f}"

    lines = [
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#999"/>',
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{left}" y="{bottom + 16}">epoch 1</text>',
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{last}</text>',
    ]
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(place(*point) for point in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        lines.append(
            f'<circle cx="{place(*points[-1]).replace(",", chr(34) + " cy=" + chr(34))}" r="2.4" fill="{colour}"/>'
        )
        lines.append(f'<text x="{left + 8 + 78 * number}" y="{top - 2}" fill="{colour}">{escape(plain(name))}</text>')
    return lines
