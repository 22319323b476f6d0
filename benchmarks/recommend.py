"""What `remap recommend` loses against a finished comparison of all methods, and what it costs.

Run: python benchmarks/recommend.py --sets DIR --results DIR

On each set that `benchmarks/offline.py` has finished, the ranking of `remap recommend`, which sees training images
alone, is held against the mean accuracies with the teacher. Regret: the best method's mean less that of the method it
names. Nothing in the ranking is fitted to a set. Beside it stands the choice without looking at the set: the method
whose mean over all other sets is highest. Time is that of the ranking over that of one seed of all methods with the
teacher, as they took when they were compared.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from remap.pipeline.recommend import recommend
from remap.progress import Silent
from remap.recipe.suite import load_suite

# What benchmarks/offline.py writes.
RESULTS = Path(__file__).parent / "results" / "offline"


def with_teacher(file: Path) -> dict[str, dict[str, float]]:
    """Return accuracy in % and seconds of each method with the teacher, for students with weights of their own."""
    rows = [row for row in json.loads(file.read_text())["rows"] if "@" not in row["name"]]
    return {
        row["name"]: {"accuracy": 100 * row["teacher"]["mean"], "seconds": row["teacher"]["seconds"]} for row in rows
    }


def row(name: str, found: Mapping[str, Any], compared: Mapping[str, Mapping[str, float]], cost: float) -> list[Any]:
    """Return one set's cells of the table; the numbers among them are averaged over sets."""
    means = compared[name]
    others = [one for key, one in compared.items() if key != name]
    elsewhere = max(means, key=lambda method: sum(one[method] for one in others)) if others else "-"
    best, taken = max(means, key=lambda method: means[method]), found["best"]
    return [
        *(name, f"`{taken}`", means[taken], f"`{best}`", means[best], means[best] - means[taken]),
        *(len(found["cannot_tell"]), "yes" if best in {taken, *found["cannot_tell"]} else "no"),
        *(f"`{elsewhere}`", means[best] - means[elsewhere] if others else 0.0, cost),
    ]


def main() -> None:
    """Rank on each finished set, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("sets", "results"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    suite = load_suite("offline")
    files = {name: RESULTS / f"{name}.json" for name in suite.sets}
    found = {name: with_teacher(file) for name, file in files.items() if file.is_file()}
    compared = {name: {key: one["accuracy"] for key, one in rows.items()} for name, rows in found.items()}
    rows = []
    for name, methods in found.items():
        ranking = recommend(suite.recipe_of(name, options.sets), list(methods), options.results / name, Silent())
        cost = ranking["seconds"] / sum(one["seconds"] for one in methods.values())
        rows.append(row(name, ranking, compared, cost))
        print(*rows[-1], flush=True)
    print("| set | recommended | its accuracy | best | its accuracy | regret | cannot tell | holds the best |", end="")
    print(" best elsewhere | regret | time |\n|---|---|---|---|---|---|---|---|---|---|---|")
    means = [statistics.fmean(column) if isinstance(column[0], float) else "" for column in zip(*rows, strict=True)]
    for one in (*rows, ["**mean**", *means[1:]]):
        print(f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in one)} |")


if __name__ == "__main__":
    main()
