"""``remap methods`` and ``remap losses``. Neither needs torch."""

from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remap.registry import BUILT_IN
from remap_cli import console
from remap_cli import options as opt

if TYPE_CHECKING:
    from remap.tuning import MethodEntry

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]

# Columns that a terminal needs for the formulas of the table of methods.
WIDE = 120


def methods(
    name: Annotated[str, typer.Argument(help="A method or combination: its options.")] = "",
    families: Annotated[bool, typer.Option("--families", help="Which method fits which family of backbones.")] = False,
    json: opt.Json = False,
) -> None:
    """List the tuning methods by the survey's categories, or the options of one."""
    from remap.tuning import METHODS

    if name:
        _require_methods(name)
    if families:
        _families(name, json)
        return
    if name:
        _method(name, json)
        return
    rows = [_fields(row) for row in METHODS]
    if json:
        console.emit(rows)
        return
    columns: Columns = {
        "method": itemgetter("name"),
        "what is trained": itemgetter("summary"),
        "parameters": itemgetter("trainable_parameters"),
        "ViT-B/16": lambda row: _number(row["trainable_vit_base"]),
        "merges": lambda row: "yes" if row["mergeable"] else "no",
        "lr": lambda row: f"{row['learning_rate']:g}",
        "arXiv": arxiv,
    }
    formulas = "parameters: trained besides the head; L depth, D width, H MLP width, p prompts, r bottleneck or rank;\n"
    if console.out.width < WIDE:
        del columns["parameters"]
        formulas = ""
    list_rows(f"{len(rows)} tuning methods", rows, columns, ("ViT-B/16", "lr"), ("what is trained", "parameters"))
    console.line(
        f"{formulas}ViT-B/16: parameters trained there besides the head, with default options.\n"
        "merges: with default options, can be folded into plain timm weights.\n"
        "lr: default for AdamW at batch size 64 and width 128, else lr * 128 / width.\n"
        "Options of a method: remap methods NAME. Together: --method vpt_deep+lora."
    )
    _show_origins(rows)


def list_rows(
    title: str, rows: list[Row], columns: Columns, right: tuple[str, ...] = (), wrap: tuple[str, ...] = ()
) -> None:
    """Print rows in groups of their category."""
    groups = [row.get("kind") or row["category"].removesuffix(" tuning") for row in rows]
    cells = [(group, [cell(row) for cell in columns.values()]) for group, row in zip(groups, rows, strict=True)]
    names = list(columns)
    numbers = [tuple(names.index(name) for name in chosen if name in columns) for chosen in (right, wrap)]
    console.table(title, names, console.grouped(cells), *numbers)


def _show_origins(rows: list[Row]) -> None:
    """Say which rows of a listing other installed packages registered."""
    foreign = [f"{row['name']} ({row['origin']})" for row in rows if row["origin"] != BUILT_IN]
    if foreign:
        console.line(f"From other packages: {', '.join(foreign)}")


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def arxiv(row: Row) -> str:
    """Return the number of a row's paper."""
    return row["paper"].rpartition(" ")[2]


# Columns of the listings of category 5.
ABOUT: Columns = {"what it is": itemgetter("summary"), "where the models differ": itemgetter("mismatch")}


def _fields(row: "MethodEntry") -> dict[str, Any]:
    from remap.tuning import CATEGORIES

    return {
        "name": row.name,
        "category": CATEGORIES[row.category],
        "kind": row.kind,
        "summary": row.summary,
        "trainable_parameters": row.trains,
        "trainable_vit_base": row.vit_base,
        "mergeable": row.mergeable,
        "learning_rate": row.lr,
        "paper": row.paper,
        "origin": row.origin,
    }


def _require_methods(name: str) -> None:
    """Refuse what is not a method or a combination of methods."""
    from remap.errors import RecipeError
    from remap.tuning import method_problems, parts_of, rows_of

    if all(parts_of(name)) and "," not in name:
        rows_of(name)  # an unknown name says what is meant
    problems = method_problems("methods", name)
    if problems:
        raise RecipeError(problems, "command line")


def _method(name: str, json: bool) -> None:
    """Show one method, or several that are combined, with every option."""
    from remap.recipe.option_listing import notes_of, options_of
    from remap.tuning import rows_of

    rows, options, notes = rows_of(name), options_of(name), notes_of(name)
    if json:
        console.emit({"name": name, "methods": [_fields(row) for row in rows], "options": options, "notes": notes})
        return
    for row in rows:
        console.line(
            f"{row.name}: {row.summary} ({row.paper})\n"
            f"  trained   {row.trains}; on ViT-B/16 {_number(row.vit_base)}\n"
            f"  merges    {'yes' if row.mergeable else 'no'}, with default options\n"
            f"  lr        {row.lr:g} at width 128"
        )
    _show_options(options, "method", notes)


