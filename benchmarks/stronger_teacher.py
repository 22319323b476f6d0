"""Where a teacher that knows more pays: an ImageNet classifier teaches small students photographs with few labels.

Run: python benchmarks/stronger_teacher.py --sets DIR --results DIR [--minutes 60] [--seeds 3]
    [--steps 2000] [--images clothing] [--students mini_student] [--methods lora full] [--labels 20] [--table]

DIR holds clothing.tar, ants-bees.tar and efficientnet_lite0.safetensors. Each cell is one run of about ``--steps``
steps of 32 images. A cell that has ended is a line of cells.jsonl and is not run again; one that was stopped starts
anew. Cells of one set and student follow each other and share images, teachers and their outputs. ``--table`` prints
complete rows. What was measured so far lies in results/stronger_teacher.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remap.errors import RunError, TrainingError
from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import Recipe, resolve_distill

# Set -> classes, training images.
SETS = {"clothing": (10, 3068), "ants-bees": (2, 244)}
LABELS = (20, 50, 100)
METHODS = ("lora", "full", "linear")
# Student -> weights, side in pixels. Random weights where none are shipped.
STUDENTS: dict[str, tuple[str, int | None]] = {
    "mini_student": ("pretrained", None),
    "mobilenetv4_conv_small": ("none", 64),
    "vit_tiny_patch16_224": ("none", 64),
    "tiny_vit_5m_224": ("none", 32),
}
# Windows as large as the maps of 32 pixels; as built they are padded to 14 x 14, which costs many times as much.
ARGUMENTS = {"tiny_vit_5m_224": {"window_sizes": [4, 4, 2, 1]}}
# The defaults are for weights that know something, and fall with the width.
RATES_FROM_RANDOM = {"full": 1e-3, "lora": 3e-3, "linear": 1e-1}
TEACHER, TEACHER_FILE, TEACHER_SIDE = "tf_efficientnet_lite0", "efficientnet_lite0.safetensors", 96
BATCH = 32
CELLS = "cells.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run."""

    images: str
    labels: int
    student: str
    method: str
    taught: bool
    seed: int
    steps: int

    @property
    def name(self) -> str:
        taught = "taught" if self.taught else "alone"
        return f"{self.images}-{self.labels}-{self.student}-{self.method}-{taught}-{self.seed}-{self.steps}"

    def recipe(self, sets: Path, results: Path) -> Recipe:
        """Return the recipe; all cells take about as many steps, however many images an epoch has."""
        (weights, side), (classes, images) = STUDENTS[self.student], SETS[self.images]
        words: dict[str, Any] = {
            "seed": self.seed,
            "data": {"source": str(sets / f"{self.images}.tar"), "labels": self.labels * classes},
            "student": {"model": _model(self.student, results), "weights": weights, "image_size": side},
            "method": self.method,
            "losses": "ce,kd" if self.taught else "ce",
        }
        if self.taught:
            file = str(sets / TEACHER_FILE)
            words["teacher"] = {"model": TEACHER, "weights": file, "image_size": TEACHER_SIDE, "cache": "disk"}
        seen = images if self.taught else min(self.labels * classes, images)
        epochs = round(self.steps / (seen // BATCH))
        settings = [f"train.epochs={epochs}", f"train.batch_size={BATCH}", f"train.eval_every={epochs}"]
        if weights == "none":
            settings.append(f"train.lr={RATES_FROM_RANDOM[self.method]}")
        return resolve_distill(None, words, settings)


def _model(name: str, results: Path) -> str:
    """Return a name of timm, or a folder that says with which arguments timm builds it."""
    if name not in ARGUMENTS:
        return name
    folder = results / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architecture": name, "pretrained_cfg": {}, "model_args": ARGUMENTS[name]}
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def rows(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Yield set, student, method and labels a class of the rows of the table that were asked for."""
    for student, images in itertools.product(options.students, options.images):
        yield from ((images, student, *one) for one in itertools.product(options.methods, options.labels))


def cells(row: tuple[str, str, str, int], options: argparse.Namespace) -> list[tuple[Cell, Cell]]:
    """Return the cells of a row, with and without the teacher, by seed."""
    images, student, method, labels = row
    return [
        tuple(Cell(images, labels, student, method, taught, seed, options.steps) for taught in (True, False))
        for seed in range(options.seeds)
    ]


def ended(results: Path) -> dict[str, dict[str, Any]]:
    """Return what cells gave, by their names."""
    path = results / CELLS
    lines = path.read_text().splitlines() if path.exists() else []
    return {found.pop("cell"): found for found in map(json.loads, lines)}


def run(cell: Cell, sets: Path, results: Path, shared: SharedResources) -> None:
    """Run a cell, and write what it gave."""
    folder = results / "runs" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    summary = start(cell.recipe(sets, results), folder, Silent(), shared).summary
    student = summary["student"]
    accuracy = student.get("test_accuracy", student["accuracy"])
    found: dict[str, Any] = {"cell": cell.name, "accuracy": accuracy, "seconds": summary["seconds"]}
    if cell.taught:
        found["teacher"] = summary["teacher"]["accuracy"]
    with (results / CELLS).open("a") as file:
        file.write(json.dumps(found) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


def table(options: argparse.Namespace) -> None:
    """Print a table of each set: accuracy in % without and with the teacher, where all seeds of both have ended."""
    known = ended(options.results)
    for images in options.images:
        teachers: dict[int, list[float]] = {count: [] for count in options.labels}
        lines = []
        for student, method in itertools.product(options.students, options.methods):
            texts = []
            for labels in options.labels:
                pairs = [
                    tuple(known.get(cell.name) for cell in pair)
                    for pair in cells((images, student, method, labels), options)
                ]
                complete = all(one is not None for pair in pairs for one in pair)
                texts.append(both(pairs) if complete else "-")
                teachers[labels] += [100 * pair[0]["teacher"] for pair in pairs if complete and pair[0]]
            if set(texts) != {"-"}:
                lines.append(" | ".join((f"| `{student}`", f"`{method}`", *texts)) + " |")
        if lines:
            known_of = [f"{statistics.mean(found):.1f}" if found else "-" for found in teachers.values()]
            columns = " | ".join(f"{count} labels a class" for count in options.labels)
            print(f"| {images} | method | {columns} |")
            print("|---|---|" + "---|" * len(options.labels))
            print("| the teacher | | " + " | ".join(known_of) + " |")
            print(*lines, "", sep="\n")


def both(pairs: list[tuple[dict[str, Any] | None, ...]]) -> str:
    """Return "alone -> taught, difference" of the seeds of a row."""
    taught, alone = ([100 * one["accuracy"] for one in side if one] for side in zip(*pairs, strict=True))
    gains = [with_one - without for with_one, without in zip(taught, alone, strict=True)]
    return f"{statistics.mean(alone):.1f} → {statistics.mean(taught):.1f}, {spread(gains, '+')}"


def spread(values: list[float], sign: str = "") -> str:
    """Return mean ± standard deviation; one value alone has no spread."""
    mean = format(statistics.mean(values), f"{sign}.1f")
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Run what is missing, then print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--sets", type=Path, required=True)
    words.add_argument("--results", type=Path, required=True)
    words.add_argument("--minutes", type=float, default=60.0)
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--steps", type=int, default=200)
    words.add_argument("--images", nargs="+", default=list(SETS), choices=list(SETS))
    words.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    words.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    words.add_argument("--labels", nargs="+", type=int, default=list(LABELS))
    words.add_argument("--table", action="store_true")
    options = words.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    end, known = time.monotonic() + 60 * options.minutes, ended(options.results)
    before, shared = None, SharedResources()
    for row in () if options.table else rows(options):
        if row[:2] != before:
            before, shared = row[:2], SharedResources()
        for cell in itertools.chain.from_iterable(cells(row, options)):
            if time.monotonic() < end and cell.name not in known:
                try:
                    run(cell, options.sets, options.results, shared)
                except (RunError, TrainingError) as error:
                    print(f"{cell.name}: {error}", flush=True)
    table(options)


if __name__ == "__main__":
    main()
