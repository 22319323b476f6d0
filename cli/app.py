"""The Typer application: every command, with its panel of the help.

Heavy imports happen inside the commands, so that help and listings need no torch.
"""

from typing import Annotated

import typer

from remap import __version__
from remap_cli import cache, compare, doctor, evaluate, listings, models, predict, recipes, repeat, shrink, training
from remap_cli.options import LOOK, TRAIN, USE

app = typer.Typer(
    name="remap",
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
    pass


for command in (training.distill, training.tune, shrink.shrink, compare.compare):
    app.command(rich_help_panel=TRAIN)(command)
app.command("eval", rich_help_panel=USE)(evaluate.evaluate)
for command in (predict.predict, repeat.repeat):
    app.command(rich_help_panel=USE)(command)
for command in (listings.methods, listings.losses, listings.remappings, models.models, doctor.doctor):
    app.command(rich_help_panel=LOOK)(command)
app.add_typer(recipes.recipes, name="recipes", rich_help_panel=LOOK)
app.add_typer(cache.cache, name="cache", rich_help_panel=LOOK)
