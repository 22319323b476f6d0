"""The suite "offline" set by set: a set that is finished is one JSON file, and all of them make the tables.

Run: python benchmarks/offline.py --sets DIR --runs DIR [--only ants-bees,digits] [--table]

DIR of --sets holds the suite's archives. A set takes 10 to 60 minutes of one core; its runs are in --runs, where one
that was stopped is resumed. ``--table`` only prints the means over the sets in benchmarks/results/offline, as
`remap compare --suite offline --search random:2` prints them where all sets run in one go, and parameter-efficient
methods with a teacher against full tuning by labels alone.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from remap.pipeline.compare import Plan
from remap.pipeline.comparison_files import RECORD, interval
from remap.pipeline.suite import markdown, run_suite, summarize_suite
from remap.progress import Progress, Silent
from remap.recipe.suite import load_suite

RESULTS = Path(__file__).parent / "results" / "offline"
METHODS = "linear,full,vpt_deep,adaptformer,bitfit,lora,ssf,full@weight_selection"
SEARCH = "random:2"


class Lines(Silent):
    """Each message on a line of its own."""

    def say(self, text: str) -> None:
        print(text, flush=True)


def run(name: str, sets: Path, runs: Path, progress: Progress) -> None:
    """Compare on one set, and write what was found without the paths of this machine."""
    suite = load_suite("offline")
    one = suite.model_copy(update={"sets": {name: suite.sets[name]}})
    run_suite(one, sets, runs, progress, methods=METHODS, plan=Plan(jobs="1", search=SEARCH))
    table = json.loads((runs / name / RECORD).read_text())
    RESULTS.mkdir(parents=True, exist_ok=True)
    left = {key: value for key, value in table.items() if key not in ("output", "data")}
    (RESULTS / f"{name}.json").write_text(json.dumps(left, indent=1) + "\n")


def against_full(tables: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a table: on each set the best method but full tuning, with the teacher, less full tuning by labels alone.

    The best of several methods on the images that judge it is flattered, so beside it stands the method whose mean is
    highest over all other sets.
    """
    rows_of = {
        name: {row["name"]: row for row in table["rows"] if not row["name"].startswith("full")}
        for name, table in tables.items()
    }
    yield "| set | full, labels only | best with the teacher | difference | best on the other sets | difference |"
    yield "|---|---:|---|---|---|---|"
    for name, rows in rows_of.items():
        full = next(row for row in tables[name]["rows"] if row["name"] == "full")
        others = [one for key, one in rows_of.items() if key != name]
        best = max(rows, key=lambda method: rows[method]["teacher"]["mean"])
        elsewhere = max(rows, key=lambda method: sum(one[method]["teacher"]["mean"] for one in others))
        cells = [name, f"{100 * full['alone']['mean']:.1f}"]
        for method in (best, elsewhere):
            cells += [f"`{method}` {100 * rows[method]['teacher']['mean']:.1f}"]
            cells += [interval(rows[method]["difference"]["to_full"])]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what is missing, and print the means over the finished sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--only", help="names of sets; all by default")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table and None in (options.sets, options.runs):
        parser.error("name --sets and --runs, or --table")
    suite = load_suite("offline")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in [] if options.table else options.only.split(",") if options.only else suite.sets:
        if not (RESULTS / f"{name}.json").is_file():
            run(name, options.sets, options.runs, Lines())
    tables = {name: json.loads(file.read_text()) for name in suite.sets if (file := RESULTS / f"{name}.json").is_file()}
    print(markdown(summarize_suite(tables, {name: suite.sets[name].group for name in tables})))
    print("\n".join(against_full(tables)))


if __name__ == "__main__":
    main()
