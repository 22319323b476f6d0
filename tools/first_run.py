"""Measure the first run, and check that README and docs give its figures.

    python tools/first_run.py --measure    # `remap distill` with seeds 0 to 4, into docs/first_run.json (20 minutes)
    python tools/first_run.py              # check the pages, as tests/test_docs.py does

A seed decides which digits have labels, the order of images and what is drawn at first. Spreads are sample standard
deviations.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "first_run.json"
SEEDS = 5
# What was trained with, and the name of its row in the table that the command prints.
ROWS = {"teacher": "teacher", "baseline": "labels only", "student": "student + hira"}
# Pages that give the mean over seeds.
PAGES = ("README.md", "docs/defaults.md", "docs/choosing.md")


def measure() -> None:
    """Run the embedded default with each seed and write how many of the evaluation images were right."""
    import remap

    runs = []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            # As the command does; in Python a run has no baseline unless it is named.
            summary = remap.distill({"seed": seed}, settings=["baseline=true"], output=Path(folder) / "run").summary
        found = {role: summary[role]["accuracy"] for role in ROWS}
        runs.append({"seed": seed, **found, "task_bytes": summary["student"]["task_bytes"]})
        print(runs[-1], flush=True)
    FIGURES.write_text("[\n" + ",\n".join(f"  {json.dumps(run)}" for run in runs) + "\n]\n")


def sentence(runs: list[dict[str, float]]) -> str:
    """Return the words that each page must contain."""
    several = {role: [100 * run[role] for run in runs] for role in ROWS}
    shown = {role: f"{statistics.mean(one):.1f} ± {statistics.stdev(one):.1f}" for role, one in several.items()}
    return (
        f"over seeds 0 to {len(runs) - 1} the student has {shown['student']} %, labels only {shown['baseline']} %"
        f" and the teacher {shown['teacher']} %"
    )


def problems(runs: list[dict[str, float]]) -> list[str]:
    """Return what README and docs say otherwise."""
    found = []
    for page in PAGES:
        if sentence(runs) not in " ".join((ROOT / page).read_text(encoding="utf-8").split()):
            found.append(f"{page} does not say: {sentence(runs)}")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for role, title in ROWS.items():
        start = f" {title:14}  {100 * runs[0][role]:.1f}% ("
        if not any(line.startswith(start) for line in lines):
            found.append(f"README.md has no line that begins with {start!r}")
    if not any(line.endswith(f" {runs[0]['task_bytes'] / 1000:.1f} kB") for line in lines):
        found.append(f"README.md has another saved size than {runs[0]['task_bytes'] / 1000:.1f} kB")
    return found


def main() -> int:
    """Measure, or check."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--measure", action="store_true")
    if options.parse_args().measure:
        measure()
    found = problems(json.loads(FIGURES.read_text()))
    print("\n".join(found) or "README and docs give the figures of docs/first_run.json")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
