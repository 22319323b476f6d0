"""Many short runs with signals at random moments, resumes and evaluations: `python tools/soak.py --runs 200 --seed 0`.

Every run is one process, forked from this one, which has imported everything: a run takes a fraction of a
second. In between, this process trains and evaluates too, and measures its memory. At the end nothing may be
left: no file that an uninterrupted run does not write, no process, no memory; and every interrupted run equals the
same run without interruptions in every byte of its task file. Exit code 1 if not. Prints JSON; `--figures FILE` appends
what docs/guarantees.md shows.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import re
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Every method family, cached teacher outputs on disk and in memory, and all that carries state from step to step.
RECIPES: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "prompts": ("distill", (), {"method": "vpt_deep", "losses": "ce,kd,attention"}),
    "views on disk": (
        "distill",
        ("data.augment=shift", "data.views=2", "teacher.cache=disk"),
        {"method": "lora", "losses": "ce,kd"},
    ),
    "accumulation": (
        "distill",
        ("data.augment=shift_flip", "train.accumulation=2"),
        {"method": "adaptformer", "losses": "ce,kd,feature"},
    ),
    "an average": ("distill", ("data.augment=shift", "data.mixup=0.8"), {"teacher": "ema", "losses": "ce,kd"}),
    "mixing": (
        "distill",
        ("data.augment=shift", "data.mixup=0.8", "data.cutmix=1.0", "train.accumulation=2"),
        {"method": "full", "losses": "ce,kd"},
    ),
    "batch statistics": ("tune", ("data.augment=shift",), {"method": "mlp", "losses": "ce"}),
    "ranks that fall": ("tune", (), {"method": "adalora", "losses": "ce"}),
    "few labels": ("distill", ("data.labels=12",), {"method": "bitfit", "losses": "ce,kd,feature"}),
}
EPOCHS = 4
STOPS = ("SIGKILL", "SIGTERM", "SIGINT", "file", "SIGTERM twice")
EXITS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "file": 143, "SIGTERM twice": 143}
EARLY = {"SIGTERM": -15, "SIGINT": -2, "SIGTERM twice": -15}
INTERRUPTIONS = 3
# Times as many runs as --runs, if signals come too late to interrupt half as many.
MOST = 5
PATIENCE = 60.0
# What the memory of this process may grow by over the second half of the runs.
GROWTH_BYTES = 16 * 2**20
# Samples that say something about it: allocators take a few dozen runs to settle.
ENOUGH = 20


def fork(work: Callable[[], None], output: Path) -> int:
    """Do ``work`` in a child with a process group of its own, its stdout and stderr in a file; gives its pid."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # whoever of the two is first
            os.setpgid(pid, pid)
        return pid
    code = 70
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:  # before the command had a handler: Python's own way
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def command(*words: str) -> Callable[[], None]:
    """The command line, to be called in a child of ``fork``."""

    def work() -> None:
        from remap_cli.main import main

        sys.argv = ["remap", *words]
        main()

    return work


def wait(pid: int, seconds: float = PATIENCE) -> int | None:
    """The exit code of a child, negative for a signal; None, and it is killed, if it takes longer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def names(folder: Path) -> set[str]:
    """Everything in a folder, with numbers of generations and cache keys taken out."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {re.sub(r"\d{6,}", "N", re.sub(r"[0-9a-f]{12,}", "KEY", name)) for name in found}


