"""What a step and a forward pass gain beside other programs, where threads that wait soon sleep.

Run: python benchmarks/busy_machine.py [--model mini_student] [--batch 64] [--repeats 3] [--threads N]

Each measurement is a process of its own, since OpenMP reads its settings once: by torch's default (threads spin for
milliseconds while they wait for each other), and by what ``import remap`` sets. Both are timed in turns, on a quiet
machine and beside as many busy processes as there are threads; ratios are medians, with their range.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

MEASURE = """
import json, sys, time
import torch
from remap.backbones.build import build
model, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
network = build(model, "none" if model.startswith("vit_") else "pretrained", 10).model
side = network.patch_embed.img_size[0]
images = torch.randn(batch, 3, side, side)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

def forward():
    with torch.inference_mode():
        network(images)

def step():
    network(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

found = {}
for what in (forward, step):
    what()
    times = []
    begun = time.monotonic()
    while len(times) < 20 and time.monotonic() - begun < 20 or len(times) < 2:
        wall, used = time.perf_counter(), time.process_time()
        what()
        times.append((time.perf_counter() - wall, time.process_time() - used))
    found[what.__name__] = [sorted(column)[len(times) // 2] for column in zip(*times)]
print(json.dumps(found))
"""


def measure(setting: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return wall and processor seconds of each operation."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        environment.pop(name, None)
    first = "import remap\n" if setting == "remap" else ""
    words = [options.model, str(options.batch), str(options.threads)]
    ran = subprocess.run(
        [sys.executable, "-c", first + MEASURE, *words], env=environment, capture_output=True, text=True, check=True
    )
    return dict(json.loads(ran.stdout))


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processes busy while the block runs."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini_student")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    print(f"`{options.model}`, {options.batch} images, {options.threads} threads, fp32\n")
    print("| | operation | torch's default | ratio: wall (range) | processor (range) |\n|---|---|---:|---|---|")
    for name, others in (("quiet", 0), ("busy", options.threads)):
        with busy(others):
            pairs = [{one: measure(one, options) for one in ("default", "remap")} for _ in range(options.repeats)]
        for what in ("forward", "step"):
            ratios = [[pair["remap"][what][clock] / pair["default"][what][clock] for pair in pairs] for clock in (0, 1)]
            shown = [f"{median(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in ratios]
            seconds = median(pair["default"][what][0] for pair in pairs)
            print(f"| {name} | {what} | {seconds:.3f} s | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
