"""What it costs to list, fingerprint and index many images: repeated small files in a folder, and in a tar.

Run: python benchmarks/scale.py [--counts 10000,100000]
"""

import argparse
import io
import os
import tarfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from remap.cache.digest_index import DigestIndex
from remap.data.augmentation import Augmentation
from remap.data.fingerprint import fingerprint
from remap.data.order import EpochPlan
from remap.data.sources import open_data
from remap.progress import Silent

CLASSES, SIDE = 100, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="10000,100000")
    print("| images | in | list | bytes of memory an image | fingerprint | order of an epoch | index of a cache |")
    print("|---|---|---|---|---|---|---|")
    for count in map(int, parser.parse_args().counts.split(",")):
        with TemporaryDirectory() as folder:
            for kind, make in (("folder", draw), ("tar", pack)):
                source = make(Path(folder), count)
                with get_context("fork").Pool(1) as pool:  # a process of its own, which has freed nothing yet
                    print(f"| {count:,} | {kind} | {pool.apply(measure, (source, count))} |", flush=True)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def draw(folder: Path, count: int) -> Path:
    """Hard links to one file a class: names are what listing costs, and the disk holds little."""
    for label in range(CLASSES):
        of_class = folder / "images" / f"class{label:03d}"
        of_class.mkdir(parents=True)
        first = of_class / "000000.jpg"
        first.write_bytes(picture(label))
        for index in range(1, count // CLASSES):
            os.link(first, of_class / f"{index:06d}.jpg")
    return folder / "images"


def pack(folder: Path, count: int) -> Path:
    with tarfile.open(folder / "images.tar", "w") as tar:
        for label in range(CLASSES):
            content = picture(label)
            for index in range(count // CLASSES):
                member = tarfile.TarInfo(f"class{label:03d}/{index:06d}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "images.tar"


def measure(source: Path, count: int) -> str:
    before = resident()
    listing, data = timed(lambda: open_data(str(source), None, 0.01))
    memory = (resident() - before) / count
    content, _ = timed(lambda: fingerprint(data, Silent()))
    plan = EpochPlan(0, count, 256, 1, 0, 1, Augmentation())
    order, _ = timed(lambda: next(plan.pairs(0, 0)))
    index, digests = DigestIndex(), np.random.default_rng(0).integers(0, 256, (count, 16)).astype(np.uint8)
    adding, _ = timed(lambda: index.add(digests, np.arange(count)))
    cells = (f"{listing:.2f} s", f"{memory:,.0f}", f"{content:.2f} s", f"{order:.3f} s", f"{adding:.2f} s")
    return " | ".join(cells)


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, which waiting on a busy machine does not add to: files lie in the page cache."""
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


if __name__ == "__main__":
    main()
