"""The report of a comparison, from its compare.json."""

from itertools import groupby
from pathlib import Path
from typing import Any

from remap.errors import RunError
from remap.io.checked_json import read_run_json
from remap.io.human_size import number_of, part, size
from remap.io.names import plain
from remap.recipe.in_words import losses_in_words
from remap.recipe.schema import LossSpec
from remap.report.page import count, percent, rows_of, write_page
from remap.report.tradeoff import Point, tradeoff
from remap.runs.summary_schema import metric_of

RECORD = "compare.json"


def report_comparison(folder: Path, *, pngs: bool = True) -> Path:
    """Write ``report.html`` into the folder of a comparison, and its figure as PNG into ``report/``; return the page.

    Raises:
        RunError: compare.json is missing or damaged.
    """
    table = read_run_json(folder / RECORD)
    try:
        return _write(folder, table, pngs)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise RunError(
            f"cannot read {folder / RECORD}: it lacks what a comparison has ({type(error).__name__}: {error})",
            do="run `remap compare` again with that --output; finished runs are not run again",
        ) from error


def _write(folder: Path, table: dict[str, Any], pngs: bool) -> Path:
    metric = metric_of(table)
    rows, several = table["rows"], len(table["seeds"]) if len(table["seeds"]) > 1 else 0
    points = [
        Point(
            row["name"], row["category"], row["trainable_parameters"], 100 * row[key]["mean"],
            None if row[key]["spread"] is None else 100 * row[key]["spread"], key == "teacher",
            key == "teacher" and row["pareto"],
        )
        for row in rows
        for key in ("alone", "teacher")
    ]  # fmt: skip
    by_name = {row["method"]: row for row in reversed(rows)}  # of swept ones the first
    lines = {
        f"{name}, labels only": 100 * by_name[name]["alone"]["mean"] for name in ("full", "linear") if name in by_name
    }
    if table["teacher"]["accuracy"] is not None:
        lines["teacher"] = 100 * table["teacher"]["accuracy"]
    best = {key: max(row[key]["mean"] for row in rows) for key in ("alone", "teacher")}
    shown = [
        {
            "category": row["category"],
            "method": row["name"],
            "pareto": row["pareto"],
            "parameters": row["trainable_parameters"],
            "share": part(row["trainable_parameters"], row["total_parameters"]),
            "alone": _cell(row["alone"]),
            "teacher": _cell(row["teacher"]),
            "best_alone": row["alone"]["mean"] == best["alone"],
            "best_teacher": row["teacher"]["mean"] == best["teacher"],
            "gain": _difference(row["difference"]["to_alone"], row["gain"]),
            "to_full": _difference(row["difference"]["to_full"], None),
            "seconds": f"{row['teacher']['seconds']:.0f} s",
            "size": size(row["task_bytes"]),
        }
        for row in rows
    ]
    return write_page(
        folder,
        "compare.html.j2",
        [tradeoff("tradeoff", points, lines, metric)],
        pngs=pngs,
        title=plain(folder.resolve().name),
        answer=_answer(table),
        several=several,
        metric={"accuracy": "Accuracy"}.get(metric, metric),
        gains=_gains(rows),
        groups=[(name, list(members)) for name, members in groupby(shown, key=lambda row: row["category"])],
        facts=_facts(table),
    )


def _gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    most = max(abs(row["gain"]) for row in rows) or 1.0
    ordered = sorted(rows, key=lambda row: -row["gain"])
    return [
        {
            "method": row["name"],
            "points": row["gain"],
            "width": round(48 * abs(row["gain"]) / most, 2),
            "text": f"{100 * row['gain']:+.1f}",
        }
        for row in ordered
    ]


def _cell(found: dict[str, Any]) -> str:
    return f"{100 * found['mean']:.1f}" + ("" if found["spread"] is None else f" ± {100 * found['spread']:.1f}")


def _answer(table: dict[str, Any]) -> str:
    """Return what to choose, in one paragraph; a difference within the spread over seeds is called that."""
    rows, metric = sorted(table["rows"], key=lambda row: -row["teacher"]["mean"]), metric_of(table)
    first, methods = rows[0], number_of(len(rows), "method")
    text = (
        f"With the teacher, {first['name']} has the best {metric} of {methods}: {_cell(first['teacher'])}%,"
        f" training {count(first['trainable_parameters'])} parameters"
        f" ({part(first['trainable_parameters'], first['total_parameters'])})."
    )
    if first["teacher"]["spread"] is None:
        text += " One seed says nothing about how far such figures vary; --seeds 3 does."
    gaps = {frozenset(pair["methods"]): pair["difference"] for pair in table["pairs"]}
    clear = {
        next(iter(names - {first["name"]})) for names, gap in gaps.items() if first["name"] in names and _clear(gap)
    }
    near = [row for row in rows[1:] if row["name"] not in clear]
    if near and gaps:
        least = min([first, *near], key=lambda row: row["trainable_parameters"])
        text += f" On the same images and seeds, {_listed([row['name'] for row in near])} cannot be told from it"
        text += f"; of these, {least['name']} trains the fewest parameters." if least is not first else "."
    full = next((row for row in rows if row["method"] == "full"), None)
    if full is not None and full is not first:
        gap = 100 * (first["teacher"]["mean"] - full["alone"]["mean"])
        text += f" Full tuning on labels alone reaches {_cell(full['alone'])}%, {abs(gap):.1f} points"
        text += " less." if gap > 0 else " more."
    gains = [100 * row["gain"] for row in rows]
    helped = sum(gain > 0 for gain in gains)
    return f"{text} The teacher helped {helped} of {methods}, {sum(gains) / len(gains):+.1f} points on average."


def _clear(gap: dict[str, Any] | None) -> bool:
    return gap is not None and gap["distinguishable"]


def _difference(found: dict[str, Any] | None, gain: float | None) -> str:
    """Return a difference in points with its interval; in brackets where it is not distinguishable from none."""
    if found is None:
        return "" if gain is None else f"{100 * gain:+.1f}"
    text = f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return text if found["distinguishable"] else f"({text})"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _facts(table: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    teachers = [table["teacher"], *table.get("more_teachers", [])]
    # Earlier versions have the weights alone.
    weights = [{"name": name, "weight": weight} for name, weight in table["losses"].items()]
    losses = map(LossSpec.model_validate, table.get("objective", weights))
    return {
        "Data": rows_of({"images": table["data"], "recipe": table["recipe"]}),
        "Networks": rows_of(
            {
                "student": table["student"],
                "teacher": ", ".join(
                    f"{one['model']} (head: {one['head']}, {percent(one['accuracy'])})" for one in teachers
                ),
            }
        ),
        "Training": rows_of(
            {
                "losses": losses_in_words(losses, "×"),
                "epochs": table["epochs"],
                "epochs by labels only": table.get("epochs_alone"),  # earlier versions have none
                "batch size": table["batch_size"],
                "seeds": ", ".join(map(str, table["seeds"])),
            }
        ),
    }
