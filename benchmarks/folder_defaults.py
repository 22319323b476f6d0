"""What a run on one's own images gains by augmentation and by a tuned teacher, judged by images that no page reports.

Run: python benchmarks/folder_defaults.py --sets DIR --results DIR [--methods lora vpt_deep] [--variants ...]
    [--names clothing fashion] [--seeds 1] [--table]

DIR holds the archives of when_a_teacher_pays.py; images to learn from and to judge by are those of
search_objective.py. A cell is a set, a method, a seed and a variant: an augmentation, and ``alone`` (labels only) or
how mini_teacher is prepared (``probe``, ``auto``), which then has the run's augmentation and epochs, and answers for
eight views of each image where they are augmented. All take 20 epochs at batch size 32. Several processes may run at
once; after a kill, remove the files *.claimed that have no result.
"""

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from search_objective import NAMES_OF_SETS, claims, search
from when_a_teacher_pays import VIEWS, Bench

METHODS = ("lora", "vpt_deep", "bitfit", "full")
AUGMENT, TEACHERS = ("none", "shift", "light"), ("alone", "probe", "auto")
VARIANTS = tuple(f"{augment} {teacher}" for teacher, augment in itertools.product(TEACHERS, AUGMENT))
EPOCHS, BATCH = 20, 32


def file_of(results: Path, name: str, method: str, variant: str, seed: int) -> Path:
    """Return where a cell's accuracy is written."""
    return results / f"{name}-{method}-{variant.replace(' ', '-')}-{seed}.json"


def run(name: str, method: str, variant: str, seed: int, results: Path) -> None:
    """Run one cell, unless another process has it."""
    done = file_of(results, name, method, variant, seed)
    if not claims(done):
        return
    augment, teacher = variant.split()
    data = {"source": str(results / "sets" / name), "augment": augment}
    words: dict[str, Any] = {"data": data, "seed": seed, "method": method}
    if teacher == "alone":
        words["losses"] = "ce"
    else:
        words["teacher"] = {"model": "mini_teacher", "prepare": teacher, "allow_weak": True}
        if augment != "none":
            data["views"] = VIEWS
    settings = [f"train.epochs={EPOCHS}", f"train.batch_size={BATCH}", f"train.eval_every={EPOCHS}"]
    started, folder = time.monotonic(), results / "runs" / done.stem
    summary = Bench.finish(folder, words, settings)
    found = {"accuracy": summary["student"]["accuracy"], "precision": summary["precision"]}
    found["teacher"] = summary["teacher"]["accuracy"] if teacher != "alone" else None
    done.write_text(json.dumps(found))
    print(f"{done.stem}: {found['accuracy']:.1%}, {found['teacher']}, {time.monotonic() - started:.0f} s", flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def table(results: Path, seeds: int) -> None:
    """Print accuracies in %, the teachers' in brackets, and each variant's mean difference to the first one."""
    print(f"| set | method | seed | {' | '.join(VARIANTS)} |\n|---|---|---|{'---:|' * len(VARIANTS)}")
    gains: dict[str, list[float]] = defaultdict(list)
    for method, name, seed in itertools.product(METHODS, NAMES_OF_SETS, range(1, seeds + 1)):
        files = {variant: file_of(results, name, method, variant, seed) for variant in VARIANTS}
        found = {variant: json.loads(file.read_text()) for variant, file in files.items() if file.exists()}
        if VARIANTS[0] not in found:
            continue
        shown = []
        for variant in VARIANTS:
            cell = found.get(variant)
            brackets = f" ({100 * cell['teacher']:.1f})" if cell and cell["teacher"] is not None else ""
            shown.append(f"{100 * cell['accuracy']:.1f}{brackets}" if cell else "-")
            if cell:
                gains[variant].append(100 * (cell["accuracy"] - found[VARIANTS[0]]["accuracy"]))
        print(f"| {name} | `{method}` | {seed} | {' | '.join(shown)} |")
    for variant, values in gains.items():
        print(f"- {variant}: {statistics.mean(values):+.2f} over {len(values)}, worst {min(values):+.1f}")


if __name__ == "__main__":

    def cell(name: str, method: str, variant: str, seed: int, options: argparse.Namespace) -> None:
        run(name, method, variant, seed, options.results)

    search(__doc__, "variants", VARIANTS, METHODS, cell, table)
