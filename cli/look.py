"""Commands that look things up; none of them needs torch except ``doctor``'s own checks and one method's options."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from remap.registry import BUILT_IN
from remap_cli import options as opt
from remap_cli import view
from remap_cli.main import app

if TYPE_CHECKING:
    from remap.tuning import MethodEntry


@app.command(rich_help_panel=opt.LOOK)
def methods(
    name: Annotated[str, typer.Argument(help="A method or combination: its options (imports torch).")] = "",
    families: Annotated[bool, typer.Option("--families", help="Which method fits which family of backbones.")] = False,
    json: opt.Json = False,
) -> None:
    """List the tuning methods by the survey's categories, or the options of one."""
    from remap.tuning import METHODS

    if families:
        _families(json)
        return
    if name:
        _method(name, json)
        return
    rows = [_fields(row) for row in METHODS]
    if json:
        view.emit(rows)
        return
    cells = [
        (
            row["category"].removesuffix(" tuning"),
            [
                row["name"],
                row["summary"],
                row["trainable_parameters"],
                "-" if row["trainable_vit_base"] is None else f"{row['trainable_vit_base']:,}",
                "yes" if row["mergeable"] else "no",
                f"{row['learning_rate']:g}",
                row["paper"].rpartition(" ")[2],
            ],
        )
        for row in rows
    ]
    columns = ["method", "what is trained", "parameters", "ViT-B/16", "merges", "lr", "arXiv"]
    formulas = view.out.width >= WIDE
    if not formulas:
        columns.remove("parameters")
        cells = [(group, [*row[:2], *row[3:]]) for group, row in cells]
    view.table(
        f"{len(rows)} tuning methods",
        columns,
        view.grouped(cells),
        right=(3, 5) if formulas else (2, 4),
        wrap=(1, 2) if formulas else (1,),
    )
    if formulas:
        view.line(
            "parameters: trained besides the head; L depth, D width, H MLP width, p prompts, r bottleneck or rank;"
        )
    view.line(
        "ViT-B/16: parameters trained there besides the head, with default options.\n"
        "merges: with default options, can be folded into plain timm weights.\n"
        "lr: default for AdamW at batch size 64 and width 128, else lr * 128 / width.\n"
        "Options of a method: remap methods NAME. Together: --method vpt_deep+lora."
    )
    _from_other_packages(rows)


def _from_other_packages(rows: list[dict[str, Any]]) -> None:
    """Say which rows of a table other installed packages registered."""
    foreign = [f"{row['name']} ({row['origin']})" for row in rows if row["origin"] != BUILT_IN]
    if foreign:
        view.line(f"From other packages: {', '.join(foreign)}")


# Columns that a terminal needs for the formulas of the table of methods.
WIDE = 120


def _fields(row: "MethodEntry") -> dict[str, Any]:
    from remap.tuning import CATEGORIES

    return {
        "name": row.name,
        "category": CATEGORIES[row.category],
        "summary": row.summary,
        "trainable_parameters": row.trains,
        "trainable_vit_base": row.vit_base,
        "mergeable": row.mergeable,
        "learning_rate": row.lr,
        "paper": row.paper,
        "origin": row.origin,
    }


def _method(name: str, json: bool) -> None:
    """One method, or several that are combined, with every option."""
    from remap.errors import RecipeError
    from remap.recipe.checks import method_problems
    from remap.tuning import parts_of, rows_of

    if all(parts_of(name)) and "," not in name:
        rows_of(name)  # an unknown name says what is meant
    problems = method_problems("methods", name)
    if problems:
        raise RecipeError(problems, "command line")
    from remap.recipe.option_listing import notes_of, options_of, shown

    rows, options, notes = rows_of(name), options_of(name), notes_of(name)
    if json:
        view.emit({"name": name, "methods": [_fields(row) for row in rows], "options": options, "notes": notes})
        return
    for row in rows:
        count = "-" if row.vit_base is None else f"{row.vit_base:,}"
        view.line(
            f"{row.name}: {row.summary} ({row.paper})\n"
            f"  trained   {row.trains}; on ViT-B/16 {count}\n"
            f"  merges    {'yes' if row.mergeable else 'no'}, with default options\n"
            f"  lr        {row.lr:g} at width 128"
        )
    if not options:
        view.line("It has no options.")
        return
    view.table(
        "Options",
        ["option", "default", "takes", "what it is"],
        [[o["name"], shown(o["default"]), takes(o), o["about"]] for o in options],
        wrap=(2, 3),
    )
    if notes:
        view.line(notes)
    view.line(f"Set with --set method.{options[0]['name']}={shown(options[0]['default'])}")


def takes(option: dict[str, Any]) -> str:
    """What an option accepts, in words."""
    words = ", ".join(map(str, option["allowed"] or ()))
    first, _, rest = option["type"].partition(" or ")
    if words:
        first = f"list of {words}" if first == "list" else words
    kind = f"{first} {option['limits']}".strip()
    return f"{kind}, or {rest}" if rest else kind


def _families(json: bool) -> None:
    from remap.backbones.families import FAMILIES
    from remap.tuning import CATEGORIES, METHODS

    support = {row.name: {family.name: row.fits(family.parts) for family in FAMILIES} for row in METHODS}
    if json:
        view.emit(
            {
                "families": [
                    {"name": row.name, "summary": row.summary, "examples": row.examples, "paper": row.paper}
                    for row in FAMILIES
                ],
                "methods": [{"name": name, **fits} for name, fits in support.items()],
            }
        )
        return
    cells = [
        (
            CATEGORIES[row.category].removesuffix(" tuning"),
            [row.name, *("yes" if fits else "-" for fits in support[row.name].values())],
        )
        for row in METHODS
    ]
    view.table("What fits what", ["method", *FAMILIES.names], view.grouped(cells))
    view.line("\n".join(f"{row.name:9}{row.summary}: {row.examples}" for row in FAMILIES))
    view.line("Every yes is a run of the conformance suite (tests/tuning); every - is refused with a method that fits.")


