"""Wall time of the commands that only print, and whether they import torch.

Run: python benchmarks/startup.py [--repeats 7]
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = [
    line.split()
    for line in ("--help", "distill --help", "methods", "methods lora", "losses", "losses kd")
    + ("models", "recipes show digits", "recipes validate digits", "cache ls")
]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    for arguments in COMMANDS:
        times = [_seconds(arguments) for _ in range(repeats + 1)][1:]  # the first one fills the file cache
        program = CHECK.format(arguments=arguments)
        found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stderr
        print(
            f"remap {' '.join(arguments):16} {statistics.median(times):.2f} s "
            f"({min(times):.2f} to {max(times):.2f}, {repeats} runs), torch imported: {found.endswith('torch')}"
        )


def _seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "remap_cli", *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
