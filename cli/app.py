"""The Typer application: every command, with its panel of the help.

Heavy imports happen inside the commands, so that help and listings need no torch.
"""

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from remap import __version__
from remap.errors import UnknownName
from remap_cli import (
    adapt,
    cache,
    compare,
    console,
    data,
    doctor,
    evaluate,
    export,
    extend,
    init,
    listings,
    lr,
    models,
    predict,
    recipes,
    recommend,
    repeat,
    report,
    shrink,
    tasks,
    training,
)
from remap_cli.options import LOOK, TRAIN, USE

# What other tools call their commands.
MEANT = {
    "train": "`remap distill` trains with a teacher, `remap tune` without one",
    "fit": "`remap distill` trains with a teacher, `remap tune` without one",
}


class Commands(TyperGroup):
    """The commands, and what is meant by some words that are none of them."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args and args[0] in MEANT:
            raise UnknownName(f"no such command '{args[0]}'", do=MEANT[args[0]])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except Exception as error:  # of a class that Typer does not export
            if ctx.invoked_subcommand == "tune" and getattr(error, "option_name", None) == "--teacher":
                raise UnknownName("`remap tune` has no --teacher", do="use `remap distill`") from None
            raise


app = typer.Typer(
    name="remap",
    cls=Commands,
    help="Distil a large vision transformer into a small one tuned by a parameter-efficient method.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(given: bool) -> None:
    if given:
        typer.echo(f"remap {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    warnings.showwarning = console.show_warning


START = (init.init, training.distill, training.tune, extend.extend, adapt.adapt)
for command in (*START, lr.lr, shrink.shrink, recommend.recommend, compare.compare):
    app.command(rich_help_panel=TRAIN)(command)
app.command("eval", rich_help_panel=USE)(evaluate.evaluate)
for command in (report.report, predict.predict, export.export, repeat.repeat):
    app.command(rich_help_panel=USE)(command)
app.add_typer(tasks.tasks, name="tasks", rich_help_panel=USE)
for command in (listings.methods, listings.losses, listings.remappings, models.models, doctor.doctor):
    app.command(rich_help_panel=LOOK)(command)
app.add_typer(data.data, name="data", rich_help_panel=LOOK)
app.add_typer(recipes.recipes, name="recipes", rich_help_panel=LOOK)
app.add_typer(cache.cache, name="cache", rich_help_panel=LOOK)
