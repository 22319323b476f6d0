"""Which augmentation helps, without a teacher: the embedded student on four sets of images, by labels alone.

Run: python benchmarks/augmentation.py --sets DIR --results DIR [--minutes 60] [--seeds 2] [--table]

DIR holds clothing.tar, cifar10-train.tar, fashion-mnist.tar and ants-bees.tar. Up to 1,000 of their training images are
taken, and 30 % of these held out to judge; images for validation and test are not touched. Each cell is one run; a cell
that has ended is not run again. ``--table`` prints what is there, and where an augmentation hurts.
"""

import argparse
import itertools
import json
import shutil
import statistics
import tarfile
import time
from collections import defaultdict
from pathlib import Path, PurePosixPath

import torch

from remap.data import keyed_random
from remap.pipeline.run import start
from remap.recipe.resolution import resolve

# Where the training images of each set begin.
SETS = {"clothing": "train", "cifar10-train": "", "fashion-mnist": "train", "ants-bees": "train"}
METHODS = ("lora", "vpt_deep", "bitfit")
AUGMENT = ("none", "shift", "light", "strong")
IMAGES, VAL_FRACTION, BATCH, EPOCHS = 1000, 0.3, 32, 20


def training_images(sets: Path, name: str, results: Path) -> Path:
    """Return a folder of up to ``IMAGES`` training images, as many of each class, the same every time."""
    folder = results / "sets" / name
    if folder.exists():
        return folder
    draft = folder.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    with tarfile.open(sets / f"{name}.tar") as archive:
        classes: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
        for member in archive:
            path = PurePosixPath(member.name)
            if member.isfile() and path.suffix in (".jpg", ".jpeg", ".png") and path.parent.parent.name == SETS[name]:
                classes[path.parent.name].append(member)
        for label, members in sorted(classes.items()):
            (draft / label).mkdir(parents=True)
            members.sort(key=lambda member: member.name)
            for index in keyed_random.permutation(0, 0, len(members))[: IMAGES // len(classes)]:
                file = archive.extractfile(members[index])
                assert file is not None
                (draft / label / PurePosixPath(members[index].name).name).write_bytes(file.read())
    draft.rename(folder)
    return folder


def cell_file(results: Path, name: str, method: str, augment: str, seed: int) -> Path:
    """Return where a cell's accuracy is written."""
    return results / f"{name}-{method}-{augment}-{seed}.json"


def run(images: Path, method: str, augment: str, seed: int, done: Path) -> None:
    """Run a cell, unless it has ended."""
    if done.exists():
        return
    settings = [f"data.augment={augment}", f"data.val_fraction={VAL_FRACTION}", f"train.epochs={EPOCHS}"]
    settings += [f"train.batch_size={BATCH}", "train.eval_every=1000"]
    words = {"data": str(images), "student": "mini_student", "method": method, "losses": "ce", "seed": seed}
    folder = done.with_suffix(".run")
    shutil.rmtree(folder, ignore_errors=True)
    summary = start(resolve(words=words, settings=settings), folder).summary
    done.write_text(json.dumps({"accuracy": summary["student"]["accuracy"], "seconds": summary["seconds"]}))
    shutil.rmtree(folder, ignore_errors=True)


def table(results: Path, seeds: int) -> None:
    """Print accuracy in %, as the mean of the seeds that have ended for all of them, and each one's worst case."""
    print(f"| set | method | {' | '.join(AUGMENT)} | seeds |\n|{'---|' * (len(AUGMENT) + 3)}")
    gains: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, method in itertools.product(SETS, METHODS):
        rows = []
        for seed in range(seeds):
            files = [cell_file(results, name, method, augment, seed) for augment in AUGMENT]
            if all(file.exists() for file in files):
                rows.append([100 * json.loads(file.read_text())["accuracy"] for file in files])
        if not rows:
            continue
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        print(f"| {name} | `{method}` | {' | '.join(f'{mean:.1f}' for mean in means)} | {len(rows)} |")
        for augment, mean in zip(AUGMENT, means, strict=True):
            gains[augment].append((mean - means[0], f"{name}, {method}"))
    for augment, found in gains.items():
        worst, where = min(found)
        mean = statistics.mean(gain for gain, _ in found)
        print(f"\n{augment}: {mean:+.1f} on average, worst {worst:+.1f} ({where})")


def main() -> None:
    """Run what is missing, then print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--sets", type=Path, required=True)
    words.add_argument("--results", type=Path, required=True)
    words.add_argument("--minutes", type=float, default=60.0)
    words.add_argument("--seeds", type=int, default=2)
    words.add_argument("--table", action="store_true")
    options = words.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.minutes
    for seed, name, method, augment in itertools.product(range(options.seeds), SETS, METHODS, AUGMENT):
        if not options.table and time.monotonic() < end:
            images = training_images(options.sets, name, options.results)
            run(images, method, augment, seed, cell_file(options.results, name, method, augment, seed))
    table(options.results, options.seeds)


if __name__ == "__main__":
    main()
