"""Preparing a probed teacher and caching its outputs: one pass over the training images against one for each.

python benchmarks/one_pass.py --data digits --teacher mini_teacher --student mini_student

Processor time of one process, both ways in turns, nothing read from or left in the cache of the user. "images" counts
what passes through the teacher's forward pass.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from remap.network import Runner
from remap.pipeline import components as building
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import teachers_in_training
from remap.progress import Silent
from remap.recipe import Recipe, resolve
from remap.runs.run_dir import RunDir

forward, run_once = Runner.forward, building.run_once
seen = [0]


def count(self: Runner, images: Any, kept: Any = None) -> Any:
    seen[0] += len(images)
    return forward(self, images, kept)


def prepare(recipe: Recipe, shared: SharedResources, once: bool) -> tuple[float, int]:
    """Return seconds and images of preparing teacher and outputs, once the images are decoded."""
    building.run_once = run_once if once else lambda *_: None
    seen[0] = 0
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir.create(Path(folder) / "run", recipe)
        fresh = SharedResources(data=shared.data, views=shared.views, use_stored_teachers=False)
        for views in fresh.views.values():
            views.evaluations.clear()
        started = time.process_time()
        components = building.build_components(recipe, run_dir, Silent(), fresh)
        teachers_in_training(components, fresh, Silent())
        return time.process_time() - started, seen[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--teacher", default="mini_teacher")
    parser.add_argument("--student", default="mini_student")
    parser.add_argument("--losses", default="ce,kd,attention")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["REMAP_CACHE"] = cache
        Runner.forward = count  # type: ignore[method-assign]
        words = {name: getattr(given, name) for name in ("data", "teacher", "student", "losses")}
        recipe = resolve(words=words, settings=["teacher.prepare=probe", "data.augment=none", "baseline=false"])
        recipe, shared = recipe.written_out(), SharedResources()
        prepare(recipe, shared, True)  # decodes and warms up
        pairs = [(prepare(recipe, shared, False), prepare(recipe, shared, True)) for _ in range(given.repeats)]
    two, one = (median(seconds for seconds, _ in side) for side in zip(*pairs, strict=True))
    ratios = [one[0] / two[0] for two, one in pairs]
    shown = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)})"
    print("| data | images, two passes | one pass | two passes | one pass | one / two (range, pairs) |")
    print("|---|---|---|---|---|---|")
    print(f"| {given.data} | {pairs[0][0][1]:,} | {pairs[0][1][1]:,} | {two:.1f} s | {one:.1f} s | {shown} |")


if __name__ == "__main__":
    main()
