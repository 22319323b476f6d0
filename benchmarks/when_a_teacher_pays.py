"""When a teacher pays: labels only against distillation, over six sets, six methods and all or few labels.

Run: python benchmarks/when_a_teacher_pays.py --sets DIR --results DIR [--teacher mini_conv] [--prepare full]
    [--labels 0.1] [--minutes 60] [--table]

DIR holds cifar10-train.tar, cifar10-test.tar, fashion-mnist.tar, ants-bees.tar, clothing.tar and emoji.tar, and
efficientnet_lite0.safetensors for ``--teacher chosen``. Of each set at most 1,000 images are learned from. All cells of
a set take the same number of steps and the same augmentation, and learn from one teacher that was prepared on the same
labels (``--prepare``) and is found in the cache. ``--teacher chosen`` takes of three the one that was best on the other
half of each set's training images (docs/objectives.md), and lets it answer for eight views of each image.
``--teacher given`` does the same with a teacher that was trained before, in a run of its own, on all labels of the set,
also where its students have a tenth of them. ``--teacher default`` is what `remap distill --data FOLDER` takes:
mini_teacher, prepared in the best of a few ways in the run's epochs (of the digits, as their recipe has it: tuned
whole). A cell that has ended is one JSON file and is not run again. ``--table`` prints what is there, cells that lose
included.
Seeds are 1, 2, ...: the embedded pair was trained on CIFAR-10 by seed 0, whose draws of a classifier it has learned.
"""

import argparse
import itertools
import json
import shutil
import statistics
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from remap.data.sources import open_data
from remap.errors import RunError, TrainingError
from remap.pipeline.run import resume, start
from remap.recipe import resolve
from remap.recipe.schema import default_losses
from remap.runs.run_dir import RunDir
from remap.tuning import rows_of

# Each set: archive and folder of the images to learn from, those to check on, and how many of each are taken.
SETS = {
    "cifar10": ("cifar10-train.tar", "", "cifar10-test.tar", "", 1000),
    "clothing": ("clothing.tar", "train", "clothing.tar", "test", 1000),
    "fashion": ("fashion-mnist.tar", "train", "fashion-mnist.tar", "test", 1000),
    "ants-bees": ("ants-bees.tar", "train", "ants-bees.tar", "val", 1000),
    "emoji": ("emoji.tar", "", "emoji.tar", "", 1000),
    "digits": None,
}
METHODS = ("lora", "vpt_deep", "bitfit", "adaptformer", "full", "linear")
ALONE, KD, DEFAULT, AUTO = "labels only", "kd", "default", "auto"
LOSSES = {ALONE: "ce", KD: "ce,kd", DEFAULT: None, AUTO: "auto"}
ALL, FEW = 1.0, 0.1
# With a tenth of the labels: an ImageNet classifier at 96 pixels with a probed head, or mini_conv tuned whole.
CHOSEN, GIVEN, USUAL, VIEWS = "chosen", "given", "default", 8
BY_PROBE = {"model": "tf_efficientnet_lite0", "prepare": "probe", "image_size": 96}
BY_FULL = {"model": "mini_conv", "prepare": "full"}
OF_DIGITS = {"model": "mini_teacher", "prepare": "full", "lr": 1e-3}
TEACHERS = {name: BY_FULL if name in ("cifar10", "digits") else BY_PROBE for name in SETS}
WEIGHTS = "efficientnet_lite0.safetensors"
# Trained on all labels: mini_conv as a whole; else a linear classifier on the same network.
GIVEN_FULL = ("cifar10", "digits", "emoji")
BATCH, STEPS = 32, 300
# Few labels are learned by heart long before.
TEACHER_STEPS = {ALL: 900, FEW: 150}


@dataclass(frozen=True)
class Cell:
    """One run."""

    images: str
    labels: float
    method: str
    objective: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.images}-{self.labels:g}-{self.method}-{self.objective.replace(' ', '_')}-{self.seed}"


def seeds_of(count: int) -> range:
    return range(1, count + 1)


def _is_kd(method: str) -> bool:
    """Whether the default with all labels is ce and kd."""
    return [loss.name for loss in default_losses(method)] == ["ce", "kd"]


def cells(seeds: int, objectives: list[str], shares: list[float]) -> Iterator[Cell]:
    """Yield all cells, the most telling ones first: seed by seed, methods of different kinds, then more of each."""
    for seed, method, labels, images in itertools.product(seeds_of(seeds), METHODS, shares, SETS):
        for objective in objectives:
            if objective == KD and labels == ALL and _is_kd(method):
                continue  # the same run as the default
            yield Cell(images, labels, method, objective, seed)


def source_of(images: str, sets: Path, results: Path) -> str:
    """Return a source of at most 1,000 images to learn from and as many to check on; folders are made once."""
    if SETS[images] is None:
        return "digits"
    train, train_folder, val, val_folder, count = SETS[images]
    folder = results / "sets" / images
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        same = (train, train_folder) == (val, val_folder)  # divided here: every other image is to check on
        _extract(sets / train, train_folder, folder / "train", count, slice(0, None, 2) if same else slice(None))
        _extract(sets / val, val_folder, folder / "val", count, slice(1, None, 2) if same else slice(None))
        (folder / "done").touch()
    return str(folder)


