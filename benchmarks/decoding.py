"""Reading images: ``data.decode`` exact and fast side by side, and against another checkout of this repository.

python benchmarks/decoding.py photos.tar more.tar --sizes 224,32
python benchmarks/decoding.py photos.tar --against ../main       the other checkout's views in a process of its own

Processor time of one thread, from encoded bytes to the view; both ways in turns.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from remap.data.pixels import Pixels
from remap.data.views import View

# The other checkout reads the same files with its own code, and prints seconds.
OTHER = """
import sys, time
from remap.data.views import View
path, size, crop = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
data = [bytes.fromhex(line) for line in open(path)]
view = View(size, crop, "bicubic")
for image in data: view.read(image)
started = time.process_time()
for image in data: view.read(image)
print(time.process_time() - started)
"""


def images(path: Path, count: int) -> list[bytes]:
    """Return the first images of a tar that Pillow reads."""
    view, found = View(32, 1.0, "bicubic"), []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.lower().endswith((".jpg", ".jpeg", ".png")) else None
            if file is not None and not Path(member.name).name.startswith("."):
                data = file.read()
                try:
                    view.read(data)
                except Exception:
                    continue
                found.append(data)
                if len(found) == count:
                    break
    return found


def seconds(view: View, data: list[bytes]) -> float:
    started = time.process_time()
    for image in data:
        view.read(image)
    return time.process_time() - started


def elsewhere(checkout: Path, dump: Path, size: int, crop: float) -> float:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    words = [sys.executable, "-c", OTHER, str(dump), str(size), str(crop)]
    return float(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout)


def shown(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", nargs="+", type=Path)
    parser.add_argument("--sizes", default="224,32")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--crop", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    print("| images | pixels | exact | fast | fast / exact (range, pairs) | levels of 255 apart, mean (largest) |")
    print("|---|---|---|---|---|---|")
    dump = Path(f"/tmp/remap-decoding-{os.getpid()}.hex")
    lines = []
    for tar in given.tars:
        data = images(tar, given.images)
        for size in map(int, given.sizes.split(",")):
            exact = View(size, given.crop, "bicubic")
            fast = replace(exact, pixels=Pixels(decode="fast"))
            apart = [np.abs(exact.read(one).astype(int) - fast.read(one).astype(int)) for one in data]
            pairs = [(seconds(exact, data), seconds(fast, data)) for _ in range(given.repeats)]
            each = [f"{median(times) / len(data) * 1e3:.3f} ms" for times in zip(*pairs, strict=True)]
            mean, most = np.mean([one.mean() for one in apart]), max(one.max() for one in apart)
            ratio = shown([second / first for first, second in pairs])
            print(f"| {tar.stem} | {size} | {each[0]} | {each[1]} | {ratio} | {mean:.2f} ({most}) |", flush=True)
            if given.against is not None:
                dump.write_text("\n".join(one.hex() for one in data))
                here = Path(__file__).parents[1]
                turns = [
                    (elsewhere(given.against, dump, size, given.crop), elsewhere(here, dump, size, given.crop))
                    for _ in range(given.repeats)
                ]
                lines.append(f"| {tar.stem} | {size} | {shown([new / old for old, new in turns])} |")
                dump.unlink()
    if lines:
        print("\n| images | pixels | exact here / there (range, pairs) |\n|---|---|---|")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
