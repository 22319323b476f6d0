"""``remap models``: names of backbones, and what one of them can do."""

from typing import Annotated

import typer

from remap.errors import RecipeError, UnknownName
from remap.io.paths import expanded
from remap_cli import console
from remap_cli import options as opt


def models(
    search: Annotated[str, typer.Argument(help="Part of a timm name: also list those (imports timm).")] = "",
    support: Annotated[
        str,
        typer.Option("--support", metavar="NAME", help="What this model can teach, and what tunes it (imports torch)."),
    ] = "",
    json: opt.Json = False,
) -> None:
    """List built-in models. With a search word, also list matching timm models."""
    from remap.backbones.families import FAMILIES
    from remap.backbones.names import MODELS

    if search and support:
        what = f"--support: is about one model alone (leave '{search}' out, which lists models)"
        raise RecipeError([what], "command line")
    if support:
        _support(support, json)
        return
    rows = [
        {"name": name, "timm": m.timm, "parameters_m": m.parameters, "input": m.pixels, "weights": m.weights}
        for name, m in MODELS.items()
        if search in name or search in m.timm
    ]
    others = _found(search, bool(rows)) if search else []
    if json:
        console.emit({"short_names": rows, "timm": others})
        return
    if rows:
        console.table(
            "Backbones by short name (parameters without head)",
            ["name", "timm name", "size", "pixels", "weights"],
            [[r["name"], r["timm"], f"{r['parameters_m']} M", r["input"], r["weights"]] for r in rows],
            right=(2, 3),
            wrap=(4,),
        )
    if others:
        console.table(
            "timm (remap models --support NAME says more)",
            ["name", "weights", "read as", "teaches", "tuned by"],
            [
                [
                    o["name"],
                    "yes" if o["weights"] else "no",
                    o["family"],
                    ", ".join(o["teaches"]),
                    f"{o['methods']} methods",
                ]
                for o in others
            ],
            wrap=(1, 2, 3, 4),  # names stay whole
        )
    if not others:
        console.line(
            "Any model of timm works by its own name (remap models WORD lists them):\n"
            + "".join(f"  {row.summary}: {row.examples}\n" for row in FAMILIES)
            + "and so do local-dir:FOLDER, hf-hub:REPOSITORY, and a run directory."
        )


def _found(search: str, has_short_name: bool) -> list[dict]:
    """Return models of timm: tags of weights, and architectures that have none.

    Raises:
        UnknownName: There is no such model, nor a short name.
    """
    import timm

    from remap.backbones.families import FAMILIES, signals_of
    from remap.backbones.lookup import family_of_name
    from remap.backbones.names import MODELS
    from remap.registry import did_you_mean
    from remap.tuning import METHODS

    tags = timm.list_models(f"*{search}*", pretrained=True)
    with_weights = {tag.partition(".")[0] for tag in tags}
    bare = [name for name in timm.list_models(f"*{search}*") if name not in with_weights]
    if not (tags or bare or has_short_name):
        raise UnknownName(
            f"no model of timm has '{search}' in its name{did_you_mean(search, [*MODELS, *timm.list_models()])}",
            do="`remap models` shows the families; `remap models vit` lists names with a word in them",
        )
    found = []
    for name in (*tags, *bare):
        row = FAMILIES.row(family_of_name(name) or "generic")
        fitting = sum(method.fits(row.parts) for method in METHODS)
        known = {"name": name, "weights": name not in bare, "family": row.name}
        found.append({**known, "teaches": signals_of(row.parts), "methods": fitting})
    return found


def _support(name: str, json: bool) -> None:
    from remap.recipe.paths import absolute_model, is_run
    from remap.runs.task_file import folder_of, read_meta
    from remap.tuning.support import support_of

    while is_run(name):  # its method is merged into the model that it tuned
        name = read_meta(folder_of(expanded(name))).backbone.model
    found = support_of(absolute_model(name))
    anatomy = found.anatomy
    if json:
        stages = [{"width": block.width, "grid": list(block.grid)} for block in anatomy.blocks]
        facts = {"name": name, "family": anatomy.family, "image_size": list(anatomy.image_size), "blocks": stages}
        console.emit({**facts, "teaches": found.teaches, "tuned_by": found.tuned_by, "refused": found.refused})
        return
    console.line(f"{name} is read as '{anatomy.family}', images of {' x '.join(map(str, anatomy.image_size))} pixels")
    shapes = dict.fromkeys(f"{one.grid[0]} x {one.grid[1]} of {one.width}" for one in anatomy.blocks)
    console.line(f"teaches:  {', '.join(found.teaches)}; {anatomy.depth} blocks with maps {', '.join(shapes)}")
    console.line(f"tuned by: {', '.join(found.tuned_by)}")
    reasons: dict[str, list[str]] = {}
    for method, reason in found.refused.items():
        reasons.setdefault(reason.replace(method, "it", 1), []).append(method)
    for reason, methods in reasons.items():
        console.line(f"not by {', '.join(methods)}: {reason}")
