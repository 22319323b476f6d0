"""``remap compare``: methods with and without the teacher, in one table."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remap.io.human_size import part, size
from remap.io.paths import expanded
from remap_cli import console, report
from remap_cli.options import COMPARE, OPTIONS, recipe_words, training_command
from remap_cli.training import read_recipe, require_one_length

if TYPE_CHECKING:
    from remap.pipeline.comparison_plan import Plan
    from remap.recipe import Recipe

# Options as they are typed, by name.
_FLAGS = {row.name: row.option for row in OPTIONS if COMPARE in row.commands}
# The budget of `remap compare` alone, which runs 54 cells: with it they end within 15 minutes on two cores.
QUICK = "epochs=6"
# What was chosen if any of these is given.
_CHOSEN = ("recipe", "data", "unlabeled", "methods", "epochs", "budget", "settings")
# What would be ignored, by the option that it is given with, and why.
_ONE_RUN = "each way is one run of each seed"
_IDLE = {
    "suite": {
        "recipe": "a suite has its own; change a field of it with --set",
        "sessions": "a suite compares methods",
        "ways": "a suite compares methods",
    },
    "sessions": {
        "teacher": "ways have a teacher of their own, the run that they extend",
        "unlabeled": "sessions learn from labelled images",
        **dict.fromkeys(("sweeps", "loss_sets", "budget", "search"), _ONE_RUN),
        **dict.fromkeys(("jobs", "slurm"), "runs follow each other"),
    },
}
# After an interval that holds 0.
_UNCLEAR = "n.d."


@training_command(COMPARE)
def compare(values: dict[str, Any]) -> None:
    """Compare methods, each with and without the teacher, on the same data, budget and seeds."""
    from remap.pipeline.comparison_cells import DEFAULT_SEEDS, chosen_methods
    from remap.pipeline.comparison_plan import Plan, require_possible
    from remap.runs.run_dir import default_path

    _require_used(values)
    where = ("auto" if values["jobs"] is None else values["jobs"], values["slurm"])
    plan = Plan(values["sweeps"] or (), values["loss_sets"] or (), values["budget"], values["search"], *where)
    if values["suite"] is not None:
        return _suite(values, plan)
    if values["sessions"] is not None:
        return _sessions(values)
    require_one_length(values, plan.budget)
    chosen, seeds = chosen_methods(values["methods"]), values["seeds"] or DEFAULT_SEEDS
    with console.Reporter() as progress:
        recipe = read_recipe(values, with_teacher=True)
        if not any(values[name] for name in _CHOSEN):
            plan = replace(plan, budget=QUICK)
            own = f"--budget epochs={recipe.train.epochs}"
            progress.say(f"{QUICK} of each cell, to be quick; {own} is what the recipe says")
        folder = expanded(values["output"] or default_path() / f"compare-{recipe.name}")
        require_possible(recipe, chosen, seeds, folder, plan)
        with progress.wait("loading PyTorch"):
            from remap.pipeline.compare import compare as run_compare
        table = run_compare(recipe, chosen, seeds, folder, progress, plan)
    console.emit(table) if values["json"] else _show(table)
    with console.Reporter() as progress:  # after the result, which an error in the report must not hide
        report.write_at_end(folder, progress)


def _require_used(values: dict[str, Any]) -> None:
    """Refuse options that a suite or sessions would ignore, and those that are theirs alone.

    Raises:
        RecipeError: Names them all.
    """
    from remap.errors import RecipeError

    problems = [
        f"{_FLAGS[name]}: not for --{mode} ({_IDLE[mode][name]})"
        for mode in _IDLE
        if values[mode] is not None
        for name in _IDLE[mode]
        if values[name] not in (None, [])
    ]
    if values["sessions"] is not None:
        keys = [setting.partition("=")[0].strip() for setting in values["settings"] or []]
        idle = [key for key in keys if key.split(".")[0] in ("teacher", "teachers")]
        problems += [f"--set {key}: not for --sessions ({_IDLE['sessions']['teacher']})" for key in idle]
    if values["sets"] is not None and values["suite"] is None:
        problems.append("--sets: the folder of a suite's sets (name one with --suite)")
    if values["ways"] is not None and values["sessions"] is None and values["suite"] is None:
        problems.append("--ways: how sessions are learned (name their number with --sessions)")
    if problems:
        raise RecipeError(problems, "command line")


def _require_label_losses(values: dict[str, Any], recipe: "Recipe") -> None:
    """Refuse losses on the command line that sessions, which have no teacher, would leave out."""
    from remap.errors import RecipeError
    from remap.remapping import LOSSES

    idle = [loss.name for loss in recipe.losses if LOSSES.row(loss.name).category != "labels"]
    if values["losses"] is not None and idle:
        raise RecipeError(
            [f"--losses: {', '.join(idle)}: not for --sessions ({_IDLE['sessions']['teacher']})"], "command line"
        )


def _suite(values: dict[str, Any], plan: "Plan") -> None:
    from remap.pipeline.comparison_cells import chosen_methods
    from remap.pipeline.comparison_folder import require_folder
    from remap.recipe.suite import load_suite
    from remap.runs.run_dir import default_path

    suite = load_suite(values["suite"])
    require_one_length(values, plan.budget or suite.budget)
    folder = expanded(values["output"] or default_path() / f"suite-{Path(values['suite']).stem}")
    words, settings = recipe_words(values), values["settings"] or []
    sets = None if values["sets"] is None else expanded(values["sets"])
    require_folder(folder)
    # What cannot be used is said before PyTorch is loaded.
    if values["methods"] is not None:
        chosen_methods(values["methods"])
    for name in suite.sets:
        suite.recipe_of(name, sets, words, settings)
    with console.Reporter() as progress:
        with progress.wait("loading PyTorch"):
            from remap.pipeline.suite import run_suite
        found = run_suite(suite, sets, folder, progress, words, settings, plan, values["methods"], values["seeds"])
    console.emit(found) if values["json"] else console.line((folder / "suite.md").read_text())
    with console.Reporter() as progress:
        for name in suite.sets:
            report.write_at_end(folder / name, progress)


def _sessions(values: dict[str, Any]) -> None:
    from remap.pipeline.comparison_cells import DEFAULT_SEEDS, chosen_methods
    from remap.pipeline.comparison_folder import require_folder
    from remap.runs.run_dir import default_path

    with console.Reporter() as progress:
        recipe = read_recipe(values, with_teacher=True)
        _require_label_losses(values, recipe)
        methods = [recipe.method.name] if values["methods"] is None else chosen_methods(values["methods"])
        folder = expanded(values["output"] or default_path() / f"sessions-{recipe.name}")
        require_folder(folder)
        with progress.wait("loading PyTorch"):
            from remap.pipeline.session_protocol import DEFAULT_WAYS, compare_sessions
        ways = DEFAULT_WAYS if values["ways"] is None else values["ways"].split(",")
        seeds = values["seeds"] or DEFAULT_SEEDS
        found = compare_sessions(recipe, values["sessions"], methods, ways, seeds, folder, progress)
    console.emit(found) if values["json"] else console.line((folder / "sessions.md").read_text())


def _show(table: dict[str, Any]) -> None:
    from remap.pipeline.comparison_files import epochs_in_words, interval, percent

    rows = []
    for row in table["rows"]:
        share = part(row["trainable_parameters"], row["total_parameters"])
        cells = [
            f"{row['name']}{' *' if row['pareto'] else ''}",
            f"{console.count(row['trainable_parameters'])} ({share})",
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
        f"{table['student']} on {table['data']}: {table['metric']} in %, {epochs_in_words(table)}, {seeds}",
        ["method", "trained", "labels only", "with teacher", "gain", "to full tuning", "seconds", "saved size"],
        console.grouped(rows),
        right=(1, 2, 3, 4, 5, 6, 7),
    )
    console.line(
        f"gain and to full tuning in points, with 95% intervals; {_UNCLEAR} not distinguishable: 0 is within."
        f" * on the Pareto front of trained parameters and {table['metric']} with the teacher"
    )
    for why in table["left_out"].values():
        console.line(f"left out: {why}")
    for teacher in (table["teacher"], *table["more_teachers"]):
        accuracy = "" if teacher["accuracy"] is None else f", {table['metric']} {teacher['accuracy']:.1%}"
        console.line(f"teacher: {teacher['model']} (head: {teacher['head']}){accuracy}")
    console.line(
        f"table: {table['output']}/compare.json, .csv, .md, .tex; each cell is a run directory in the same folder"
    )