def _extract(archive: Path, inside: str, target: Path, count: int, part: slice) -> None:
    """Write the first images of each class, as many of each, evenly over the names in their order."""
    with tarfile.open(archive) as tar:
        members: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
        for member in tar.getmembers():
            *folders, name = Path(member.name).parts or ("",)
            is_image = member.isfile() and Path(name).suffix.lower() in (".jpg", ".jpeg", ".png")
            if is_image and folders and inside in ("", *folders[:-1]):
                members[folders[-1]].append(member)
        for name, found in members.items():
            chosen = sorted(found, key=lambda member: member.name)[part]
            for member in chosen[: count // len(members)]:
                file = tar.extractfile(member)
                assert file is not None
                path = target / name / Path(member.name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())


def settings_of(steps: int, images: int, augment: str) -> list[str]:
    """Return the settings of so many steps on so many images."""
    epochs = max(1, round(steps / max(1, images // BATCH)))
    more = [f"train.epochs={epochs}", f"train.batch_size={BATCH}", f"train.eval_every={epochs}"]
    return [*more, f"data.augment={augment}"]


@dataclass(frozen=True)
class Bench:
    """Where the sets are and the results go, and what all cells share."""

    sets: Path
    results: Path
    augment: str
    teacher: str
    prepare: str

    def run(self, cell: Cell) -> None:
        """Run a cell, or resume it, unless it has ended or another process has it."""
        done, folder = self.results / f"{cell.name}.json", self.results / "runs" / cell.name
        if done.exists():
            return
        source = source_of(cell.images, self.sets, self.results)
        images = len(open_data(source, None, 0.2).train)
        labels = round(cell.labels * images)
        data: dict[str, Any] = {"source": source, **({"labels": labels} if cell.labels < 1 else {})}
        seen = labels if cell.objective == ALONE else images
        words: dict[str, Any] = {"data": data, "seed": cell.seed, "method": cell.method}
        words["losses"] = LOSSES[cell.objective]
        settings = settings_of(STEPS, seen, self.augment)
        if cell.objective != ALONE:
            epochs = max(1, round(TEACHER_STEPS[cell.labels] / max(1, labels // BATCH)))
            words["teacher"] = {"model": self.teacher, "prepare": self.prepare, "epochs": epochs}
            if self.teacher == USUAL:
                usual = {"model": "mini_teacher", "allow_weak": True}
                words["teacher"] = OF_DIGITS if source == "digits" else usual
            if self.teacher == CHOSEN:
                words["teacher"] |= TEACHERS[cell.images]
            if self.teacher == GIVEN:
                words["teacher"] = {"model": str(self.given(cell.images)), "cache": "disk"}
            if self.teacher in (CHOSEN, GIVEN):
                settings.append(f"data.views={VIEWS}")
            if words["teacher"].get("prepare") == "probe":
                del words["teacher"]["epochs"]
            if words["teacher"]["model"] == BY_PROBE["model"]:
                words["teacher"] |= {"weights": str(self.sets / WEIGHTS), "cache": "disk"}
        try:
            summary = self.finish(folder, words, settings)
        except (RunError, TrainingError) as error:  # as of a teacher that is worse than the untrained student
            print(f"{cell.name}: {error}", flush=True)
            return
        found = {"accuracy": summary["student"]["accuracy"], "seconds": summary["seconds"]}
        found |= {"losses": summary["losses"], "teacher": summary.get("teacher", {}).get("accuracy")}
        done.write_text(json.dumps(found))
        shutil.rmtree(folder, ignore_errors=True)

    def given(self, images: str) -> Path:
        """Return the run of a set's teacher, which learns from all labels; it is trained once."""
        folder = self.results / "teachers" / images
        source = source_of(images, self.sets, self.results)
        full = images in GIVEN_FULL
        student = {"model": "mini_conv"} if full else {"model": BY_PROBE["model"], "image_size": 96}
        if not full:
            student["weights"] = str(self.sets / WEIGHTS)
        words = {"data": {"source": source, "labels": None}, "seed": 1, "method": "full" if full else "linear"}
        words |= {"losses": "ce", "student": student}
        settings = settings_of(TEACHER_STEPS[ALL], len(open_data(source, None, 0.2).train), "shift" if full else "none")
        self.finish(folder, words, [*settings, *([] if full else ["train.lr=0.01"])])
        return folder

    @staticmethod
    def finish(folder: Path, words: dict[str, Any], settings: list[str]) -> dict[str, Any]:
        if (folder / "recipe.yaml").exists():
            run_dir = RunDir.open(folder)
            return run_dir.summary() if run_dir.is_done else dict(resume(folder).summary)
        return dict(start(resolve(None, words, settings), folder).summary)


def differences(results: Path, seeds: int, objective: str) -> dict[tuple[str, float, str], list[float]]:
    """Return accuracy minus that of labels only in points, one number a seed, by set, labels and method."""
    found = defaultdict(list)
    for images, labels, method, seed in itertools.product(SETS, (ALL, FEW), METHODS, seeds_of(seeds)):
        same = objective == KD and labels == ALL and _is_kd(method)
        pair = [Cell(images, labels, method, one, seed) for one in (ALONE, DEFAULT if same else objective)]
        files = [results / f"{cell.name}.json" for cell in pair]
        if all(file.exists() for file in files):
            alone, taught = (json.loads(file.read_text())["accuracy"] for file in files)
            found[images, labels, method].append(100 * (taught - alone))
    return dict(found)


def standard_error(values: list[float]) -> float:
    """Return the standard error of a mean; 0 of a single value, which has none."""
    return statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def table(results: Path, seeds: int) -> None:
    """Print differences to labels only in points as mean and standard error, the counts, and the rule of thumb."""
    for labels in (ALL, FEW):
        print(f"\n## {'all labels' if labels == ALL else 'labels of 10 %, the others without'}\n")
        print("| set | method | labels only | teacher | " + " | ".join((KD, DEFAULT, AUTO)) + " | seeds |")
        print("|---|---|---|---|" + "---|" * 4)
        by_objective = {objective: differences(results, seeds, objective) for objective in (KD, DEFAULT, AUTO)}
        for images, method in itertools.product(SETS, METHODS):
            columns = [by_objective[objective].get((images, labels, method), []) for objective in by_objective]
            if any(columns):
                print("| " + " | ".join(_row(results, seeds, images, labels, method, columns)) + " |")
        for objective, found in by_objective.items():
            cells_of = {key: values for key, values in found.items() if key[1] == labels}
            if cells_of:
                print(f"\n{objective}: {_count(cells_of)}")
                _print_kinds(cells_of)


def _row(
    results: Path, seeds: int, images: str, labels: float, method: str, columns: list[list[float]]
) -> Iterator[str]:
    files = [results / f"{Cell(images, labels, method, ALONE, seed).name}.json" for seed in seeds_of(seeds)]
    alone = [100 * json.loads(file.read_text())["accuracy"] for file in files if file.exists()]
    known = _teacher(results, images, labels)
    shown = [f"{statistics.mean(one):+.1f} ± {standard_error(one):.1f}" if one else "-" for one in columns]
    yield from (images, f"`{method}`", f"{statistics.mean(alone):.1f}", known, *shown, str(max(map(len, columns))))


def _teacher(results: Path, images: str, labels: float) -> str:
    """Return the accuracy in % of a set's teacher, the mean over the seeds that prepared one."""
    seeds = defaultdict(list)
    for file in results.glob(f"{images}-{labels:g}-*.json"):
        accuracy = json.loads(file.read_text())["teacher"]
        if accuracy is not None:
            seeds[file.stem.rpartition("-")[2]].append(accuracy)
    return f"{100 * statistics.mean(map(statistics.mean, seeds.values())):.1f}" if seeds else "-"


def _count(found: dict[tuple[str, float, str], list[float]]) -> str:
    kept = [key for key, values in found.items() if statistics.mean(values) >= -standard_error(values)]
    better = [key for key, values in found.items() if statistics.mean(values) > standard_error(values)]
    mean = statistics.mean(statistics.mean(values) for values in found.values())
    lost = ", ".join(f"{images} {method}" for images, _, method in found.keys() - set(kept)) or "none"
    return (
        f"{len(kept)} of {len(found)} cells not worse by more than one standard error, {len(better)} better by more,"
        f" {mean:+.1f} points on average; lost: {lost}"
    )


def _print_kinds(found: dict[tuple[str, float, str], list[float]]) -> None:
    """Print the rule of thumb: the mean difference of each category of methods."""
    kinds = defaultdict(list)
    for (_, _, method), values in found.items():
        kinds[rows_of(method)[0].category].append(statistics.mean(values))
    for kind, means in kinds.items():
        print(f"- {kind}: {statistics.mean(means):+.1f} points over {len(means)} cells")


def main() -> None:
    """Run what is missing, then print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--sets", type=Path, required=True)
    words.add_argument("--results", type=Path, required=True)
    words.add_argument("--minutes", type=float, default=60.0)
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--augment", default="shift")
    words.add_argument(
        "--teacher", default="mini_teacher", help=f"or {CHOSEN}, {GIVEN}, {USUAL}; results in a DIR each"
    )
    words.add_argument("--prepare", default="auto", help="teacher.prepare")
    words.add_argument("--labels", nargs="+", type=float, default=[ALL, FEW], choices=[ALL, FEW])
    words.add_argument("--objectives", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    words.add_argument("--table", action="store_true")
    options = words.parse_args()
    torch.set_num_threads(1)
    (options.results / "runs").mkdir(parents=True, exist_ok=True)
    bench = Bench(options.sets, options.results, options.augment, options.teacher, options.prepare)
    end = time.monotonic() + 60 * options.minutes
    if not options.table:
        for cell in cells(options.seeds, options.objectives, options.labels):
            if time.monotonic() < end:
                bench.run(cell)
    table(options.results, options.seeds)


if __name__ == "__main__":
    main()
