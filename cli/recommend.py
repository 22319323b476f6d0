"""``remap recommend``: which method to take, before the long runs."""

from typing import Any

from remap_cli import console
from remap_cli.options import RECOMMEND, training_command
from remap_cli.training import read_recipe, require_one_length


@training_command(RECOMMEND)
def recommend(values: dict[str, Any]) -> None:
    """Rank methods for your images and budget by short runs on held-out training images.

    [dim]remap recommend --data FOLDER --student vit_small --budget parameters=100000[/dim]
    """
    from remap.io.paths import expanded
    from remap.pipeline.comparison_cells import chosen_methods
    from remap.pipeline.comparison_plan import RANKED, require_rankable
    from remap.runs.run_dir import default_path

    require_one_length(values, values["budget"])
    methods = RANKED if values["methods"] is None else chosen_methods(values["methods"])
    with console.Reporter() as progress:
        recipe = read_recipe(values, with_teacher=True)
        folder = expanded(values["output"] or default_path() / f"recommend-{recipe.name}")
        require_rankable(recipe, methods, folder, values["budget"])
        with progress.wait("loading PyTorch"):
            from remap.pipeline.recommend import recommend as rank
        found = rank(recipe, methods, folder, progress, values["budget"])
    console.emit(found) if values["json"] else _show(found)


def _show(found: dict[str, Any]) -> None:
    epochs = max((row["epochs"] for row in found["rows"]), key=len)
    rows = []
    for row in found["rows"]:
        shown = [f"{100 * one:.1f}" for one in row["accuracies"]]
        shown += ["-"] * (len(epochs) - len(shown))  # of a method that left in an earlier round
        low, high = row["interval"]
        rows.append(
            [
                row["method"],
                console.count(row["parameters"]),
                " ".join(shown),
                f"{'' if row['measured'] else '~'}{100 * row['expected']:.1f} ({100 * low:.1f}-{100 * high:.1f})",
                "worse" if row["told_apart"] else "best" if row["method"] == found["best"] else "cannot tell",
            ]
        )
    console.table(
        f"{found['student']} on {found['data']}: accuracy in % on {found['held_out_images']} held-out training images",
        [
            "method",
            "trained",
            f"after {', '.join(map(str, epochs))} epoch{'s' * (epochs != [1])}",
            "expected",
            "to the best",
        ],
        rows,
        right=(1, 2, 3),
    )
    if not all(row["measured"] for row in found["rows"]):
        console.line("~ not trained to the end: it is expected to gain what the others gained")
    for why in found["left_out"].values():
        console.line(f"left out: {why}")
    best, cheapest = found["best"], found["cheapest"]
    if not found["cannot_tell"]:
        console.line(f"take {best}")
    elif cheapest == best:
        console.line(f"take {best}: these images do not tell it from {_names(found)}, and it trains least")
    else:
        alike = f"these images do not tell {_names(found)} from {best}"
        console.line(f"take {best}, or {cheapest}, which trains less: {alike}")
    console.line(f"{console.duration(found['seconds'])} of trials in {found['output']}")


def _names(found: dict[str, Any]) -> str:
    *first, last = found["cannot_tell"]
    return f"{', '.join(first)} or {last}" if first else last
