"""What `remap recommend` loses against a finished comparison of all methods, and what it costs.

Run: python benchmarks/recommend.py --sets DIR --compared DIR --results DIR

--compared is the folder of `remap compare --suite offline --sets DIR`; of its sets those that are finished count. On
each the ranking of `remap recommend`, which sees training images alone, is held against the mean accuracies with the
teacher. Regret: the best method's mean less that of the method it names. Nothing in the ranking is fitted to a set.
Beside it stands the choice without looking at the set: the method whose mean over all other sets is highest. Time is
that of the ranking over that of one seed of all methods with the teacher.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from remap.pipeline.comparison_files import RECORD
from remap.pipeline.recommend import recommend
from remap.progress import Silent
from remap.recipe.suite import load_suite
from remap.runs.run_dir import RunDir


def accuracies(folder: Path) -> dict[str, float]:
    """Return the mean accuracy in % of each method with the teacher; recommend ranks on the student's own weights."""
    rows = json.loads((folder / RECORD).read_text())["rows"]
    return {row["name"]: 100 * row["teacher"]["mean"] for row in rows if "@" not in row["name"]}


def seconds(folder: Path, methods: Mapping[str, float]) -> float:
    """Return the mean seconds of a seed of all methods with the teacher, without their search."""
    each = [
        statistics.fmean(RunDir.open(run).summary()["seconds"] for run in folder.glob(f"{method}-teacher-s*"))
        for method in methods
    ]
    return sum(each)


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
    for name in ("sets", "compared", "results"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    suite = load_suite("offline")
    names = [name for name in suite.sets if (options.compared / name / RECORD).is_file()]
    compared = {name: accuracies(options.compared / name) for name in names}
    rows = []
    for name in names:
        found = recommend(suite.recipe_of(name, options.sets), list(compared[name]), options.results / name, Silent())
        rows.append(row(name, found, compared, found["seconds"] / seconds(options.compared / name, compared[name])))
        print(*rows[-1], flush=True)
    print("| set | recommended | its accuracy | best | its accuracy | regret | cannot tell | holds the best |", end="")
    print(" best elsewhere | regret | time |\n|---|---|---|---|---|---|---|---|---|---|---|")
    means = [statistics.fmean(column) if isinstance(column[0], float) else "" for column in zip(*rows, strict=True)]
    for one in (*rows, ["**mean**", *means[1:]]):
        print(f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in one)} |")


if __name__ == "__main__":
    main()
