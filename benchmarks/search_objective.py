"""A search of the objective where all images have labels, judged by training images that no page reports.

Run: python benchmarks/search_objective.py --sets DIR --results DIR [--objectives kd4 kd1] [--methods lora bitfit]
    [--names clothing fashion] [--seeds 1] [--table]

DIR holds the archives of when_a_teacher_pays.py. Of the training images of each set some are learned from (908 to
1,029; 600 digits) and others judge (1,276 to 2,046; 400 digits); ``category`` are emoji by their category, other names
in the one than in the other. Teachers are those of ``--teacher given`` there, trained on all labels of the images to
learn from. Cells take 300 steps of 32 images with data.augment=shift; with a teacher eight views of each image are
cached. ``soft`` objectives have a teacher whose logits are divided so that their standard deviation over the classes
is 2.5 on average. Several processes may run at once: a cell or teacher belongs to the one that claims its file first;
after a kill, remove the files *.claimed that have no result.
"""

import argparse
import csv
import io
import itertools
import json
import os
import shutil
import statistics
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from when_a_teacher_pays import BY_PROBE, GIVEN_FULL, TEACHER_STEPS, VIEWS, WEIGHTS, Bench, settings_of

from remap.data.sources import open_data
from remap.pipeline.student_api import load_student
from remap.runs.task import save_task

Members = list[tarfile.TarInfo]
# Archive, folder in it, and of each class the images to learn from and those to judge by, in the order of their names.
SETS: dict[str, tuple[str, str, Callable[[Members], Members], Callable[[Members], Members]]] = {
    "clothing": ("clothing.tar", "train", lambda m: m[1::2][:100], lambda m: m[0::2][:200]),
    "fashion": ("fashion-mnist.tar", "train", lambda m: m[100:200], lambda m: m[200:400]),
    "emoji": ("emoji.tar", "", lambda m: m[0::2][333:666], lambda m: m[0::2][666:] + m[1::2][333:]),
    "cifar10": ("cifar10-train.tar", "", lambda m: m[100:200], lambda m: m[200:400]),
}
CATEGORY, DIGITS, LEAST_NAMES, NAMES = "category", "digits", 60, 45
NAMES_OF_SETS = (*SETS, CATEGORY, DIGITS)
METHODS = ("lora", "bitfit", "vpt_deep", "full")
CE: dict[str, Any] = {"name": "ce"}
SOFT, USUAL = "soft", 2.5


def kd(temperature: float, **options: Any) -> dict[str, Any]:
    return {"name": "kd", "temperature": temperature, **options}


OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "ce": [CE],
    "kd4": [CE, kd(4.0)],
    "kd2": [CE, kd(2.0)],
    "kd1": [CE, kd(1.0)],
    "kd4 x 0.3": [CE, kd(4.0, weight=0.3)],
    "logit_std": [CE, {"name": "logit_std"}],
    "feature": [CE, {"name": "feature"}],
    "feature, kd1": [CE, kd(1.0), {"name": "feature"}],
    "soft kd4": [CE, kd(4.0)],
    "soft kd2": [CE, kd(2.0)],
    "soft kd4, ce x 0.1": [{**CE, "weight": 0.1}, kd(4.0)],
    "soft feature, kd4": [CE, kd(4.0), {"name": "feature"}],
}


def make_sets(archives: Path, folder: Path) -> None:
    """Write the images to learn from and those to judge by, once."""
    if not claims(folder):
        while not (folder / "done").exists():  # another process makes them
            time.sleep(1)
        return
    for name, (archive, inside, learn, judge) in SETS.items():
        with tarfile.open(archives / archive) as tar:
            for label, members in _by_class(tar, inside).items():
                for part, chosen in (("train", learn(members)), ("val", judge(members))):
                    for member in chosen:
                        _write(tar, member, folder / name / part / label / Path(member.name).name)
    _make_categories(archives / "emoji.tar", folder / CATEGORY)
    digits = open_data(DIGITS, None, 0.2).train
    for index, label in enumerate(digits.labels.tolist()):
        path = folder / DIGITS / ("train" if index % 5 < 3 else "val") / str(label) / f"{index}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(digits.read(index))
    (folder / "done").touch()


