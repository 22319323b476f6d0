"""Where a teacher that knows more pays: an ImageNet classifier teaches small students photographs with few labels.

Run: python benchmarks/stronger_teacher.py --sets DIR --results DIR [--minutes 60] [--seeds 3] [--table]

DIR holds clothing.tar, ants-bees.tar and efficientnet_lite0.safetensors. Each cell is one run in a folder of its own; a
cell that has ended is not run again, and several such processes share the cells. ``--table`` prints what is there.
"""

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import remap
from remap.errors import RunError
from remap.pipeline.run import resume

SETS = {"clothing": 10, "ants-bees": 2}
LABELS = (50, 20, 100)
METHODS = ("lora", "full", "linear")
# Student -> weights, side in pixels. Random weights where none are shipped.
STUDENTS: dict[str, tuple[str, int | None]] = {
    "mini_student": ("pretrained", None),
    "mobilenetv4_conv_small": ("none", 64),
    "vit_tiny_patch16_224": ("none", 64),
    "tiny_vit_5m_224": ("none", 64),
}
TEACHER = ("tf_efficientnet_lite0", "efficientnet_lite0.safetensors", 128)
BATCH, STEPS = 32, 300


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

    def recipe(self, sets: Path, images: int) -> tuple[dict[str, Any], list[str]]:
        """Return options and settings; ``images`` is what one epoch sees: all cells take the same number of steps."""
        weights, side = STUDENTS[self.student]
        model, file, teacher_side = TEACHER
        options: dict[str, Any] = {
            "seed": self.seed,
            "data": {"source": str(sets / f"{self.images}.tar"), "labels": self.labels * SETS[self.images]},
            "student": {"model": self.student, "weights": weights, "image_size": side},
            "method": self.method,
            "losses": "ce,kd" if self.taught else "ce",
        }
        if self.taught:
            options["teacher"] = {
                "model": model,
                "weights": str(sets / file),
                "image_size": teacher_side,
                "prepare": "probe",
                "cache": "disk",
            }
        epochs = max(1, round(STEPS * BATCH / images))
        return options, [f"train.epochs={epochs}", f"train.batch_size={BATCH}", "train.eval_every=1000"]


def cells(seeds: int) -> Iterator[Cell]:
    """Yield all cells, the most telling ones first."""
    for labels, student, seed, images in itertools.product(LABELS, STUDENTS, range(seeds), SETS):
        for method, taught in itertools.product(METHODS, (True, False)):
            yield Cell(images, labels, student, method, taught, seed)


def run(cell: Cell, sets: Path, results: Path) -> None:
    """Run a cell, or resume it, unless it has ended or another process has it."""
    done, folder = results / f"{cell.name}.json", results / "runs" / cell.name
    if done.exists():
        return
    counts = {"clothing": 3068, "ants-bees": 244}
    images = counts[cell.images] if cell.taught else min(cell.labels * SETS[cell.images], counts[cell.images])
    try:
        options, settings = cell.recipe(sets, images)
        begun = (folder / "recipe.yaml").exists()
        result = resume(folder) if begun else remap.distill(options, settings=settings, output=folder)
        summary = result.summary
        student = summary["student"]
        accuracy = student.get("test_accuracy", student["accuracy"])
        found: dict[str, Any] = {"accuracy": accuracy, "seconds": summary["seconds"]}
        if cell.taught:
            found["teacher"] = summary["teacher"]["accuracy"]
    except RunError:
        return
    done.write_text(json.dumps(found))
    shutil.rmtree(folder, ignore_errors=True)


def table(results: Path, seeds: int) -> None:
    """Print accuracy in % as mean and standard deviation over the seeds that have ended."""
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
            if not found[True]:
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
    torch.set_num_threads(1)
    (options.results / "runs").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    if not options.table:
        for cell in cells(options.seeds):
            if time.monotonic() < end:
                run(cell, options.sets, options.results)
    table(options.results, options.seeds)


if __name__ == "__main__":
    main()
