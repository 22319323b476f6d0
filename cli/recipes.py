"""``remap recipes``: list, print, copy and check recipes."""

import os
import shlex
from typing import Annotated

import typer

from remap_cli import console
from remap_cli import options as opt

recipes = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)


@recipes.command("ls")
def recipes_ls(json: opt.Json = False) -> None:
    """List the shipped recipes."""
    from remap.recipe import catalogue

    rows = [{"name": name, "summary": catalogue.summary(name)} for name in catalogue.names()]
    if json:
        console.emit(rows)
    else:
        console.table("Shipped recipes", ["name", "what it does"], [[r["name"], r["summary"]] for r in rows], wrap=(1,))


@recipes.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="A shipped name or a YAML file.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="With every default written out.")] = False,
) -> None:
    """Print a recipe."""
    from remap.errors import RecipeError
    from remap.io.names import plain
    from remap.recipe import catalogue, dump, resolve, strict_yaml

    text = dump(resolve(name, check_options=False)) if resolved else strict_yaml.read_text(catalogue.find(name))
    typer.echo(plain(text, keep="\n\t"), nl=False)
    if name.endswith((".yaml", ".yml")) and not resolved:
        try:
            resolve(name)
        except RecipeError as error:
            console.note(f"this recipe cannot be used:\n{error}")


@recipes.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    to: Annotated[str, typer.Argument(help="File or folder to copy to.")] = ".",
) -> None:
    """Copy a shipped recipe to edit it."""
    from remap.errors import RecipeError, RunError
    from remap.io.atomic_write import make_folder, write_text
    from remap.io.names import plain
    from remap.io.paths import expanded, path_problem
    from remap.recipe import catalogue, strict_yaml

    source, target = catalogue.find(name), expanded(to)
    target = target / source.name if os.path.isdir(target) else target
    unfit = path_problem(target)
    if unfit:
        raise RecipeError([plain(f"cannot be made: {unfit}")], plain(str(target)))
    catalogue.require_findable(target)
    if os.path.lexists(target):
        raise RecipeError(["exists already and was not changed; name another file"], str(target))
    command = "distill" if "teacher" in strict_yaml.read_mapping(source) else "tune"
    try:
        make_folder(target.parent)
        write_text(target, strict_yaml.read_text(source))
    except RunError as error:
        elsewhere = "name a file or folder where it can be written: remap recipes copy NAME FILE"
        raise RunError(error.what, given=error.given, do=elsewhere) from error
    console.note(f"wrote {target}; run it with: remap {command} --recipe {shlex.quote(str(target))}")


@recipes.command("validate")
def recipes_validate(names: Annotated[list[str], typer.Argument(help="Shipped names or YAML files.")]) -> None:
    """Check recipes without training, including the options of methods and losses."""
    from remap.errors import RecipeError, RemapError
    from remap.recipe import resolve

    broken: list[str] = []
    for name in names:
        try:
            resolve(name)
            console.line(f"{name}: ok")
        except RecipeError as error:
            broken.append(str(error))
    if broken:
        raise RemapError("\n".join(broken))