def _by_class(tar: tarfile.TarFile, inside: str) -> dict[str, Members]:
    found: defaultdict[str, Members] = defaultdict(list)
    for member in sorted(tar.getmembers(), key=lambda one: one.name):
        *folders, name = Path(member.name).parts or ("",)
        if member.isfile() and folders and name.endswith((".jpg", ".jpeg", ".png")) and inside in ("", *folders[:-1]):
            found[folders[-1]].append(member)
    return found


def _make_categories(archive: Path, folder: Path) -> None:
    """Write emoji of all vendors by category: 45 names of each to learn from, 90 others to judge by."""
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar.getmembers() if member.isfile()}
        table = next(member for name, member in members.items() if name.endswith("captions.csv"))
        rows: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        for row in csv.DictReader(io.TextIOWrapper(tar.extractfile(table) or io.BytesIO(), "utf-8")):
            rows[row["category"]].append(row)
        for category, of_category in rows.items():
            names = sorted({row["name"] for row in of_category})
            if len(names) < LEAST_NAMES:
                continue
            parts = dict.fromkeys(names[0::3][:NAMES], "train")
            parts |= dict.fromkeys([*names[1::3][:NAMES], *names[2::3][:NAMES]], "val")
            for row in (one for one in of_category if one["name"] in parts):
                member = next(members[name] for name in members if name.endswith(row["path"]))
                label = category.replace(" ", "-").replace("&", "and")
                path = folder / parts[row["name"]] / label / f"{row['vendor']}-{Path(row['path']).name}"
                _write(tar, member, path)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    file = tar.extractfile(member)
    assert file is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.read())


def teacher_of(name: str, archives: Path, results: Path, *, soft: bool) -> Path:
    """Return a set's teacher, trained once; ``soft`` is a copy whose logits are on the usual scale."""
    folder, source = results / "teachers" / name, str(results / "sets" / name)
    full = name in GIVEN_FULL
    student: dict[str, Any] = {"model": "mini_conv"}
    if not full:
        student = {"model": BY_PROBE["model"], "image_size": BY_PROBE["image_size"], "weights": str(archives / WEIGHTS)}
    words = {"data": {"source": source}, "seed": 1, "losses": "ce", "student": student}
    words["method"] = "full" if full else "linear"
    if claims(folder):
        count = len(open_data(source, None, 0.2).train)
        settings = settings_of(TEACHER_STEPS[1.0], count, "shift" if full else "none")
        Bench.finish(folder, words, [*settings, *([] if full else ["train.lr=0.01"])])
        _soften(folder, source, words["method"])
    while not (softened := _soft(folder)).exists():  # another process trains it
        time.sleep(5)
    return softened if soft else folder