@dataclass
class Soak:
    """Where it happens, and what has been seen so far."""

    folder: Path
    tiny: Any
    random: random.Random
    recipes: Sequence[str]
    seconds: dict[str, float] = field(default_factory=dict)
    stops: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def words(self, name: str) -> list[str]:
        kind, settings, words = RECIPES[name]
        shared = (f"train.epochs={EPOCHS}", "train.checkpoint_seconds=0", "data.workers=2")
        allow = ("teacher.allow_weak=true",) if kind == "distill" else ()
        words = {**words, "teacher": f"{self.tiny.teacher},ema"} if words.get("teacher") == "ema" else words
        arguments = self.tiny.arguments(*shared, *settings, *allow, **words)
        return [kind, *(word for word in arguments if kind == "distill" or not word.startswith("--teacher"))]

    def reference(self, name: str) -> Path:
        return self.folder / "references" / name.replace(" ", "_")

    def make_references(self) -> None:
        for name in self.recipes:
            started = time.monotonic()
            pid = fork(command(*self.words(name), f"--output={self.reference(name)}"), self.log)
            if wait(pid) != 0:
                raise SystemExit(f"the undisturbed {name} failed:\n{self.log.read_text()[-3000:]}")
            self.seconds[name] = time.monotonic() - started

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def run(self, number: int) -> None:
        """One run, interrupted up to three times, then left alone until it is done."""
        name = self.random.choice(self.recipes)
        run = self.folder / "runs" / f"{number:04d}"
        planned = self.random.randint(0, INTERRUPTIONS)
        for attempt in range(planned + 1):
            self.log.unlink(missing_ok=True)
            resuming = (run / "recipe.yaml").is_file()
            self.seen["resumes"] += resuming
            kind = self.words(name)[0]
            words = [kind, f"--resume={run}"] if resuming else [*self.words(name), f"--output={run}"]
            pid = fork(command(*words), self.log)
            stop = self.random.choice(STOPS) if attempt < planned else None
            moment = self.random.uniform(0.02, 1.0) * self.seconds[name]
            code = self.interrupt(pid, run, stop, moment) if stop else wait(pid)
            wanted = {0} if stop is None else {0, EXITS[stop]}
            if not _text(self.log) and stop in EARLY:  # before the command had a handler, as in any program
                wanted.add(EARLY[stop])
            if code not in wanted:
                self.problems.append(f"run {number} ({name}), {stop}: exit code {code}\n{_text(self.log)[-800:]}")
                return
            if code:
                self.stops[stop] += 1
            if code == 0 and stop:  # this machine is faster now than it was for the uninterrupted run
                self.seen["runs that were faster than the signal"] += 1
                self.seconds[name] /= 2
                break
        self.compare(number, name, run)

    def interrupt(self, pid: int, run: Path, stop: str, moment: float) -> int | None:
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            if stop == "file":
                if run.is_dir() and json.loads(_text(run / "status.json") or "{}").get("status") == "running":
                    (run / "stop").touch()
            elif stop == "SIGTERM twice":
                os.killpg(pid, signal.SIGTERM)
                time.sleep(self.random.uniform(0, 0.02))
                os.killpg(pid, signal.SIGTERM)
            else:
                os.killpg(pid, signal.Signals[stop])
        code = wait(pid)
        if code == 0 and stop == "file":  # it came after the last look
            (run / "stop").unlink(missing_ok=True)
        return code

    def compare(self, number: int, name: str, run: Path) -> None:
        """Compare a finished run with the uninterrupted one: the student's bytes, files, and a second evaluation."""
        reference = self.reference(name)
        same = all((run / p).read_bytes() == (reference / p).read_bytes() for p in ("task/task.safetensors",))
        self.seen["results equal to the uninterrupted run's"] += same
        self.seen["runs finished"] += 1
        if not same:
            self.problems.append(f"run {number} ({name}): its student differs from the uninterrupted run's")
        if names(run) != names(reference):
            strays = sorted(names(run) ^ names(reference))
            self.seen["stray files"] += len(strays)
            self.problems.append(f"run {number} ({name}): files differ from the uninterrupted run's: {strays}")
        summary = json.loads((run / "summary.json").read_text())
        counted = self.evaluate(run)
        if counted != (summary["student"]["correct"], summary["data"]["val_images"]):
            self.problems.append(f"run {number} ({name}): evaluated again {counted}, and had {summary['student']}")
        self.seen["evaluations that repeat the run's"] += 1

    def evaluate(self, run: Path) -> tuple[int, int]:
        from remap.pipeline.evaluate_run import evaluate_run
        from remap.progress import Silent

        found = evaluate_run(run, None, False, Silent())
        return found["correct"], found["images"]

    def train_here(self, name: str, folder: Path) -> None:
        """An undisturbed run in this process, whose memory is looked at."""
        from remap.pipeline.run import distill

        distill(self.recipe(name), output=folder)
        gc.collect()
        self.memory.append(_resident_bytes())

    def recipe(self, name: str) -> Any:
        """As ``words``, for Python and of one epoch."""
        from remap.recipe import resolve

        kind, settings, words = RECIPES[name]
        words = {"data": self.tiny.data, "student": self.tiny.student, **words}
        if kind == "distill":
            words["teacher"] = f"{self.tiny.teacher},ema" if words.get("teacher") == "ema" else self.tiny.teacher
            settings = (*settings, "teacher.allow_weak=true")
        return resolve(words=words, settings=[*self.tiny.SETTINGS, *settings, "train.epochs=1", "data.workers=2"])

    def growth(self) -> int:
        """Bytes by which this process's memory grew over the second half: a line through the samples."""
        half = self.memory[len(self.memory) // 2 :]
        if len(half) < ENOUGH:
            return 0
        middle, mean = (len(half) - 1) / 2, sum(half) / len(half)
        slope = sum((i - middle) * (m - mean) for i, m in enumerate(half)) / sum(
            (i - middle) ** 2 for i in range(len(half))
        )
        return int(slope * (len(half) - 1))


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _children() -> list[str]:
    """Processes of this one and of the groups it started that still run."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@contextlib.contextmanager
def _places(folder: Path) -> Iterator[None]:
    """Caches and temporary files go into the folder of the soak."""
    inner = {"REMAP_CACHE": "cache", "TMPDIR": "tmp"}
    before = {name: os.environ.get(name) for name in inner}
    for name, place in inner.items():
        (folder / place).mkdir()
        os.environ[name] = str(folder / place)
    tempfile.tempdir = str(folder / "tmp")
    try:
        yield
    finally:
        tempfile.tempdir = None
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def soak(runs: int, seed: int, folder: Path, recipes: Sequence[str] = tuple(RECIPES)) -> dict[str, Any]:
    """Do ``runs`` runs in an empty folder, and more if fewer than half as many were interrupted by then.

    Args:
        recipes: The names of those that are drawn from.

    Returns:
        The counts, and under "problems" all that must not happen.
    """
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests"))  # what conftest.py imports from beside it
    helpers = runpy.run_path(str(ROOT / "tests" / "conftest.py"))
    with _places(folder):
        helpers["draw_images"](folder / "data" / "train", 8, seed=1)
        helpers["draw_images"](folder / "data" / "val", 3, seed=2)
        helpers["write_model"](
            folder / "student", seed=3, embed_dim=16, depth=2, proj_drop_rate=0.1, drop_path_rate=0.2
        )
        helpers["write_model"](folder / "teacher", seed=4, embed_dim=24, depth=3)
        models = [f"local-dir:{folder / name}" for name in ("student", "teacher")]
        work = Soak(folder, helpers["Tiny"](str(folder / "data"), *models), random.Random(seed), recipes)
        import remap_cli.app
        import remap_cli.main  # noqa: F401 - all that a child would import anew, before the first fork
        from remap.distributed import interrupts

        interrupts.CHECK_EVERY = 0.02  # for the file `stop`: a whole run takes less than a second here
        for name in work.recipes:
            work.train_here(name, folder / "here" / name)
        threads = threading.active_count()
        work.make_references()
        cached = names(folder / "cache")
        started = time.monotonic()
        number = 0
        while number < runs or (work.stops.total() < runs / 2 and number < MOST * runs):
            work.run(number)
            if number % 2:
                work.train_here(recipes[number // 2 % len(recipes)], folder / "here" / f"{number:04d}")
            number += 1
        left = {
            "in the cache": sorted(names(folder / "cache") - cached),
            "temporary files": sorted(names(folder / "tmp")),
            "processes": _children(),
            "threads": list(range(threads, threading.active_count())),
        }
    work.problems += [f"left over, {what}: {found}" for what, found in left.items() if found]
    if work.growth() > GROWTH_BYTES:
        work.problems.append(f"memory grew by {work.growth():,} bytes over the second half of the runs")
    return {
        "runs": number,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "stopped by": dict(work.stops),
        **dict(work.seen),
        "stray files": work.seen["stray files"] + len(left["in the cache"]) + len(left["temporary files"]),
        "leaked processes": len(left["processes"]),
        "memory growth over the second half, bytes": work.growth(),
        "problems": work.problems,
    }


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page of guarantees shows, as the fixture ``figure`` of the tests writes it."""
    stopped = sum(count for how, count in found["stopped by"].items() if how != "none")
    done = found.get("runs finished", 0)
    rows = [
        ("runs finished", done, found["runs"]),
        ("results equal to the uninterrupted run's", found.get("results equal to the uninterrupted run's", 0), done),
        ("evaluations that repeat the run's", found.get("evaluations that repeat the run's", 0), done),
        ("interruptions", stopped, None),
        ("stray files", found["stray files"], None),
        ("leaked processes", found["leaked processes"], None),
        (
            "growth of memory over the second half, MB",
            round(max(0, found["memory growth over the second half, bytes"]) / 1e6, 1),
            None,
        ),
        ("duration, minutes", round(found["seconds"] / 60, 1), None),
    ]
    return [{"test": "tools/soak.py", "what": what, "value": value, "of": of} for what, value, of in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=Path, help="append what docs/guarantees.md shows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="remap-soak-") as folder:
        found = soak(arguments.runs, arguments.seed, Path(folder))
    print(json.dumps(found, indent=1))
    if arguments.figures is not None:
        with open(arguments.figures, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in figures(found))
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
