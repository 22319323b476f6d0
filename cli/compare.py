"""``remap compare``: methods with and without the teacher, in one table."""

from typing import Any

from remap.io.human_size import size
from remap.io.paths import expanded
from remap_cli import console, report
from remap_cli.options import COMPARE, training_command
from remap_cli.training import read_recipe


@training_command(COMPARE)
def compare(values: dict[str, Any]) -> None:
    """Compare methods, each with and without the teacher, on the same data, budget and seeds."""
    from remap.pipeline.compare import compare as run_compare
    from remap.pipeline.comparison_cells import chosen_methods
    from remap.runs.run_dir import default_path

    chosen = chosen_methods(values["methods"])
    with console.Reporter() as progress:
        recipe = read_recipe(values, with_teacher=True)
        folder = expanded(values["output"] or default_path() / f"compare-{recipe.name}")
        table = run_compare(recipe, chosen, values["seeds"], folder, progress)
    console.emit(table) if values["json"] else _show(table)
    with console.Reporter() as progress:  # after the result, which an error in the report must not hide
        report.write_at_end(folder, progress)


def _show(table: dict[str, Any]) -> None:
    def cell(found: dict[str, Any]) -> str:
        spread = "" if found["spread"] is None else f" ± {found['spread']:.1%}".replace("%", "")
        return f"{found['mean']:.1%}".replace("%", "") + spread

    rows = []
    for row in table["rows"]:
        share = row["trainable_parameters"] / row["total_parameters"]
        cells = [
            row["method"],
            f"{console.count(row['trainable_parameters'])} ({share:.1%})",
            cell(row["alone"]),
            cell(row["teacher"]),
            f"{100 * row['gain']:+.1f}",
            f"{row['teacher']['seconds']:.0f}",
            size(row["task_bytes"]),
        ]
        rows.append((row["category"].removesuffix(" tuning"), cells))
    count = len(table["seeds"])
    seeds = f"{count} seeds (mean ± standard deviation)" if count > 1 else "1 seed"
    console.table(
        f"{table['student']} on {table['data']}: accuracy in %, {table['epochs']} epochs, {seeds}",
        ["method", "trained", "labels only", "with teacher", "gain", "seconds", "saved size"],
        console.grouped(rows),
        right=(1, 2, 3, 4, 5, 6),
    )
    for teacher in (table["teacher"], *table["more_teachers"]):
        accuracy = "" if teacher["accuracy"] is None else f", accuracy {teacher['accuracy']:.1%}"
        console.line(f"teacher: {teacher['model']} (head: {teacher['head']}){accuracy}")
    console.line(f"table: {table['output']}/compare.json; each cell is a run directory in the same folder")
