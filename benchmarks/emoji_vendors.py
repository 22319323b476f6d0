"""Another vendor's emoji: adapt to drawings without labels, from two vendors to the third and the reverse.

Run: python benchmarks/emoji_vendors.py EMOJI.tar RESULTS [--seeds 0,1,2] [--rows NAME,NAME] [--table]

Classes are the five largest categories. Half of the names are to learn from, the others to evaluate on, the same for
all vendors: no name is learned from in one drawing and evaluated in another. At most 40 images a class and vendor are
learned from. Each row that has ended is one JSON file and is not run again, one that was stopped is resumed;
``--table`` prints what is there.
"""

import argparse
import csv
import io
import json
import statistics
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import remap
from remap.pipeline.run import resume
from remap.recipe import resolve

CLASSES, EACH, EPOCHS = 5, 40, 8
# Learned from, adapted to.
DIRECTIONS = {
    "noto+twemoji to fluent": (("noto", "twemoji"), ("fluent",)),
    "fluent to noto+twemoji": (("fluent",), ("noto", "twemoji")),
}
SOURCE_ONLY, BOUND = "source only", "labels of the target"
# Recipes that learn from the images of the target beside the labelled ones.
BESIDE = {
    "mean_teacher": ("ce,mean_teacher", ("losses.mean_teacher.threshold=0.8",)),
    "coral": ("ce,coral", ("losses.coral.weight=100",)),
    "mmd": ("ce,mmd", ()),
    "infomax": ("ce,infomax", ("losses.infomax.weight=0.3",)),
}
AFTER = ("shot", "tent")
ROWS = (SOURCE_ONLY, *BESIDE, *AFTER, BOUND)


def folders(archive: Path, root: Path) -> None:
    """Write ROOT/train/VENDOR/CLASS/NAME.png and ROOT/val/..., once."""
    if (root / "val").is_dir():
        return
    with tarfile.open(archive) as tar:
        table = tar.extractfile("./captions.csv")
        assert table is not None
        rows = list(csv.DictReader(io.StringIO(table.read().decode())))
        largest = [name for name, _ in Counter(row["category"] for row in rows).most_common(CLASSES)]
        learned: Counter[tuple[str, str]] = Counter()
        for row in sorted(rows, key=lambda row: row["path"]):
            if row["category"] not in largest:
                continue
            learn = sum(map(ord, row["name"])) % 2 == 0
            key = (row["vendor"], row["category"])
            learned[key] += learn
            if learn and learned[key] > EACH:
                continue
            folder = root / ("train" if learn else "val") / row["vendor"] / row["category"].replace(" & ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            picture = tar.extractfile(f"./{row['path']}")
            assert picture is not None
            (folder / f"{row['vendor']}-{row['name']}.png").write_bytes(picture.read())


def joined(root: Path, part: str, vendors: tuple[str, ...]) -> Path:
    """Return a folder of class folders with the images of some vendors, as links."""
    folder = root / "joined" / f"{part}-{'-'.join(vendors)}"
    for vendor in vendors if not folder.is_dir() else ():
        for path in (root / part / vendor).rglob("*.png"):
            (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
            (folder / path.parent.name / path.name).hardlink_to(path)
    return folder


def accuracy(root: Path, direction: str, row: str, seed: int) -> float:
    """Train or adapt one row and return its accuracy on the target's evaluation images."""
    source, target = DIRECTIONS[direction]
    val, images = str(joined(root, "val", target)), str(joined(root, "train", target))
    run = root / "runs" / direction.replace(" ", "-") / f"{row.replace(' ', '-')}-{seed}"
    if row == "shot":
        of = run.with_name(f"source-only-{seed}")
        return remap.evaluate(remap.adapt(of, images, epochs=EPOCHS, seed=seed, output=run)["run_dir"], val)["accuracy"]
    if row == "tent":
        rows = list(remap.predict(run.with_name(f"source-only-{seed}"), shuffled(val), adapt="tent"))
        return statistics.mean(row.top[0][0] == Path(row.path).parent.name for row in rows)
    if run.exists():
        return resume(run).summary["student"]["accuracy"]
    words = {
        "student": "mini_student",
        "method": "lora",
        "data": images if row == BOUND else str(joined(root, "train", source)),
        "val_data": val,
        "seed": seed,
        "epochs": EPOCHS,
        "losses": "ce",
    }
    settings: tuple[str, ...] = ("data.augment=strong", f"train.eval_every={EPOCHS}")
    if row in BESIDE:
        words["losses"], more = BESIDE[row]
        words["target"], settings = images, (*settings, *more)
    return remap.distill(resolve(words=words, settings=settings), output=run).summary["student"]["accuracy"]


def shuffled(folder: str) -> list[Path]:
    """Return the images in an order that mixes the classes, as a camera's would: tent adapts to each batch."""
    return sorted(Path(folder).rglob("*.png"), key=lambda path: path.name[::-1])


def table(root: Path) -> None:
    """Print mean and standard deviation over seeds."""
    found = defaultdict(list)
    for file in root.glob("results/*.json"):
        cell = json.loads(file.read_text())
        found[cell["direction"], cell["row"]].append(cell["accuracy"])
    print(f"| {'row':20s} | {' | '.join(DIRECTIONS)} |")
    print("|---|---|---|")
    for row in ROWS:
        cells = []
        for direction in DIRECTIONS:
            values = [100 * value for value in found[direction, row]]
            spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
        print(f"| {row:20s} | {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("archive", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    root = options.results.resolve()
    if not options.table:
        folders(options.archive, root)
        (root / "results").mkdir(exist_ok=True)
        for seed in map(int, options.seeds.split(",")):
            for row in options.rows.split(","):
                for number, direction in enumerate(DIRECTIONS):
                    file = root / "results" / f"{number}-{row.replace(' ', '-')}-{seed}.json"
                    if not file.exists():
                        cell = {"direction": direction, "row": row, "seed": seed}
                        file.write_text(json.dumps({**cell, "accuracy": accuracy(root, direction, row, seed)}))
    table(root)


if __name__ == "__main__":
    main()