@app.command(rich_help_panel=opt.LOOK)
def losses(
    name: Annotated[str, typer.Argument(help="A loss: all about it and its options (imports torch).")] = "",
    json: opt.Json = False,
) -> None:
    """List the loss terms that carry the teacher's knowledge over (category 5), or all about one."""
    from remap.remapping import LOSSES

    fields = ("name", "category", "summary", "paper", "needs", "mismatch", "mixed", "over_batch", "weight", "origin")
    rows = [{field: getattr(row, field) for field in fields} for row in LOSSES]
    if name:
        row = next((row for row in rows if row["name"] == LOSSES.row(name).name), {})
        _loss(row, json)
        return
    if json:
        view.emit(rows)
        return
    cells = [
        (
            row["category"],
            [row["name"], row["summary"], row["mismatch"], f"{row['weight']:g}", row["paper"].rpartition(" ")[2]],
        )
        for row in rows
    ]
    view.table(
        f"{len(rows)} loss terms",
        ["loss", "what it is", "where the models differ", "weight", "arXiv"],
        view.grouped(cells),
        right=(3,),
        wrap=(1, 2),
    )
    view.line(
        "weight: default in the objective. All about one, with its options: remap losses NAME.\n"
        "The other parts of category 5, weights and architecture: remap remappings."
    )
    _from_other_packages(rows)


def _loss(row: dict[str, Any], json: bool) -> None:
    """One loss with every option."""
    from remap.recipe.option_listing import rows_of_config, shown
    from remap.remapping import LOSSES

    options = rows_of_config(LOSSES.load(row["name"]).Config)
    if json:
        view.emit({**row, "options": options})
        return
    paper = "" if row["paper"] == "-" else f" ({row['paper']})"
    view.line(
        f"{row['name']}: {row['summary']}{paper}\n"
        f"  reads            {row['needs']}\n"
        f"  models differ    {row['mismatch']}\n"
        f"  mixed images     {row['mixed']}\n"
        f"  within a batch   {'compares its images with each other' if row['over_batch'] else 'each image by itself'}\n"
        f"  weight           {row['weight']:g}"
    )
    if not options:
        view.line("It has no options.")
        return
    view.table(
        "Options",
        ["option", "default", "takes", "what it is"],
        [[o["name"], shown(o["default"]), takes(o), o["about"]] for o in options],
        wrap=(2, 3),
    )
    view.line(f"Set with --set losses.{row['name']}.{options[0]['name']}={shown(options[0]['default'])}")


@app.command(rich_help_panel=opt.LOOK)
def remappings(json: opt.Json = False) -> None:
    """List how a student gets its weights or its architecture from the teacher (category 5)."""
    from remap.remapping.architecture import ARCHITECTURES
    from remap.remapping.weights import INITS

    fields = ("name", "category", "summary", "paper", "needs", "mismatch")
    rows = [{field: getattr(row, field) for field in fields} for table in (INITS, ARCHITECTURES) for row in table]
    if json:
        view.emit(rows)
        return
    cells = [
        (row["category"], [row["name"], row["summary"], row["mismatch"], row["paper"].rpartition(" ")[2]])
        for row in rows
    ]
    view.table(
        "Remapping weights and architecture",
        ["name", "what it is", "where the models differ", "arXiv"],
        view.grouped(cells),
        wrap=(1, 2),
    )
    view.line("Knowledge is carried over by losses: remap losses. Options of each: docs/remapping.md.")


@app.command(rich_help_panel=opt.LOOK)
def models(
    search: Annotated[str, typer.Argument(help="Part of a timm name: also list those (imports timm).")] = "",
    json: opt.Json = False,
) -> None:
    """List short names of backbones, and with a word timm's names that hold it."""
    from remap.backbones.families import FAMILIES
    from remap.backbones.names import MODELS

    rows = [
        {"name": name, "timm": m.timm, "parameters_m": m.parameters, "input": m.pixels, "weights": m.weights}
        for name, m in MODELS.items()
        if search in name or search in m.timm
    ]
    others: list[str] = []
    left_out = 0
    if search:
        import timm

        from remap.backbones.lookup import family_of_name

        found = timm.list_models(f"*{search}*", pretrained=True)
        others = [name for name in found if family_of_name(name) is not None]
        left_out = len(found) - len(others)
    if json:
        view.emit({"short_names": rows, "timm": others, "left_out": left_out})
        return
    if rows:
        view.table(
            "Backbones by short name (parameters without head)",
            ["name", "timm name", "size", "pixels", "weights"],
            [[r["name"], r["timm"], f"{r['parameters_m']} M", r["input"], r["weights"]] for r in rows],
            right=(2, 3),
            wrap=(4,),
        )
    if others:
        view.line("timm, with pre-trained weights:\n  " + "\n  ".join(others))
    if left_out:
        view.line(f"{left_out} more of timm with '{search}' in the name are of families that remap does not read.")
    if not others:
        if search and not (rows or left_out):
            view.line(f"No model of timm with pre-trained weights has '{search}' in its name.")
        view.line(
            "Any model of timm of these families works by its own name (remap models WORD lists them):\n"
            + "".join(f"  {row.summary}: {row.examples}\n" for row in FAMILIES)
            + "and so do local-dir:FOLDER, hf-hub:REPOSITORY, and a run directory."
        )


@app.command(rich_help_panel=opt.LOOK)
def doctor(json: opt.Json = False) -> None:
    """Check this machine: versions, devices, precision, caches and disk."""
    from remap.pipeline.doctor import examine

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
