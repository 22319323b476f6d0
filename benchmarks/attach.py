"""Seconds that attaching takes on ViT-L/16, and what importing the methods costs.

Run: python benchmarks/attach.py [--methods lora,ssf] [--repeats 3] [--model vit_large_patch16_224]
"""

import argparse
import ast
import gc
import statistics
import subprocess
import sys
import time

from remap.backbones.families import FAMILIES
from remap.tuning import METHODS

BIG = ("torch", "peft", "transformers")
# Every measurement has an interpreter in which nothing but ``before`` was imported: a fresh one, or a fork of one. Both
# clocks: processor time says what the work is, wall time what it felt like.
PROGRAM = """
import os, sys, time
{before}
sys.stdout.flush()
for what in {statements!r}:
    for _ in range({repeats}):
        if os.fork():
            os.wait()
            continue
        known, wall, cpu = set(sys.modules), time.perf_counter(), time.process_time()
        exec(what)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        brought = [name for name in {big!r} if name in sys.modules and name not in known]
        print(repr((what, wall, cpu, brought)), flush=True)
        os._exit(0)
"""


def imported(statements: list[str], before: str, repeats: int) -> dict[str, tuple[float, float, list[str]]]:
    """Median wall and processor seconds of statements, and which big libraries they brought along."""
    program = PROGRAM.format(before=before, statements=statements, repeats=repeats + 1, big=BIG)
    lines = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    found: dict[str, list[tuple]] = {}
    for what, *values in map(ast.literal_eval, lines.splitlines()):
        found.setdefault(what, []).append(tuple(values))
    medians = {}
    for what, rows in found.items():
        wall, cpu = (statistics.median(row[index] for row in rows[1:]) for index in (0, 1))  # the first fills caches
        medians[what] = wall, cpu, rows[0][2]
    return medians


def imports(names: list[str], repeats: int) -> None:
    print("| import | wall (processor) | brings |\n|---|---|---|")
    base = imported(["import remap.tuning", "import torch, timm"], "", repeats)
    assert not base["import remap.tuning"][2], "listing the methods imports a big library"
    # What every method needs, and `remap.attach` too, is not the single module's.
    attach = "import remap.tuning.attaching"
    shared = imported([attach], "import torch, timm", repeats)
    modules = dict.fromkeys(METHODS.row(name).target.partition(":")[0] for name in names)
    single = imported([f"import {module}" for module in modules], f"import torch, timm\n{attach}", repeats)
    for what, (wall, cpu, brought) in (base | shared | single).items():
        behind = " (after torch and timm)" if what == attach else ""
        name = what.removeprefix("import ")
        print(f"| `{name}`{behind} | {wall:.2f} s ({cpu:.2f} s) | {', '.join(brought) or '-'} |")
    for what, (_, _, brought) in single.items():
        assert ("peft" in brought) == (".peft_bridge." in what), f"{what} brings {brought}"


def attaching(names: list[str], model_name: str, repeats: int) -> None:
    import timm
    import torch

    import remap
    from remap.errors import BackboneError

    model = timm.create_model(model_name).eval()
    print(f"\n{model_name}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters\n")
    print("| method | attach (range, runs) | processor |\n|---|---|---|")
    for name in names:
        METHODS.load(name)  # imports are measured above
        wall, cpu = [], []
        for _ in range(repeats + 1):
            gc.collect()
            torch.manual_seed(0)
            started = time.perf_counter(), time.process_time()
            try:
                attached = remap.attach(model, name)
            except BackboneError as error:
                print(f"| `{name}` | - | {error} |")
                break
            wall.append(time.perf_counter() - started[0])
            cpu.append(time.process_time() - started[1])
            attached.detach()
            del attached
        if wall:
            wall, cpu = wall[1:], cpu[1:]  # the first one touches every weight
            spread = f"{min(wall):.2f} to {max(wall):.2f}, {repeats}"
            print(
                f"| `{name}` | {statistics.median(wall):.2f} s ({spread}) | {statistics.median(cpu):.2f} s |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", help="names with commas between them; all that fit a plain ViT by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--only", choices=("imports", "attaching"))
    arguments = parser.parse_args()
    parts = FAMILIES.row("vit").parts
    names = [row.name for row in METHODS if row.fits(parts)]
    if arguments.methods:
        names = [name.strip() for name in arguments.methods.split(",")]
    if arguments.only != "attaching":
        imports(names, arguments.repeats)
    if arguments.only != "imports":
        attaching(names, arguments.model, arguments.repeats)


if __name__ == "__main__":
    main()
