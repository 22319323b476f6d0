"""``remap models``: names of backbones."""

from typing import Annotated

import typer

from remap_cli import console
from remap_cli import options as opt


def models(
    search: Annotated[str, typer.Argument(help="Part of a timm name: also list those (imports timm).")] = "",
    json: opt.Json = False,
) -> None:
    """List built-in models. With a search word, also list matching timm models."""
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
        console.emit({"short_names": rows, "timm": others, "left_out": left_out})
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
        console.line("timm, with pre-trained weights:\n  " + "\n  ".join(others))
    if left_out:
        console.line(
            f"{left_out} more of timm with '{search}' in the name are of families that remap does not support."
        )
    if not others:
        if search and not (rows or left_out):
            console.line(f"No model of timm with pre-trained weights has '{search}' in its name.")
        console.line(
            "Any model of timm of these families works by its own name (remap models WORD lists them):\n"
            + "".join(f"  {row.summary}: {row.examples}\n" for row in FAMILIES)
            + "and so do local-dir:FOLDER, hf-hub:REPOSITORY, and a run directory."
        )
