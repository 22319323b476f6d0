"""Commands that look things up; none of them needs torch except ``doctor``'s own checks."""

from typing import Annotated

import typer

from remap_cli import options as opt
from remap_cli import view
from remap_cli.main import app, recipes


@app.command(rich_help_panel=opt.LOOK)
def methods(json: opt.Json = False) -> None:
    """List the tuning methods by the survey's categories."""
    from remap.tuning import CATEGORIES, METHODS

    rows = [
        {
            "name": row.name,
            "category": CATEGORIES[row.category],
            "summary": row.summary,
            "trains": row.trains,
            "mergeable": row.mergeable,
            "learning_rate": row.lr,
            "paper": row.paper,
        }
        for row in METHODS
    ]
    if json:
        view.emit(rows)
        return
    cells = [
        (
            row["category"].removesuffix(" tuning"),
            [
                row["name"],
                row["summary"],
                row["trains"],
                "yes" if row["mergeable"] else "no",
                f"{row['learning_rate']:g}",
                row["paper"].rpartition(" ")[2],
            ],
        )
        for row in rows
    ]
    view.table(
        "Tuning methods",
        ["method", "what is trained", "parameters", "merges", "lr", "arXiv"],
        view.grouped(cells),
        right=(4,),
        wrap=(1,),
    )
    view.line(
        "parameters: trained besides the head; L depth, D width, p prompts, r bottleneck.\n"
        "merges: can be folded into plain timm weights. lr: default for AdamW at batch size 64."
    )


@app.command(rich_help_panel=opt.LOOK)
def losses(json: opt.Json = False) -> None:
    """List the loss terms that carry the teacher over (category 5)."""
    from remap.remapping import LOSSES

    fields = ("name", "category", "summary", "needs", "weight", "paper")
    rows = [{field: getattr(row, field) for field in fields} for row in LOSSES]
    if json:
        view.emit(rows)
        return
    view.table(
        "Loss terms (weight: default in the objective)",
        ["loss", "what it is", "needs", "weight", "arXiv"],
        [
            [row["name"], row["summary"], row["needs"], f"{row['weight']:g}", row["paper"].rpartition(" ")[2]]
            for row in rows
        ],
        right=(3,),
        wrap=(1, 2),
    )


@app.command(rich_help_panel=opt.LOOK)
def models(
    search: Annotated[str, typer.Argument(help="Part of a timm name: also list those (imports timm).")] = "",
    json: opt.Json = False,
) -> None:
    """List short names of backbones, and with a word timm's names that hold it."""
    from remap.backbones.names import ABOUT, SHORT_NAMES

    rows = [
        {"name": name, "timm": tag, "parameters_m": ABOUT[name][0], "input": ABOUT[name][1], "weights": ABOUT[name][2]}
        for name, tag in SHORT_NAMES.items()
        if search in name or search in tag
    ]
    others: list[str] = []
    if search:
        import timm

        import remap.backbones.mini  # noqa: F401 - registers the embedded pair

        others = timm.list_models(f"*{search}*", pretrained=True)
    if json:
        view.emit({"short_names": rows, "timm": others})
        return
    view.table(
        "Backbones by short name (parameters without head)",
        ["name", "timm name", "size", "pixels", "weights"],
        [[r["name"], r["timm"], f"{r['parameters_m']} M", r["input"], r["weights"]] for r in rows],
        right=(2, 3),
        wrap=(4,),
    )
    if others:
        view.line("timm, with pre-trained weights:\n  " + "\n  ".join(others))
    else:
        view.line(
            "Any plain vision transformer of timm works by its own name (remap models WORD lists them),\n"
            "and local-dir:FOLDER, hf-hub:REPOSITORY, or a run directory."
        )


@app.command(rich_help_panel=opt.LOOK)
def doctor(json: opt.Json = False) -> None:
    """Check this machine: versions, devices, precision, caches and disk."""
    from remap.doctor import examine

    found = examine()
    if json:
        view.emit(found)
    else:
        view.table(
            "remap doctor",
            ["", "what", "found"],
            [[r["state"], r["what"], r["found"]] for r in found["checks"]],
            wrap=(2,),
        )
    if not found["ok"]:
        raise typer.Exit(1)


@recipes.command("ls")
def recipes_ls(json: opt.Json = False) -> None:
    """List the shipped recipes."""
    from remap.recipe import catalogue

    rows = [{"name": name, "summary": catalogue.summary(name)} for name in catalogue.names()]
    if json:
        view.emit(rows)
    else:
        view.table("Shipped recipes", ["name", "what it does"], [[r["name"], r["summary"]] for r in rows], wrap=(1,))


@recipes.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="A shipped name or a YAML file.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="With every default written out.")] = False,
) -> None:
    """Print a recipe."""
    from remap.recipe import catalogue, dump, resolve

    text = dump(resolve(name, check_options=False)) if resolved else catalogue.find(name).read_text(encoding="utf-8")
    typer.echo(text, nl=False)


@recipes.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    to: Annotated[str, typer.Argument(help="File or folder to copy to.")] = ".",
) -> None:
    """Copy a shipped recipe to edit it."""
    from pathlib import Path

    from remap.errors import RecipeError
    from remap.files import write_text
    from remap.recipe import catalogue

    source, target = catalogue.find(name), Path(to).expanduser()
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise RecipeError(["exists already and was not touched; name another file"], str(target))
    write_text(target, source.read_text(encoding="utf-8"))
    view.note(f"wrote {target}; run it with: remap distill --recipe {target}")


@recipes.command("validate")
def recipes_validate(
    names: Annotated[list[str], typer.Argument(help="Shipped names or YAML files.")],
) -> None:
    """Check recipes, options of methods and losses included, without training. All are checked, broken ones too."""
    from remap.errors import RecipeError, RemapError
    from remap.recipe import resolve

    broken: list[str] = []
    for name in names:
        try:
            resolve(name)
            view.line(f"{name}: ok")
        except RecipeError as error:
            broken.append(str(error))
    if broken:
        raise RemapError("\n".join(broken))
