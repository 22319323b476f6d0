"""``remap compare``: methods with and without the teacher, in one table."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remap.io.human_size import size
from remap.io.paths import expanded
from remap_cli import console, report
from remap_cli.options import COMPARE, recipe_words, training_command
from remap_cli.training import read_recipe

if TYPE_CHECKING:
    from remap.pipeline.compare import Plan

# The budget of `remap compare` alone, which runs 54 cells: with it they end within 15 minutes on two cores.
QUICK = "epochs=6"
# What was chosen if any of these is given.
_CHOSEN = ("recipe", "data", "unlabeled", "methods", "epochs", "budget", "settings")
# After an interval that holds 0.
_UNCLEAR = "n.d."


@training_command(COMPARE)
def compare(values: dict[str, Any]) -> None:
    """Compare methods, each with and without the teacher, on the same data, budget and seeds."""
    from remap.errors import RecipeError
    from remap.pipeline.compare import Plan
    from remap.pipeline.compare import compare as run_compare
    from remap.pipeline.comparison_cells import DEFAULT_SEEDS, chosen_methods
    from remap.runs.run_dir import default_path

    where = (values["jobs"] or "auto", values["slurm"])
    plan = Plan(values["sweeps"] or (), values["loss_sets"] or (), values["budget"], values["search"], *where)
    if values["suite"] is not None:
        return _suite(values, plan)
    if values["sets"] is not None:
        raise RecipeError(["--sets: the folder of a suite's sets (name one with --suite)"], "command line")
    if values["sessions"] is not None:
        return _sessions(values)
    if values["ways"] is not None:
        raise RecipeError(["--ways: how sessions are learned (name their number with --sessions)"], "command line")
    chosen, seeds = chosen_methods(values["methods"]), values["seeds"] or DEFAULT_SEEDS
    with console.Reporter() as progress:
        recipe = read_recipe(values, with_teacher=True)
        if not any(values[name] for name in _CHOSEN):
            plan = replace(plan, budget=QUICK)
            own = f"--budget epochs={recipe.train.epochs}"
            progress.say(f"{QUICK} of each cell, to be quick; {own} is what the recipe says")
        folder = expanded(values["output"] or default_path() / f"compare-{recipe.name}")
        table = run_compare(recipe, chosen, seeds, folder, progress, plan)
    console.emit(table) if values["json"] else _show(table)
    with console.Reporter() as progress:  # after the result, which an error in the report must not hide
        report.write_at_end(folder, progress)


def _suite(values: dict[str, Any], plan: "Plan") -> None:
    from remap.errors import RecipeError
    from remap.pipeline.suite import run_suite
    from remap.recipe.suite import load_suite
    from remap.runs.run_dir import default_path

    if values["recipe"] is not None:
        raise RecipeError(["--recipe: a suite has its own (change a field of it with --set)"], "command line")
    suite = load_suite(values["suite"])
    folder = expanded(values["output"] or default_path() / f"suite-{Path(values['suite']).stem}")
    words, settings = recipe_words(values), values["settings"] or []
    sets = None if values["sets"] is None else expanded(values["sets"])
    with console.Reporter() as progress:
        found = run_suite(suite, sets, folder, progress, words, settings, plan, values["methods"], values["seeds"])
    console.emit(found) if values["json"] else console.line((folder / "suite.md").read_text())
    with console.Reporter() as progress:
        for name in suite.sets:
            report.write_at_end(folder / name, progress)


def _sessions(values: dict[str, Any]) -> None:
    from remap.errors import RecipeError
    from remap.pipeline.comparison_cells import DEFAULT_SEEDS, chosen_methods
    from remap.pipeline.session_protocol import DEFAULT_WAYS, compare_sessions
    from remap.runs.run_dir import default_path

    given = [name for name in ("sweeps", "loss_sets", "budget", "search", "jobs", "slurm") if values[name]]
    if given:
        raise RecipeError([f"--sessions: takes no {', '.join(given)}"], "command line")
    with console.Reporter() as progress:
        recipe = read_recipe(values, with_teacher=True)
        methods = chosen_methods(values["methods"]) if values["methods"] else [recipe.method.name]
        ways = values["ways"].split(",") if values["ways"] else DEFAULT_WAYS
        folder = expanded(values["output"] or default_path() / f"sessions-{recipe.name}")
        seeds = values["seeds"] or DEFAULT_SEEDS
        found = compare_sessions(recipe, values["sessions"], methods, ways, seeds, folder, progress)
    console.emit(found) if values["json"] else console.line((folder / "sessions.md").read_text())


def _show(table: dict[str, Any]) -> None:
    from remap.pipeline.comparison_files import interval, percent

    rows = []
    for row in table["rows"]:
        share = row["trainable_parameters"] / row["total_parameters"]
        cells = [
            f"{row['name']}{' *' if row['pareto'] else ''}",
            f"{console.count(row['trainable_parameters'])} ({share:.1%})",
            percent(row["alone"]),
            percent(row["teacher"]),
            interval(row["difference"]["to_alone"], _UNCLEAR),
            interval(row["difference"]["to_full"], _UNCLEAR),
            f"{row['teacher']['seconds']:.0f}",
            size(row["task_bytes"]),
        ]
        rows.append((row["category"].removesuffix(" tuning"), cells))
    count = len(table["seeds"])
    seeds = f"{count} seeds (mean ± standard deviation)" if count > 1 else "1 seed"
    console.table(
        f"{table['student']} on {table['data']}: {table['metric']} in %, {table['epochs']} epochs, {seeds}",
        ["method", "trained", "labels only", "with teacher", "gain", "to full tuning", "seconds", "saved size"],
        console.grouped(rows),
        right=(1, 2, 3, 4, 5, 6, 7),
    )
    console.line(f"{_UNCLEAR} not distinguishable: 0 is within the 95% interval. * on the Pareto front")
    for teacher in (table["teacher"], *table["more_teachers"]):
        accuracy = "" if teacher["accuracy"] is None else f", {table['metric']} {teacher['accuracy']:.1%}"
        console.line(f"teacher: {teacher['model']} (head: {teacher['head']}){accuracy}")
    console.line(
        f"table: {table['output']}/compare.json, .csv, .md, .tex; each cell is a run directory in the same folder"
    )
