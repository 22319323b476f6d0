"""What `remap recommend` loses against running every method to the end, and what it costs.

Run: python benchmarks/recommend.py --sets DIR --results DIR [--seeds 1] [--minutes 60]

On each set of the suite "offline" (DIR holds its archives), the ranking of `remap recommend`, which sees training
images alone, is held against the accuracy of all methods on the evaluation images. Regret: the best method's mean
accuracy less that of the method it names. Nothing in the ranking is fitted to any set, so no set has to be left out.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from remap.pipeline.comparison_cells import comparison_cells
from remap.pipeline.recommend import METHODS, recommend
from remap.pipeline.run import run
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_tuning import open_or_create
from remap.progress import Silent
from remap.recipe.suite import load_suite
from remap.runs.run_dir import RunDir


def main() -> None:
    """Run what is missing until the minutes are over, and print the table of the sets that are complete."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--sets", type=Path, required=True)
    words.add_argument("--results", type=Path, required=True)
    words.add_argument("--seeds", type=int, default=1)
    words.add_argument("--minutes", type=float, default=60.0)
    options = words.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    end = time.monotonic() + 60 * options.minutes
    suite = load_suite("offline")
    print("| set | recommended | accuracy | best method | accuracy | regret | cannot tell | best among them | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in suite.sets:
        recipe = suite.recipe_of(name, options.sets)
        folder, shared = options.results / name, SharedResources(teacher_folder=options.results / name / "teacher")
        found = recommend(recipe, METHODS, folder / "recommend", Silent())
        accuracies: dict[str, list[float]] = {}
        seconds = 0.0
        for cell in (one for one in comparison_cells(recipe, METHODS, options.seeds) if one.with_teacher):
            run_dir = open_or_create(folder / cell.name, cell.recipe)
            if not run_dir.is_done:
                if time.monotonic() > end:
                    return
                run(cell.recipe, run_dir, Silent(), shared, resuming=True)
            summary = RunDir.open(folder / cell.name).summary()
            seconds += summary["seconds"]
            accuracies.setdefault(cell.label, []).append(100 * summary["student"]["accuracy"])
        means = {label: statistics.fmean(values) for label, values in accuracies.items()}
        best, taken = max(means, key=lambda label: means[label]), found["best"]
        alike = {taken, *found["cannot_tell"]}
        row = [
            *(name, f"`{taken}`", f"{means[taken]:.1f}", f"`{best}`", f"{means[best]:.1f}"),
            *(f"{means[best] - means[taken]:.1f}", len(alike) - 1, "yes" if best in alike else "no"),
            f"{found['seconds'] / (seconds / options.seeds):.2f}",
        ]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
