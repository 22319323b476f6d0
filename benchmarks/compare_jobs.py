"""A comparison against its cells as commands of their own, one after the other, with the teacher in every step.

Run: python benchmarks/compare_jobs.py [--methods linear,bitfit,... --seeds 2 --epochs 3 --jobs 1,auto --some 6]

The cells of their own prepare a teacher each. With --some N only N of them are run, evenly spread, and their time is
multiplied. Prints a Markdown table of wall and processor time, and whether all comparisons found the same accuracies.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = "linear,bitfit,lora,vpt_shallow,adaptformer,ssf"
# All labels, fixed views; of cells with a teacher, one with a probe.
COMMON = ("--data", "digits", "--student", "mini_student", "--batch-size", "64", "--set", "data.labels=null")
TAUGHT = ("--losses", "ce,kd", "--set", "teacher.prepare=probe", "--set", "teacher.allow_weak=true")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", default="1,auto")
    parser.add_argument("--some", type=int, default=0)
    options = parser.parse_args()
    words = [*COMMON, "--epochs", str(options.epochs)]
    ways = (["distill", *TAUGHT, "--no-baseline", "--set", "teacher.cache=off"], ["tune"])
    with tempfile.TemporaryDirectory() as folder:
        alone = [
            [*way, *words, "--method", method, "--seed", str(seed)]
            for method in options.methods.split(",")
            for way in ways
            for seed in range(options.seeds)
        ]
        some = alone[:: len(alone) // options.some] if options.some else alone
        rows = {}
        spent = [_timed([*cell, "--output", f"{folder}/cell-{number}"]) for number, cell in enumerate(some)]
        rows[f"{len(alone)} cells alone, caches off"] = [
            sum(one) * len(alone) / len(some) for one in zip(*spent, strict=True)
        ]
        tables = []
        for jobs in options.jobs.split(","):
            output = Path(folder, f"jobs-{jobs}")
            command = ["compare", "--methods", options.methods, "--seeds", str(options.seeds), *TAUGHT, *words]
            rows[f"compare --jobs {jobs}"] = _timed([*command, "--jobs", jobs, "--output", str(output)])
            table = json.loads((output / "compare.json").read_text())["rows"]
            tables.append([(row["name"], row["alone"]["accuracies"], row["teacher"]["accuracies"]) for row in table])
    first = next(iter(rows.values()))[0]
    print("| run | wall s | processor s | times as fast |\n|---|---:|---:|---:|")
    for name, (wall, cpu) in rows.items():
        print(f"| {name} | {wall:.0f} | {cpu:.0f} | {first / wall:.2f} |")
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores; the same accuracies in all comparisons: {all(one == tables[0] for one in tables)}")


def _timed(words: list[str]) -> list[float]:
    """Run a command; return seconds of wall and of processor time, its own processes included."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "remap_cli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"remap {' '.join(words)}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [time.perf_counter() - started, cpu]


if __name__ == "__main__":
    main()