def claims(path: Path) -> bool:
    """Whether this process is the first one to claim what it will write at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path.with_suffix(".claimed"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _soft(teacher: Path) -> Path:
    return teacher.with_name(f"{teacher.name}-{SOFT}")


def _soften(teacher: Path, source: str, method: str) -> None:
    """Write a copy of a teacher whose classifier is scaled."""
    student, split = load_student(teacher, "cpu"), open_data(source, None, 0.2).train
    views = [torch.from_numpy(student.view.read(split.read(index))) for index in range(0, len(split), 4)]
    parts = [student.logits_of_views(torch.stack(views[start : start + 50])) for start in range(0, len(views), 50)]
    scale = USUAL / float(torch.cat(parts).float().std(dim=1).mean())
    with torch.no_grad():
        for name, parameter in student.network.trained.items():
            if name.startswith(("head.", "classifier.")):
                parameter.mul_(scale)
    draft = teacher.with_name(f"{teacher.name}-draft")
    shutil.rmtree(draft, ignore_errors=True)
    save_task(draft, student.network, student.view, method, {})
    draft.rename(_soft(teacher))


def run(name: str, method: str, objective: str, seed: int, archives: Path, results: Path) -> None:
    """Run one cell, unless another process has it."""
    done = results / f"{name}-{method}-{objective.replace(' ', '_')}-{seed}.json"
    if not claims(done):
        return
    source = str(results / "sets" / name)
    words: dict[str, Any] = {
        "data": {"source": source},
        "seed": seed,
        "method": method,
        "losses": OBJECTIVES[objective],
    }
    settings = settings_of(300, len(open_data(source, None, 0.2).train), "shift")
    if objective != "ce":
        teacher = teacher_of(name, archives, results, soft=objective.startswith(SOFT))
        words["teacher"] = {"model": str(teacher), "cache": "disk"}
        settings.append(f"data.views={VIEWS}")
    started, folder = time.monotonic(), results / "runs" / done.stem
    summary = Bench.finish(folder, words, settings)
    done.write_text(json.dumps({"accuracy": summary["student"]["accuracy"], "precision": summary["precision"]}))
    print(f"{done.stem}: {summary['student']['accuracy']:.1%}, {time.monotonic() - started:.0f} s", flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def table(results: Path, seeds: int) -> None:
    """Print differences to ce in points, then mean and worst of each objective and method."""
    found: dict[tuple[str, str, int], dict[str, float]] = defaultdict(dict)
    for name, method, seed in itertools.product(NAMES_OF_SETS, METHODS, range(1, seeds + 1)):
        for objective in OBJECTIVES:
            file = results / f"{name}-{method}-{objective.replace(' ', '_')}-{seed}.json"
            if file.exists():
                found[name, method, seed][objective] = 100 * json.loads(file.read_text())["accuracy"]
    names = [one for one in OBJECTIVES if any(one in row for row in found.values())]
    print(f"| method | set | seed | {' | '.join(names)} |\n|---|---|---|{'---:|' * len(names)}")
    means: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (name, method, seed), row in sorted(found.items(), key=lambda one: (one[0][1], one[0][0])):
        cells = [f"{row['ce']:.1f}" if "ce" in row else "-"]
        for objective in names[1:]:
            known = objective in row and "ce" in row
            cells.append(f"{row[objective] - row['ce']:+.1f}" if known else "-")
            if known:
                means[objective, method].append(row[objective] - row["ce"])
        print(f"| `{method}` | {name} | {seed} | {' | '.join(cells)} |")
    for (objective, method), values in sorted(means.items()):
        print(f"- {objective}, `{method}`: {statistics.mean(values):+.2f} over {len(values)}, worst {min(values):+.1f}")


def search(
    doc: str | None,
    column: str,
    choices: Sequence[str],
    methods: Sequence[str],
    run_cell: Callable[[str, str, str, int, argparse.Namespace], None],
    show: Callable[[Path, int], None],
) -> None:
    """Run what is missing of a search, set by set within each choice, then show its table.

    Args:
        column: What is compared, as the option is called: "objectives".
        run_cell: Runs a cell of set, method, choice and seed.
    """
    words = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--sets", type=Path, required=True)
    words.add_argument("--results", type=Path, required=True)
    words.add_argument(f"--{column}", nargs="+", default=list(choices), choices=list(choices), dest="chosen")
    words.add_argument("--methods", nargs="+", default=list(methods), choices=list(methods))
    words.add_argument("--names", nargs="+", default=list(NAMES_OF_SETS), choices=list(NAMES_OF_SETS))
    words.add_argument("--seeds", type=int, default=1)
    words.add_argument("--table", action="store_true")
    options = words.parse_args()
    torch.set_num_threads(1)
    (options.results / "runs").mkdir(parents=True, exist_ok=True)
    if not options.table:
        make_sets(options.sets, options.results / "sets")
        every = itertools.product(range(1, options.seeds + 1), options.methods, options.chosen, options.names)
        for seed, method, choice, name in every:
            run_cell(name, method, choice, seed, options)
    show(options.results, options.seeds)


if __name__ == "__main__":

    def cell(name: str, method: str, objective: str, seed: int, options: argparse.Namespace) -> None:
        run(name, method, objective, seed, options.sets, options.results)

    search(__doc__, "objectives", list(OBJECTIVES), METHODS, cell, table)
