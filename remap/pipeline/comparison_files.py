"""The table of a comparison as compare.csv, compare.md and compare.tex, beside compare.json."""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from remap.io import atomic_write
from remap.io.human_size import number_of, part, size
from remap.io.names import plain

RECORD = "compare.json"
_UNCLEAR = "not distinguishable"


def write_tables(table: dict[str, Any], folder: Path) -> None:
    """Write compare.json, compare.csv, compare.md and compare.tex into the folder of a comparison."""
    atomic_write.write_json(folder / RECORD, table)
    atomic_write.write_text(folder / "compare.csv", _csv(table["rows"]))
    atomic_write.write_text(folder / "compare.md", _markdown(table))
    atomic_write.write_text(folder / "compare.tex", _latex(table))


def percent(found: dict[str, Any]) -> str:
    """Return mean and spread over seeds in %, "97.8 ± 0.4"."""
    spread = "" if found["spread"] is None else f" ± {100 * found['spread']:.1f}"
    return f"{100 * found['mean']:.1f}{spread}"


def epochs_in_words(table: dict[str, Any]) -> str:
    """Return the epochs of a comparison, "12 epochs", and those by labels alone where they are others."""
    taught, alone = table["epochs"], table.get("epochs_alone", table["epochs"])  # earlier versions have the first alone

    def words(epochs: int | str) -> str:
        return f"{epochs} epoch{'' if epochs == 1 else 's'}"

    return words(taught) if alone == taught else f"{words(taught)} with the teacher, {words(alone)} by labels only"


def interval(found: dict[str, Any] | None, unclear: str = _UNCLEAR) -> str:
    """Return a difference in points with its 95% interval, and whether that leaves 0 out."""
    if found is None:
        return "-"
    text = f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return text if found["distinguishable"] else f"{text} {unclear}"


def _csv(rows: list[dict[str, Any]]) -> str:
    """Return one line a row, shares as numbers from 0 to 1."""
    file = io.StringIO()
    lines = [_flat(row) for row in rows]
    # Rows differ in their keys, swept options among them: the header holds the keys of all.
    writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            line |= {f"{key}_{name}": one for name, one in _flat(value).items()}
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else value
            # Names come from files and folders, and may hold control characters.
            line[key] = plain(text) if isinstance(text, str) else text
    return line


_COLUMNS = (
    *("method", "trained", "labels only", "with teacher", "teacher's gain", "to full tuning"),
    *("saved", "ms a step", "peak memory", "MFLOPs", "PPT"),
)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['name']}{' *' if row['pareto'] else ''}",
        f"{row['trainable_parameters']:,} ({part(row['trainable_parameters'], row['total_parameters'])})",
        percent(row["alone"]),
        percent(row["teacher"]),
        interval(row["difference"]["to_alone"]),
        interval(row["difference"]["to_full"]),
        size(row["task_bytes"]),
        f"{1000 * row['step_seconds']:.1f}",
        size(row["peak_memory_bytes"]),
        "-" if row["flops"] is None else f"{row['flops'] / 1e6:,.1f}",
        f"{row['ppt']:.3f}",
    ]


def _notes(table: dict[str, Any]) -> list[str]:
    """Return what a reader has to know of the figures."""
    seeds, teacher = number_of(len(table["seeds"]), "seed"), table["teacher"]
    known = "" if teacher["accuracy"] is None else f", {table['metric']} {teacher['accuracy']:.1%}"
    notes = [
        f"{table['student']} on {table['data']}: {table['metric']} in % on {table['images']} evaluation images,"
        f" {seeds} (mean, standard deviation), {epochs_in_words(table)}."
        f" Teacher: {teacher['model']}{known}.",
        "Differences are in points, with the teacher less labels alone, and with the teacher less full tuning on labels"
        f" alone; 95% intervals over the same images and seeds, {_UNCLEAR} where 0 is inside."
        f" A star is on the Pareto front of trained parameters and {table['metric']} with the teacher.",
    ]
    together = [pair for pair in table["pairs"] if "ensemble_gain" in pair]  # not of mAP
    pairs = sorted(together, key=lambda pair: -pair["ensemble_gain"])[:3]
    if pairs:
        best = "; ".join(
            f"{' and '.join(pair['methods'])} {100 * pair['ensemble_gain']:+.1f} points"
            f" (same answer on {pair['agreement']:.1%})"
            for pair in pairs
        )
        notes.append(f"Taking the surer answer of two methods gains over the better one at most: {best}.")
    return [*notes, *(f"Left out: {why}." for why in table.get("left_out", {}).values())]


def _by_category(table: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    # ``groupby`` joins neighbours alone: ``tabulate`` sorts the rows by category.
    for category, rows in groupby(table["rows"], key=lambda row: row["category"]):
        yield category, [_cells(row) for row in rows]


def _markdown(table: dict[str, Any]) -> str:
    def line(cells: Sequence[str]) -> str:
        # chr(92) is a backslash, which Python 3.11 does not allow between the braces of an f-string.
        return f"| {' | '.join(plain(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    empty = [""] * (len(_COLUMNS) - 1)
    lines = [line(_COLUMNS), f"|---|{'---:|' * len(empty)}"]
    for category, rows in _by_category(table):
        lines += [line([f"**{category}**", *empty]), *map(line, rows)]
    return "\n\n".join([*map(plain, _notes(table)), "\n".join(lines)]) + "\n"


_ESCAPES = {char: f"\\{char}" for char in "&%$#_{}"}
# The braces end the command, which would swallow the space behind it.
_ESCAPES |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}


def _latex(table: dict[str, Any]) -> str:
    """Return a table for the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        # One pass over the characters, so that the backslash of an escape is not escaped again.
        return " & ".join("".join(_ESCAPES.get(char, char) for char in plain(cell)) for cell in cells) + " \\\\"

    lines = [f"% {plain(note)}" for note in _notes(table)]
    lines += [f"\\begin{{tabular}}{{l{'r' * (len(_COLUMNS) - 1)}}}", "\\toprule", line(_COLUMNS)]
    for category, rows in _by_category(table):
        lines += ["\\midrule", line([category]), *map(line, rows)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"
