"""Run a suite: the same comparison on each of its sets, and the means over sets and groups."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from remap.errors import DataError
from remap.io import atomic_write
from remap.io.human_size import number_of
from remap.io.names import plain
from remap.pipeline.compare import compare, resumable
from remap.pipeline.comparison_cells import chosen_methods
from remap.pipeline.comparison_files import interval
from remap.pipeline.comparison_folder import require_folder
from remap.pipeline.comparison_plan import Plan
from remap.progress import Progress, Within
from remap.recipe.schema import Recipe
from remap.recipe.suite import Suite, SuiteSet
from remap.runs.summary_schema import metric_of

RECORD = "suite.json"


def run_suite(
    suite: Suite,
    folder: Path | None,
    output: Path,
    progress: Progress,
    words: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    plan: Plan = Plan(),
    methods: str | None = None,
    seeds: int | None = None,
) -> dict[str, Any]:
    """Compare on each set, in a folder of its own, and tabulate.

    Args:
        folder: Where the sets are.
        words, settings: Options of the command line that change the suite's recipe.
        plan: A budget or search takes the place of the suite's, as do ``methods`` and ``seeds``.

    Returns:
        The content of suite.json.

    Raises:
        DataError: A set holds other images than the suite says; nothing was trained.
        RemapError: Anything else a user can mend.
    """
    require_folder(output)
    chosen = chosen_methods(suite.methods if methods is None else methods)
    recipes = {name: suite.recipe_of(name, folder, words, settings) for name in suite.sets}
    # All sets before the first run: else a wrong one is found after hours of training.
    for name, recipe in recipes.items():
        require_counts(name, suite.sets[name], recipe)
    search = plan.search or (None if suite.search is None else str(suite.search))
    plan = replace(plan, budget=plan.budget or suite.budget, search=search)
    with resumable(output):
        tables = {
            name: compare(recipe, chosen, seeds or suite.seeds, output / name, Within(progress, name), plan)
            for name, recipe in recipes.items()
        }
    found = summarize_suite(tables, {name: one.group for name, one in suite.sets.items()})
    atomic_write.write_json(output / RECORD, found)
    atomic_write.write_text(output / "suite.md", markdown(found))
    atomic_write.write_text(output / "suite.csv", _csv(found))
    return found


def require_counts(name: str, expected: SuiteSet, recipe: Recipe) -> None:
    """Compare the number of images and the classes of a set with what the suite says of it.

    Raises:
        DataError: They differ.
    """
    from remap.pipeline.shared import SharedResources

    data = SharedResources().index(recipe.data)
    counts = {"train": len(data.train), "val": len(data.val), "classes": len(data.classes)}
    wrong = [
        f"{key}: {count:,}, not {wanted:,}"
        for key, count in counts.items()
        if (wanted := getattr(expected, key)) is not None and wanted != count
    ]
    ids = {str(number) for number in range(len(data.classes))}
    if expected.class_ids and set(data.classes) != ids:
        odd = sorted(set(data.classes) - ids)
        wrong.append(f"class ids: not the whole numbers from 0 to {len(data.classes) - 1} ({', '.join(odd[:5])})")
    if wrong:
        do = (
            "check that the set is complete, in the layout of the documentation (docs/comparing.md), and read as the"
            " suite says (--set data.FIELD)"
        )
        raise DataError(f"the set '{name}' is not the one of the suite", given=plain("; ".join(wrong)), do=do)


def summarize_suite(tables: Mapping[str, dict[str, Any]], group_of: Mapping[str, str | None]) -> dict[str, Any]:
    """Return each method's mean over the sets, over each group, and over the means of groups."""
    by_name = {name: {row["name"]: row for row in table["rows"]} for name, table in tables.items()}
    # Means over different sets do not compare, so a method has to be in all of them.
    names = [name for name in next(iter(by_name.values())) if all(name in rows for rows in by_name.values())]
    rows = []
    for name in names:
        found = {of_set: one[name] for of_set, one in by_name.items()}
        first = next(iter(found.values()))
        rows.append(
            {
                "name": name,
                "category": first["category"],
                "sets": {key: {side: row[side]["mean"] for side in ("alone", "teacher")} for key, row in found.items()},
                "alone": _means(found, group_of, "alone"),
                "teacher": _means(found, group_of, "teacher"),
                **{key: _over_sets([row["difference"][key] for row in found.values()]) for key in first["difference"]},
            }
        )
    sets = {name: {"group": group_of[name], "images": table["images"]} for name, table in tables.items()}
    metric = " or ".join(dict.fromkeys(map(metric_of, tables.values())))
    return {"sets": sets, "metric": metric, "seeds": next(iter(tables.values()))["seeds"], "rows": rows}


