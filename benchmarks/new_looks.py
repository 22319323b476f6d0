"""Losses of `--target` on images whose look was changed on purpose: the table in docs/new-camera.md.

Run: python benchmarks/new_looks.py --sets DIR --results DIR [--seeds 2] [--losses infomax,mmd,coral,mean_teacher]

DIR holds fashion-mnist.tar and cifar10-train.tar, of which the training part alone is read: the first 100 images a
class have labels, the next 100 are those of the new look without labels, 80 more check. Fashion-MNIST is turned by 25
degrees and blurred, CIFAR-10 made pale, bright and noisy. A cell that has ended is a line of DIR/cells.jsonl and is not
run again.
"""

import argparse
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

import remap
from remap.recipe import resolve

# Images a class: with labels, without, to check.
PARTS = {"source": 100, "target": 100, "check": 80}
SIDE, EPOCHS = 32, 8


def turned(image: Image.Image) -> Image.Image:
    return image.convert("L").resize((SIDE, SIDE)).rotate(25).filter(ImageFilter.GaussianBlur(1))


def pale(image: Image.Image) -> Image.Image:
    image = ImageEnhance.Contrast(image.convert("RGB")).enhance(0.35)
    pixels = np.asarray(ImageEnhance.Color(image).enhance(0.2), dtype=np.float32)
    noise = np.random.default_rng(0).normal(0.0, 12.0, pixels.shape)
    return Image.fromarray((pixels + noise + 40).clip(0, 255).astype(np.uint8))


LOOKS: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "fashion-mnist": ("fashion-mnist.tar", turned),
    "cifar10": ("cifar10-train.tar", pale),
}


def write(archive: Path, folder: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    """Write FOLDER/source, target and check as class folders, once."""
    if folder.is_dir():
        return
    of_part = [part for part, count in PARTS.items() for _ in range(count)]
    seen: Counter[str] = Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if not member.isfile() or "test" in path.parts or path.suffix not in (".png", ".jpg"):
                continue
            number = seen[path.parent.name]
            seen[path.parent.name] += 1
            file = tar.extractfile(member)
            if number >= len(of_part) or file is None:
                continue
            part, image = of_part[number], Image.open(io.BytesIO(file.read()))
            to = folder / part / path.parent.name
            to.mkdir(parents=True, exist_ok=True)
            (image if part == "source" else change(image)).save(to / f"{path.stem}.png")


def accuracy(images: Path, loss: str | None, seed: int, run: Path) -> float:
    """Train on one look's labels, adapting by a loss or by none, and return the accuracy on the other look in %."""
    words = {"data": str(images / "source"), "val_data": str(images / "check"), "student": "mini_student", "seed": seed}
    words |= {"method": "lora", "epochs": EPOCHS, "batch_size": 32, "losses": "ce" if loss is None else f"ce,{loss}"}
    words |= {} if loss is None else {"target": str(images / "target")}
    recipe = resolve(words=words, settings=[f"train.eval_every={EPOCHS}"])
    return 100 * remap.distill(recipe, output=run).summary["student"]["accuracy"]


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--losses", default="infomax,mmd,coral,mean_teacher")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    options.results.mkdir(parents=True, exist_ok=True)
    record, columns = options.results / "cells.jsonl", [None, *options.losses.split(",")]
    lines = record.read_text().splitlines() if record.is_file() else []
    found = {(one["set"], one["loss"], one["seed"]): one["accuracy"] for one in map(json.loads, lines)}
    for seed in range(options.seeds):
        for name, (archive, change) in LOOKS.items():
            write(options.sets / archive, options.results / name, change)
            for loss in columns:
                key = (name, loss, seed)
                if key not in found:
                    run = options.results / "runs" / f"{name}-{loss or 'source'}-{seed}"
                    found[key] = accuracy(options.results / name, loss, seed, run)
                    cell = {"set": name, "loss": loss, "seed": seed, "accuracy": found[key]}
                    with record.open("a") as file:
                        file.write(json.dumps(cell) + "\n")
    print("| images | source only |" + "".join(f" `{loss}` |" for loss in columns[1:]))
    print("|---" * (len(columns) + 1) + "|")
    for name in LOOKS:
        cells = [", ".join(f"{found[name, loss, seed]:.1f}" for seed in range(options.seeds)) for loss in columns]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
