"""What learning without labels gives a backbone: a linear probe and k-NN on its frozen features, before and after.

Run: python benchmarks/label_free.py --sets DIR --results DIR [--seeds 3] [--recipe label_free] [--set FIELD=VALUE]

DIR holds clothing.tar and efficientnet_lite0.safetensors. The student learns from the 3,068 training photographs as
from images without labels; their labels, and those of the validation and test photographs, judge it only. A run that
was stopped is resumed, one that has ended is read; the table is printed at the end.
"""

import argparse
import os
import statistics
import tarfile
from pathlib import Path
from typing import Any

import torch

from remap.pipeline.run import resume, start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import resolve_distill

TEACHER, SIDE = "tf_efficientnet_lite0", 96


def judged(options: argparse.Namespace, seed: int, shared: SharedResources) -> dict[str, Any]:
    """Return what ``judge`` found before and after a run."""
    images, folder = options.results / "clothing", options.results / f"seed-{seed}"
    if (folder / "recipe.yaml").exists():
        return resume(folder, Silent()).summary["student"]["judged"]
    words = {"unlabeled": str(images / "train"), "data": str(images), "teacher": TEACHER, "seed": seed}
    weights = f"teacher.weights={options.sets / 'efficientnet_lite0.safetensors'}"
    settings = [weights, f"teacher.image_size={SIDE}", *options.settings]
    recipe = resolve_distill(options.recipe, words, settings)
    return start(recipe, folder, Silent(), shared).summary["student"]["judged"]


def main() -> None:
    """Run what is missing, then print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--sets", type=Path, required=True)
    words.add_argument("--results", type=Path, required=True)
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--recipe", default="label_free")
    words.add_argument("--set", dest="settings", action="append", default=[])
    options = words.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not (options.results / "clothing").exists():
        with tarfile.open(options.sets / "clothing.tar") as tar:
            tar.extractall(options.results / "clothing", filter="data")
    shared = SharedResources()
    found = [judged(options, seed, shared) for seed in range(options.seeds)]
    print("| % correct | start | after, mean ± standard deviation | each seed |\n|---|---|---|---|")
    for judge, split in (("linear_probe", "val"), ("linear_probe", "test"), ("knn", "val"), ("knn", "test")):
        before, after = ([100 * one[when][split][judge] for one in found] for when in ("before", "after"))
        spread = f" ± {statistics.stdev(after):.1f}" if len(after) > 1 else ""
        each = ", ".join(f"{value:.1f}" for value in after)
        print(f"| {judge}, {split} | {before[0]:.1f} | {statistics.mean(after):.1f}{spread} | {each} |")


if __name__ == "__main__":
    main()
