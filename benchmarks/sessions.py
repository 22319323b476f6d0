"""Ways of learning classes in sessions, on several data sets: the table of docs/new-classes.md.

Run: python benchmarks/sessions.py RESULTS [--data digits --data cifar10=TRAIN.tar,TEST.tar --data clothing=FOLDER]
         [--sessions 5] [--seeds 3] [--epochs 10] [--per-class N] [--method lora] [--student mini_student]
         [--rows ranpac,ease] [--minutes N]

A cell is a data set, a seed and a way. Cells run one seed after the other, so that what is there after any time is
complete for the first seeds; one that has ended is a line of RESULTS/cells.jsonl and is not run again, and the runs
of one that was stopped are resumed. No cell begins once --minutes have passed. The table is RESULTS/table.md.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from remap.pipeline.comparison_files import percent
from remap.pipeline.session_protocol import COSTS, FIGURES, SHOWN, compare_sessions, over_seeds
from remap.progress import Silent
from remap.recipe import resolve

ROWS = "joint,ranpac,prototypes,lwf,lwf:20,lwf:20:bias,ease,l2p,dualprompt,coda_prompt,finetune"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", action="append", help="NAME, or NAME=SOURCE or NAME=SOURCE,EVALUATION; repeatable")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--method", default="lora", help="of the ways that are not methods themselves")
    parser.add_argument("--student", default="mini_student")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--set", action="append", default=[], help="further settings, as train.batch_size=16")
    parser.add_argument("--per-class", type=int, help="training images of each class; all by default")
    for name, default in (("sessions", 5), ("seeds", 3), ("epochs", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    end, record = time.monotonic() + 60 * given.minutes, given.results / "cells.jsonl"
    given.results.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    names = given.data or ["digits"]
    for seed in range(given.seeds):
        for data in names:
            for way in given.rows.split(","):
                key = {"data": data.partition("=")[0], "seed": seed, "way": way}
                if time.monotonic() < end and not any(key.items() <= cell.items() for cell in done):
                    done.append({**key, **cell(given, data, seed, way)})
                    with open(record, "a") as file:
                        file.write(json.dumps(done[-1]) + "\n")
                    (given.results / "table.md").write_text(table(done))
                    print(json.dumps(done[-1]), flush=True)
    print(table(done))


def cell(given: argparse.Namespace, data: str, seed: int, way: str) -> dict[str, Any]:
    """Return the figures of one way, data set and seed."""
    name, _, rest = data.partition("=")
    source, _, evaluation = (rest or name).partition(",")
    words = {"data": source, "val_data": evaluation or None, "student": given.student, "method": given.method}
    words |= {"epochs": given.epochs, "seed": seed, "losses": "ce"}
    settings = [*given.set, *([] if given.per_class is None else [f"data.per_class={given.per_class}"])]
    recipe, folder = resolve(None, words, settings), given.results / name
    arguments = (recipe, str(given.sessions), [given.method], [way], 1, folder, Silent())
    (row,) = compare_sessions(*arguments)["rows"]
    return {figure: row[figure] and row[figure]["mean"] for figure in (*FIGURES, *COSTS)}


def table(cells: list[dict[str, Any]]) -> str:
    """Return what is there, mean and spread over seeds."""
    lines = [
        "| data | way | seeds | accuracy, % | average | forgetting | seconds | KiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for data, way in dict.fromkeys((cell["data"], cell["way"]) for cell in cells):
        rows = [cell for cell in cells if (cell["data"], cell["way"]) == (data, way)]
        found = {name: over_seeds([row[name] for row in rows]) for name in (*SHOWN, *COSTS)}
        shares = ["-" if (one := found[name]) is None else percent(one) for name in SHOWN]
        costs = [f"{found['seconds']['mean']:.0f}", f"{found['bytes']['mean'] / 1024:.0f}"]
        lines.append(f"| {' | '.join([data, way, str(len(rows)), *shares, *costs])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
