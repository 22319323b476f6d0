"""Time of the commands that only print, beside Python alone and its imports, and whether they import torch.

Run: python benchmarks/startup.py [--repeats 7] [--dry-run]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

COMMANDS = [
    line.split()
    for line in ("--help", "distill --help", "methods", "methods lora", "losses", "losses kd", "remappings")
    + ("models", "recipes ls", "recipes show digits", "recipes validate digits", "cache ls")
]
BESIDE = (["-c", "pass"], ["-c", "import typer, rich"])
DRY_RUN = ["distill", "--teacher", "vit_large", "--student", "vit_small", "--weights", "none", "--dry-run"]
CHECK = """
import sys
from remap_cli.app import app
sys.argv = ["remap", *{arguments!r}]
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
sys.stderr.write("torch" if "torch" in sys.modules else "light")
"""
# Python writes its compiled files, as for anyone who runs a command twice.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true", help="also `remap distill --dry-run` of ViT-L -> ViT-S, once")
    options = parser.parse_args()
    print(f"{'':34}elapsed  processor   (median of {options.repeats}, seconds)")
    for arguments in BESIDE:
        _show(f"python {' '.join(arguments)}", arguments, options.repeats)
    for arguments in COMMANDS:
        found = _run("-c", CHECK.format(arguments=arguments)).stderr
        note = "imports torch" if found.endswith("torch") else ""
        _show(f"remap {' '.join(arguments)}", ["-m", "remap_cli", *arguments], options.repeats, note)
    if options.dry_run:
        _show("remap distill --dry-run, ViT-L -> S", ["-m", "remap_cli", *DRY_RUN], 0)


def _show(name: str, arguments: Sequence[str], repeats: int, note: str = "") -> None:
    """Print the medians of ``repeats`` runs after one that fills the file cache; of that one for 0."""
    times = [_seconds(arguments) for _ in range(repeats + 1)][1 if repeats else 0 :]
    elapsed, processor = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{name:36}{elapsed:5.2f}  {processor:9.2f}   {note}", flush=True)


def _seconds(arguments: Sequence[str]) -> tuple[float, float]:
    """Return elapsed and processor seconds of a process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    _run(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, env=ENVIRONMENT)


if __name__ == "__main__":
    main()
