"""``remap doctor``: check the machine."""

import typer

from remap_cli import console
from remap_cli import options as opt


def doctor(json: opt.Json = False) -> None:
    """Check this machine: versions, devices, precision, caches and disk. Exit code 2 where something is missing."""
    from remap.pipeline.doctor import examine

    found = examine()
    if json:
        console.emit(found)
    else:
        console.table(
            "remap doctor",
            ["", "what", "found"],
            [[r["state"], r["what"], r["found"]] for r in found["checks"]],
            wrap=(2,),
        )
    if not found["ok"]:
        raise typer.Exit(2)