def _show_options(options: list[dict[str, Any]], section: str, notes: str = "") -> None:
    """Print the options of a method or loss, and how one is set."""
    from remap.recipe.option_listing import shown

    if not options:
        console.line("It has no options.")
        return
    console.table(
        "Options",
        ["option", "default", "takes", "what it is"],
        [[o["name"], shown(o["default"]), takes(o), o["about"]] for o in options],
        wrap=(2, 3),
    )
    if notes:
        console.line(notes)
    console.line(f"Set with --set {section}.{options[0]['name']}={shown(options[0]['default'])}")


def takes(option: dict[str, Any]) -> str:
    """Return in words what an option accepts."""
    words = ", ".join(map(str, option["allowed"] or ()))
    first, _, rest = option["type"].partition(" or ")
    if words:
        first = f"list of {words}" if first == "list" else words
    kind = f"{first} {option['limits']}".strip()
    return f"{kind}, or {rest}" if rest else kind


def _families(name: str, json: bool) -> None:
    """Show which family each method fits, or those that are named."""
    from remap.backbones.families import FAMILIES
    from remap.tuning import CATEGORIES, METHODS, rows_of

    chosen = rows_of(name) if name else list(METHODS)
    fields = ("name", "summary", "examples", "paper")
    families = [{field: getattr(row, field) for field in fields} for row in FAMILIES]
    support = {row.name: {family.name: row.fits(family.parts) for family in FAMILIES} for row in chosen}
    if json:
        console.emit({"families": families, "methods": [{"name": name, **fits} for name, fits in support.items()]})
        return
    rows = [{"name": row.name, "category": CATEGORIES[row.category], **support[row.name]} for row in chosen]
    columns: Columns = {"method": itemgetter("name")} | {family: _fits(family) for family in FAMILIES.names}
    if console.out.width < WIDE:
        words = "vision-language models (clip:NAME)"
        columns = {
            "method": itemgetter("name"),
            "fits": lambda row: ", ".join(filter(row.get, FAMILIES.names)) or words,
        }
    list_rows("Which method fits which family", rows, columns, wrap=("fits",))
    console.line("\n".join(f"{row.name:10}{row.summary}: {row.examples}" for row in FAMILIES))
    console.line("The conformance suite (tests/tuning) runs all that fit; any other pair is an error that names one.")


def _fits(family: str) -> Callable[[Row], str]:
    return lambda row: "yes" if row[family] else "-"


def losses(
    name: Annotated[str, typer.Argument(help="A loss: show it with its options.")] = "", json: opt.Json = False
) -> None:
    """List the loss terms that transfer the teacher's knowledge (category 5), or show one with its options."""
    from remap.remapping import LOSSES

    fields = ("name", "category", "summary", "paper", "needs", "mismatch", "mixed", "over_batch", "weight", "origin")
    rows = [{field: getattr(row, field) for field in fields} for row in LOSSES]
    if name:
        _loss(rows[LOSSES.names.index(LOSSES.row(name).name)], json)
        return
    if json:
        console.emit(rows)
        return
    columns: Columns = {"loss": itemgetter("name"), **ABOUT, "weight": lambda row: f"{row['weight']:g}", "arXiv": arxiv}
    list_rows(f"{len(rows)} loss terms", rows, columns, right=("weight",), wrap=tuple(ABOUT))
    console.line(
        "weight: default in the objective. All about one, with its options: remap losses NAME.\n"
        "The other parts of category 5, weights and architecture: remap remappings."
    )
    _show_origins(rows)


def _loss(row: dict[str, Any], json: bool) -> None:
    """Show one loss with every option."""
    from remap.recipe.option_listing import listed
    from remap.remapping import LOSSES

    facts = {
        "reads": row["needs"],
        "models differ": row["mismatch"],
        "mixed images": row["mixed"],
        "within a batch": "compares its images with each other" if row["over_batch"] else "each image by itself",
        "weight": f"{row['weight']:g}",
    }
    show_row(row, facts, listed(LOSSES, row["name"])["options"], f"losses.{row['name']}", json)


def show_row(row: Row, facts: dict[str, str], options: list[dict[str, Any]], section: str, json: bool) -> None:
    """Show one row with every option."""
    if json:
        console.emit({**row, "options": options})
        return
    paper = "" if row["paper"] == "-" else f" ({row['paper']})"
    lines = [f"  {name:15}  {value}" for name, value in facts.items()]
    console.line("\n".join([f"{row['name']}: {row['summary']}{paper}", *lines]))
    _show_options(options, section)
