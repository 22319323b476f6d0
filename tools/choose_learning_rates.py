"""Choose each method's default learning rate on 200 of the training digits, training on the other 800.

The evaluation digits are never used. For every method the grid is searched from the present default towards the
better neighbour until neither neighbour is better. Of the rates tried, the smallest within three images of the best is
taken: with 200 images that is not a difference, and larger rates are less robust. Results are saved in a JSON file, so
that the search can be interrupted and extended.

    python tools/choose_learning_rates.py --out lr.json [--methods lora,ssf] [--seeds 1]
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from remap.data.sources import open_data
from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import Recipe, resolve
from remap.tuning import METHODS

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def training_digits(folder: Path) -> None:
    """The embedded training split as a folder of class folders."""
    split = open_data("digits", None, 0.5).train
    for index, label in enumerate(split.labels):
        target = folder / str(label)
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{index:04d}.png").write_bytes(split.read(index))


def recipe_of(folder: Path, method: str, lr: float, seed: int, epochs: int) -> Recipe:
    """Labels only, the embedded student, batch 64, bf16 (which CPUs with bf16 units run twice as fast)."""
    words = {"data": str(folder), "method": method, "losses": "ce", "lr": lr, "epochs": epochs, "seed": seed}
    settings = ["data.val_fraction=0.2", "train.precision=bf16", f"train.eval_every={epochs}", "name=search"]
    return resolve(None, {"student": "mini_student", **words}, settings)


def walk(accuracy_at: Callable[[float], float], grid: tuple[float, ...], first: float) -> None:
    """Try rates from ``first`` on, up to one whose neighbours are not better."""
    best = min(range(len(grid)), key=lambda index: abs(np.log(grid[index] / first)))
    while True:
        near = [index for index in (best - 1, best, best + 1) if 0 <= index < len(grid)]
        found = max(near, key=lambda index: (accuracy_at(grid[index]), -index))
        if found == best:
            return
        best = found


def choose(tried: Mapping[str, float]) -> float:
    """The smallest rate within 1.5 points of the best."""
    return min(float(lr) for lr, accuracy in tried.items() if accuracy >= max(tried.values()) - 0.015)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(row.name for row in METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    bench = SharedResources()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "digits"
        training_digits(folder)
        for method in arguments.methods.split(","):
            tried = results.setdefault(method, {})

            def accuracy_at(lr: float, method: str = method, tried: dict = tried) -> float:
                if f"{lr:g}" not in tried:
                    found = []
                    for seed in range(arguments.seeds):
                        recipe = recipe_of(folder, method, lr, seed, arguments.epochs)
                        output = Path(temporary) / f"{method}-{lr:g}-{seed}"
                        try:
                            found.append(start(recipe, output, Silent(), bench).summary["student"]["accuracy"])
                        except Exception as error:  # a rate at which the loss is not finite is a bad rate
                            print(method, lr, error, flush=True)
                            found.append(0.0)
                    tried[f"{lr:g}"] = float(np.mean(found))
                    arguments.out.write_text(json.dumps(results, indent=1))
                return tried[f"{lr:g}"]

            try:
                walk(accuracy_at, GRID, METHODS.row(method).lr)
            except Exception as error:
                print(f"{method:18} failed: {error}", flush=True)
                continue
            shown = ", ".join(f"{float(lr):g}: {100 * tried[lr]:.1f}" for lr in sorted(tried, key=float))
            print(f"{method:18} {choose(tried):g}   ({shown})", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