def _means(found: Mapping[str, dict[str, Any]], group_of: Mapping[str, str | None], side: str) -> dict[str, Any]:
    means = {name: row[side]["mean"] for name, row in found.items()}
    groups = {
        group: statistics.fmean(mean for name, mean in means.items() if group_of[name] == group)
        # Each group once, in the order of the suite; a set has no order.
        for group in dict.fromkeys(group_of.values())
        if group is not None
    }
    of_groups = statistics.fmean(groups.values()) if groups else None
    return {"mean": statistics.fmean(means.values()), "groups": groups, "mean_of_groups": of_groups}


def _over_sets(differences: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the mean of a difference with its 95% interval over sets (Student's t), and on how many it is clear."""
    known = [one for one in differences if one is not None]
    # One set lacks it, and a mean over the others would look like one over all.
    if len(known) < len(differences):
        return None
    means, count = [one["mean"] for one in known], len(known)
    mean = statistics.fmean(means)
    half = None
    if count > 1:
        from scipy.stats import t

        half = float(t.ppf(0.975, count - 1)) * statistics.stdev(means) / sqrt(count)
    # One set has no spread over sets; it has its own interval over seeds and images.
    low, high = (known[0]["low"], known[0]["high"]) if half is None else (mean - half, mean + half)
    better = sum(one["low"] > 0 for one in known)
    worse = sum(one["high"] < 0 for one in known)
    clear = {"better": better, "worse": worse, "distinguishable": low > 0 or high < 0}
    return {"mean": mean, "low": low, "high": high, **clear}


def _csv(found: dict[str, Any]) -> str:
    file = io.StringIO()
    # By default csv ends lines with \r\n, on every system.
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "category", "set", "labels only", "with teacher"])
    for row in found["rows"]:
        writer.writerows(
            [row["name"], row["category"], name, one["alone"], one["teacher"]] for name, one in row["sets"].items()
        )
    return file.getvalue()


def markdown(found: dict[str, Any]) -> str:
    """Return the content of suite.md: each method with and without the teacher on every set, and the means."""
    names = list(found["sets"])
    groups = list(dict.fromkeys(one["group"] for one in found["sets"].values() if one["group"] is not None))
    columns = ["method", *names, *groups, *(["mean of groups"] if groups else []), "mean", "to full tuning", "sets"]
    lines = [f"| {' | '.join(map(plain, columns))} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for row in found["rows"]:
        for side, key in (("alone", "alone_to_full"), ("teacher", "to_full")):
            means, gap = row[side], row[key]
            values = [row["sets"][name][side] for name in names] + [means["groups"][group] for group in groups]
            values += ([means["mean_of_groups"]] if groups else []) + [means["mean"]]
            clear = "-" if gap is None else f"{gap['better']} better, {gap['worse']} worse"
            title = f"{row['name']}{' + teacher' if side == 'teacher' else ''}"
            cells = [title, *(f"{100 * value:.1f}" for value in values), interval(gap), clear]
            lines.append(f"| {' | '.join(map(plain, cells))} |")
    note = (
        f"The {found['metric']} in %, mean over {number_of(len(found['seeds']), 'seed')}. The difference to full tuning"
        f" on labels alone is the mean over {number_of(len(names), 'set')}, in points, with a 95% interval over sets;"
        " the last column says on how many of them the paired interval leaves 0 out."
    )
    if not found["rows"]:
        note = "No method is on every set, so there is none to take a mean of; each set has its own table."
    return f"{note}\n\n" + "\n".join(lines) + "\n"
