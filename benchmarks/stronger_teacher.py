"""Where a teacher that knows more pays: an ImageNet classifier teaches small students photographs with few labels.

Run: python benchmarks/stronger_teacher.py --sets DIR --results DIR [--minutes 60] [--seeds 3] [--table]

DIR holds clothing.tar, ants-bees.tar and efficientnet_lite0.safetensors. Each cell is one run of about 200 steps of 32
images. A cell that has ended is one JSON file and is not run again; one that was stopped starts anew. Cells of one set
and student follow each other and share images, teachers and their outputs. ``--table`` prints complete rows.
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
    "tiny_vit_5m_224": ("none", 64),
}
# Windows as large as the maps of 64 pixels; as built they are padded to 14 x 14, which costs four times as much.
ARGUMENTS = {"tiny_vit_5m_224": {"window_sizes": [8, 8, 4, 2]}}
# The defaults are for weights that know something, and fall with the width.
RATES_FROM_RANDOM = {"full": 1e-3, "lora": 3e-3, "linear": 1e-1}
TEACHER, TEACHER_FILE, TEACHER_SIDE = "tf_efficientnet_lite0", "efficientnet_lite0.safetensors", 96
BATCH, STEPS = 32, 200


@dataclass(frozen=True)
class Cell:
    """One run."""

    images: str
    labels: int
    student: str
    method: str
    taught: bool
    seed: int

    @property
    def name(self) -> str:
        taught = "taught" if self.taught else "alone"
        return f"{self.images}-{self.labels}-{self.student}-{self.method}-{taught}-{self.seed}"

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
        epochs = round(STEPS / (seen // BATCH))
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


def slices(seeds: int) -> Iterator[list[Cell]]:
    """Yield the cells of one set and student, which give complete rows of the table."""
    for student, images in itertools.product(STUDENTS, SETS):
        rows = itertools.product(LABELS, METHODS, range(seeds), (True, False))
        yield [Cell(images, labels, student, method, taught, seed) for labels, method, seed, taught in rows]


def run(cell: Cell, sets: Path, results: Path, shared: SharedResources) -> None:
    """Run a cell, and write what it gave."""
    folder = results / "runs" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    summary = start(cell.recipe(sets, results), folder, Silent(), shared).summary
    student = summary["student"]
    accuracy = student.get("test_accuracy", student["accuracy"])
    found: dict[str, Any] = {"accuracy": accuracy, "seconds": summary["seconds"]}
    if cell.taught:
        found["teacher"] = summary["teacher"]["accuracy"]
    (results / f"{cell.name}.json").write_text(json.dumps(found))
    shutil.rmtree(folder, ignore_errors=True)


def table(results: Path, seeds: int) -> None:
    """Print accuracy in % as mean and standard deviation over the seeds, where all of them have ended."""
    for images in SETS:
        print(
            f"\n{images}\n\n| student | method | labels a class | alone | with teacher | difference | teacher | seeds |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for student, method, labels in itertools.product(STUDENTS, METHODS, sorted(LABELS)):
            found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
            for seed in range(seeds):
                files = {t: results / f"{Cell(images, labels, student, method, t, seed).name}.json" for t in found}
                if all(file.exists() for file in files.values()):
                    for taught, file in files.items():
                        found[taught].append(json.loads(file.read_text()))
            if len(found[True]) < seeds:
                continue
            taught, alone = ([100 * one["accuracy"] for one in found[side]] for side in (True, False))
            gains = [with_one - without for with_one, without in zip(taught, alone, strict=True)]
            teacher = statistics.mean(100 * one["teacher"] for one in found[True])
            row = [
                f"`{student}`",
                f"`{method}`",
                labels,
                spread(alone),
                spread(taught),
                spread(gains, "+"),
                f"{teacher:.1f}",
            ]
            print("| " + " | ".join(map(str, [*row, len(taught)])) + " |")


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
    words.add_argument("--table", action="store_true")
    options = words.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    (options.results / "runs").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for cells in [] if options.table else slices(options.seeds):
        shared = SharedResources()
        for cell in cells:
            if time.monotonic() < end and not (options.results / f"{cell.name}.json").exists():
                try:
                    run(cell, options.sets, options.results, shared)
                except (RunError, TrainingError) as error:
                    print(f"{cell.name}: {error}", flush=True)
    table(options.results, options.seeds)


if __name__ == "__main__":
    main()
