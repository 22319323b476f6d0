"""``remap lr``: suggest a learning rate."""

from dataclasses import asdict
from typing import Any

from remap_cli import console
from remap_cli.options import LR, recipe_words, training_command

# Rows of the table, about.
_ROWS = 20


@training_command(LR)
def lr(values: dict[str, Any]) -> None:
    """Suggest train.lr for a method on your images: a few steps at growing rates; nothing is written.

    [dim]remap lr --student vit_small --method lora --data FOLDER[/dim]
    """
    from remap.errors import RecipeError
    from remap.recipe import resolve
    from remap.recipe.train_checks import require_no_processes

    keys = [setting.partition("=")[0].strip() for setting in values["settings"] or []]
    if rates := [key for key in keys if key in ("train.lr", "train.base_lr")]:
        raise RecipeError([f"--set {rates[0]}: the test tries rates of its own"], "command line")
    recipe = resolve(values["recipe"], recipe_words(values), values["settings"] or [])
    require_no_processes(recipe, "a range test")
    with console.Reporter() as progress:
        with progress.wait("loading PyTorch"):
            from remap.pipeline.find_lr import find_lr
        found = find_lr(recipe, steps=values["steps"], progress=progress)
    if values["json"]:
        console.emit(asdict(found))
        return
    every = max(1, len(found.rates) // _ROWS)
    shown = zip(found.rates[::every], found.losses[::every], strict=True)
    rows = [[f"{rate:.2e}", f"{loss:.4g}"] for rate, loss in shown]
    console.table("learning-rate range test", ["learning rate", "loss so far (mean)"], rows, right=(0, 1))
    console.line(f"suggested: --lr {found.suggested:.2g} (a tenth of {found.lowest:.2g}, where the loss was lowest)")
