"""What a teacher costs in training: kept outputs against asking it in every step, logit distillation against timm's
own task, what one attention term adds, and how near the dry run's estimates come.

Run: python benchmarks/distillation.py [--what cached,timm,attention,estimate] [--pair mini|base|large] [--repeats 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from remap.cache.cache_folders import DATA_FILE, ROWS_FILE
from remap.cache.output_format import OutputFormat
from remap.cache.output_store import OutputStore
from remap.cache.teacher_cache import cache_in_memory, cache_on_disk
from remap.distributed.launch import accelerator
from remap.engine.job import Job, StudentStep
from remap.engine.loop import train
from remap.engine.optim import make_optimizer
from remap.engine.teacher import CachedOutputs
from remap.network import Runner
from remap.pipeline.components import build_components
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import finite_views, make_teacher
from remap.progress import Silent
from remap.recipe import Recipe, resolve
from remap.remapping.labels import Labels


@dataclass(frozen=True)
class Pair:
    """Two networks with random weights, their images and the steps of one repeat."""

    teacher: str
    student: str
    side: int
    batch: int
    steps: int


PAIRS = {
    "mini": Pair("mini_teacher", "mini_student", 32, 64, 10),
    "base": Pair("vit_base_patch16_224", "vit_small_patch16_224", 224, 8, 1),
    "large": Pair("vit_large_patch16_224", "vit_small_patch16_224", 224, 128, 20),
}
CLASSES, PEAK, CLIP, TEMPERATURE = 10, 1e-4, 1.0, 4.0
ATTENTION = ("attention", "attention_cls", "relations")


@dataclass(frozen=True)
class Setting:
    """What every section needs to know."""

    pair: str
    batch: int
    steps: int
    repeats: int
    precision: str
    methods: tuple[str, ...]
    runs: tuple[str, ...]
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "images"

    def recipe(self, method: str, losses: str) -> Recipe:
        pair = PAIRS[self.pair]
        words = {"teacher": pair.teacher, "student": pair.student, "data": str(self.data), "method": method}
        optimiser = [f"train.lr={PEAK}", "train.warmup_epochs=0", f"train.clip_norm={CLIP}", "train.weight_decay=0"]
        models = ["teacher.weights=none", "student.weights=none", "teacher.allow_weak=true"]
        return resolve(
            words={**words, "losses": losses, "batch_size": self.batch, "epochs": 1},
            settings=[*optimiser, *models, f"train.precision={self.precision}", "train.checkpoint_seconds=1000000"],
        )

    def draw(self) -> None:
        """Noise in ten classes, ``steps`` batches of it; remap decodes it once and keeps it in memory."""
        draws, side = np.random.default_rng(0), PAIRS[self.pair].side
        for split, count in (("train", self.steps * self.batch), ("val", CLASSES)):
            for index in range(max(count, CLASSES)):
                path = self.data / split / str(index % CLASSES) / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draws.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(path, compress_level=1)


class Engine:
    """``remap.engine.loop`` with a teacher whose outputs may be cached; there is no evaluation and no checkpoint."""

    def __init__(self, setting: Setting, method: str, losses: str) -> None:
        self.recipe, self.setting = setting.recipe(method, losses), setting
        self.parts = build_components(self.recipe, None, Silent(), SharedResources())
        self.device = accelerator().device
        self.parts.objective.to(self.device)
        self.teacher = make_teacher(self.parts, 0)
        self.kept: dict[str, CachedOutputs | None] = {"online": None}

    def cache_in_memory(self) -> None:
        size = self.setting.batch
        cache_in_memory(self.teacher, finite_views(self.parts), size, size, accelerator(), Silent())
        self.kept["memory"] = self.teacher.cached

    def cache_on_disk(self) -> None:
        items = {name: OutputFormat(shape) for name, shape in self.teacher.shapes(self.parts.views.view.shape).items()}
        key = {"benchmark": [self.recipe.digest(), self.setting.pair]}
        store = OutputStore.open(self.setting.folder / "cache", key, items)
        views = finite_views(self.parts)
        size = self.setting.batch
        self.kept["disk"] = cache_on_disk(self.teacher, store, views, size, size, accelerator(), Silent())

    def run(self, where: str) -> None:
        """One epoch."""
        self.teacher.cached = self.kept[where]
        job = Job(
            recipe=self.recipe,
            student=self.parts.student,
            objective=self.parts.objective,
            teachers=[self.teacher],
            source=self.parts.views.train,
            accelerator=accelerator(),
            bf16=self.parts.bf16,
            progress=Silent(),
            evaluate=lambda: {},
            on_epoch=lambda step, history: None,
        )
        train(job)

    def batch(self) -> tuple[Tensor, Tensor]:
        """The first images, and their labels, on the device."""
        images, good = self.parts.views.train.batch(range(self.setting.batch))
        return images.to(self.device), torch.from_numpy(self.parts.views.train.split.labels[good]).to(self.device)


class Alone:
    """The teacher's forward pass and the student's step, each by itself on one batch that lies on the device."""

    def __init__(self, engine: Engine) -> None:
        self.engine, parts = engine, engine.parts
        engine.teacher.cached = None
        self.images, classes = engine.batch()
        self.labels = Labels(classes)
        self.targets = [engine.teacher.items(self.images)]
        self.step = StudentStep(parts.student, parts.objective, bf16=parts.bf16).to(engine.device)
        extra = [(name, p) for name, p in parts.objective.named_parameters() if p.requires_grad]
        self.parameters = [*parts.student.trained.values(), *(p for _, p in extra)]
        self.optimizer = make_optimizer(parts.student, extra, PEAK, 0.0)

    def ask_teacher(self) -> None:
        for _ in range(self.engine.setting.steps):
            self.engine.teacher.items(self.images)

    def train_student(self) -> None:
        self.engine.parts.student.attached.train()
        for _ in range(self.engine.setting.steps):
            self._gradients()
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self) -> None:
        total, _ = self.step(self.images, self.targets, self.labels)
        total.backward()

    def flops(self) -> tuple[int, int, int]:
        """Of the teacher's forward pass, the student's forward pass, and its forward and backward pass."""
        runner = Runner(self.engine.parts.student, bf16=self.engine.parts.bf16)
        forward = _flops(lambda: runner(self.images))
        runner.tap.close()
        self.engine.parts.student.attached.train()
        counts = _flops(lambda: self.engine.teacher.items(self.images)), forward, _flops(self._gradients)
        self.optimizer.zero_grad(set_to_none=True)
        return counts

    def close(self) -> None:
        self.step.runner.tap.close()


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# --- clocks


def timed(work: Callable[[], None]) -> float:
    """Seconds; on the CPU with one thread those of the processor, which waiting on a busy machine does not add to."""
    if accelerator().device.type == "cuda":
        torch.cuda.synchronize()
        clock = time.perf_counter
    else:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    work()
    if accelerator().device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def in_turns(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, after one run to warm up; the order turns round from repeat to repeat."""
    for work in sides.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        names = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
        for name in names:
            found[name].append(timed(sides[name]))
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, str]:
    """Median of the pairs' ratios, and how it is shown."""
    found = [one / other for one, other in zip(above, below, strict=True)]
    median = statistics.median(found)
    return median, f"{median:.3f} ({min(found):.3f} to {max(found):.3f}, {len(found)})"


def milliseconds(seconds: Sequence[float], steps: int) -> str:
    return f"{1000 * statistics.median(seconds) / steps:,.1f} ms"


def table(*columns: str) -> None:
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


# --- kept outputs against online


def cached(setting: Setting) -> None:
    """Online over kept, beside the bound: (teacher's forward + student's step) / student's step."""
    table(
        *("method", "losses", "online", "kept in memory", "on disk", "speed-up, memory", "speed-up, disk"),
        *("bound by time", "bound by FLOPs (student's step in forward passes)", "share of the bound by time, by FLOPs"),
    )
    for method in setting.methods:
        for losses in ("ce,kd", "ce,kd,feature"):
            engine = Engine(setting, method, losses)
            engine.cache_in_memory()
            engine.cache_on_disk()
            alone = Alone(engine)
            sides = {where: partial(engine.run, where) for where in engine.kept}
            times = in_turns({**sides, "teacher": alone.ask_teacher, "student": alone.train_student}, setting.repeats)
            teacher, forward, step = alone.flops()
            alone.close()
            engine.teacher.close()
            both = [t + s for t, s in zip(times["teacher"], times["student"], strict=True)]
            by_time, shown_bound = ratio(both, times["student"])
            by_flops = 1 + teacher / step
            in_memory, shown_memory = ratio(times["online"], times["memory"])
            _, shown_disk = ratio(times["online"], times["disk"])
            row(
                *(f"`{method}`", losses, *(milliseconds(times[where], setting.steps) for where in sides)),
                *(shown_memory, shown_disk, shown_bound, f"{by_flops:.2f} ({step / forward:.2f})"),
                f"{in_memory / by_time:.0%}, {in_memory / by_flops:.0%}",
            )


# --- against timm


class TimmTask:
    """timm's ``LogitDistillationTask`` in the plainest loop: nothing is read back, nothing is looked at."""

    def __init__(self, setting: Setting) -> None:
        from timm.task import LogitDistillationTask

        self.setting = setting
        # The same recipe, so the same weights; remap only builds the networks and decodes the images here.
        self.parts = build_components(setting.recipe("full", "ce,kd"), None, Silent(), SharedResources())
        student, teacher, self.device = self.parts.student, self.parts.teachers[0].network, accelerator().device
        self.preprocess = Runner(student).preprocess
        self.task = LogitDistillationTask(
            student_model=student.model,
            teacher_model=teacher.model,
            criterion=torch.nn.CrossEntropyLoss(),
            distill_loss_weight=1.0,
            task_loss_weight=1.0,
            temperature=TEMPERATURE,
            device=self.device,
            verbose=False,
        )
        self.trained = list(student.trained.values())
        self.source = self.parts.views.train
        self.labels = torch.from_numpy(self.source.split.labels)

    def loss(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.parts.bf16):
            return self.task(self.preprocess(images_BCHW), labels_B)["loss"]

    def run(self) -> None:
        """One epoch."""
        self.task.train()
        optimizer = torch.optim.AdamW(self.trained, lr=PEAK, weight_decay=0.0, fused=True)
        order, size = np.random.default_rng(0).permutation(len(self.labels)), self.setting.batch
        for start in range(0, self.setting.steps * size, size):
            images, good = self.source.batch(order[start : start + size])
            loss = self.loss(
                images.to(self.device, non_blocking=True), self.labels[good].to(self.device, non_blocking=True)
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def against_timm(setting: Setting) -> None:
    """Online logit distillation of the whole student, labels + KD."""
    engine, task = Engine(setting, "full", "ce,kd"), TimmTask(setting)
    alone = Alone(engine)
    ours = alone.step(alone.images, alone.targets, alone.labels)[0]
    task.task.train()
    theirs = task.loss(alone.images, alone.labels.classes_B)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2 if engine.parts.bf16 else 1e-4, atol=0.0)
    alone.close()
    del ours, theirs
    times = in_turns({"remap": lambda: engine.run("online"), "timm": task.run}, setting.repeats)
    table("what", "remap", "timm", "ratio (range, pairs)")
    shown = [milliseconds(seconds, setting.steps) for seconds in times.values()]
    row(f"step, batch {setting.batch}", *shown, ratio(*times.values())[1])
    found: dict[str, list[dict]] = {"remap": [], "timm": []}
    for _ in range(max(1, setting.repeats // 2)):
        for side, peaks in found.items():
            peaks.append(in_a_process(f"peak:{side}", setting))
    for key, what in (("peak", "peak memory"), ("growth", "of it, since training began")):
        sides = {side: [one[key] for one in peaks] for side, peaks in found.items()}
        row(what, *(_size(statistics.median(sides[side])) for side in found), ratio(*sides.values())[1])


def peak_of(side: str, setting: Setting) -> dict[str, int]:
    """Bytes at the peak of two epochs, in a process of its own."""
    if side == "timm":
        run = TimmTask(setting).run
    else:
        engine = Engine(setting, "full", "ce,kd")
        run = partial(engine.run, "online")
    with peak_memory() as found:
        run()
        run()
    return found


# --- attention terms


def attention(setting: Setting) -> None:
    """A step with one term on the last block's attention over a step without it."""
    without = "ce,kd"
    table("method", "precision", "teacher", "loss", "step without", "step with", "ratio (range, pairs)")
    for method in setting.methods:
        for precision in ("fp32", "bf16") if setting.precision == "auto" else (setting.precision,):
            exact = replace(setting, precision=precision)
            engines = {"": Engine(exact, method, without)}
            engines |= {name: Engine(exact, method, f"{without},{name}") for name in ATTENTION}
            for where in ("memory", "online"):
                if where == "memory":
                    for engine in engines.values():
                        engine.cache_in_memory()
                sides = {name: partial(engine.run, where) for name, engine in engines.items()}
                times = in_turns(sides, setting.repeats)
                for name in ATTENTION:
                    row(
                        *(f"`{method}`", precision, "kept" if where == "memory" else where, f"`{name}`"),
                        *(milliseconds(times[side], setting.steps) for side in ("", name)),
                        ratio(times[name], times[""])[1],
                    )
            for engine in engines.values():
                engine.teacher.close()


# --- estimates

# Words of recipes on the embedded pair and the digits; the default losses are ce, kd and attention.
RUNS = {
    "vpt_deep": ({"method": "vpt_deep"}, []),
    "full": ({"method": "full", "losses": "ce,kd"}, []),
    "linear": ({"method": "linear"}, []),
    "lora, online": ({"method": "lora", "losses": "ce,kd"}, ["teacher.cache=off"]),
    "vpt_deep, disk": ({"method": "vpt_deep", "losses": "ce,kd,attention,tokens"}, ["teacher.cache=disk"]),
}


def estimates(setting: Setting) -> None:
    """What the dry run says over what the run then takes, both in one process. Memory is measured in another one,
    where the allocator gives freed memory back at once, which takes time."""
    table("run", *(f"{what}, estimate / run" for what in ("step", "whole run", "memory", "kept outputs", "task")))
    for name in setting.runs:
        pairs: dict[str, list[tuple[float, float]]] = {}
        for _ in range(setting.repeats):
            of_time = in_a_process(f"estimate:{name}", setting, tight=False)
            of_memory = in_a_process(f"estimate:{name}", setting)
            for key, found in (*((key, of_time) for key in ("step", "whole", "kept", "task")), ("memory", of_memory)):
                pairs.setdefault(key, []).append(found[key])
        row(
            f"`{name}`",
            *(_said_and_true(pairs[key], _seconds) for key in ("step", "whole")),
            *(_said_and_true(pairs[key], _size) for key in ("memory", "kept", "task")),
        )


def _said_and_true(pairs: list[tuple[float, float]], shown: Callable[[float], str]) -> str:
    said, true = (statistics.median(side) for side in zip(*pairs, strict=True))
    return f"{said / true:.2f} ({shown(said)} / {shown(true)})" if true else "-"


def estimate_and_run(name: str, setting: Setting) -> dict[str, tuple[float, float]]:
    """The dry run's words about a run and the run's own: times, what memory grew by, bytes kept.

    The dry run has loaded what a process loads once, so that does not count as memory of the run.
    """
    if accelerator().device.type == "cpu" and torch.get_num_threads() == 1:
        time.perf_counter = time.process_time  # both sides by the processor's clock, whatever else is running
    from remap.pipeline.dry_run import estimate
    from remap.pipeline.run import start

    words, settings = RUNS[name]
    models = {"teacher": "mini_teacher", "student": "mini_student"}
    recipe = resolve(words={**models, **words, "batch_size": setting.batch, "epochs": 2}, settings=settings)
    bench = SharedResources()
    with TemporaryDirectory() as folder:
        os.environ["REMAP_CACHE"] = str(Path(folder, "cache"))
        said = estimate(recipe, Silent())["estimate"]
        with peak_memory() as memory:
            summary = start(recipe, Path(folder, "run"), shared=bench).summary
        views = [view for kept in bench.targets.values() for view in kept._views.values()]
        files = [path for path in Path(folder, "cache").rglob("*") if path.name in (DATA_FILE, ROWS_FILE)]
        kept = sum(t.nbytes for view in views for t in view.values()) + sum(path.stat().st_size for path in files)
    return {
        "step": (said["step_seconds"], summary["train_seconds"] / said["steps"]),
        "whole": (said["seconds"], summary["seconds"]),
        "memory": (said["memory_bytes"], memory["growth"]),
        "kept": (said["cache_bytes"] + said["disk_cache_bytes"], kept),
        "task": (said["task_bytes"], summary["student"]["task_bytes"]),
    }


# --- memory, in processes of their own


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Peak bytes within, in all and beyond what was there before: of tensors on a GPU, else the resident size."""
    found: dict[str, int] = {}
    device = accelerator().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        peak = torch.cuda.max_memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
        before = _status("VmRSS")
        yield found
        peak = _status("VmHWM")
    found |= {"peak": peak, "growth": peak - before}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def in_a_process(task: str, setting: Setting, *, tight: bool = True) -> dict[str, Any]:
    """What ``--only`` prints, in a fresh process.

    Args:
        tight: Every tensor in pages of its own (glibc), which go back when it is freed: the peak is what was alive.
    """
    words = json.dumps({**asdict(setting), "folder": str(setting.folder)})
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if tight else {})}
    command = [sys.executable, __file__, "--only", task, "--setting", words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _size(size: float) -> str:
    return f"{size / 2**20:,.2f} MiB" if size < 2**24 else f"{size / 2**20:,.0f} MiB"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


ONLY = {"peak": peak_of, "estimate": estimate_and_run}
WHAT = {"cached": cached, "timm": against_timm, "attention": attention, "estimate": estimates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", default=",".join(WHAT), help="sections, with commas between")
    parser.add_argument("--pair", choices=PAIRS, default="mini")
    parser.add_argument("--methods", default="full,vpt_deep")
    parser.add_argument("--runs", help=f"of the section estimate, with ; between: {'; '.join(RUNS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="by default the pair's own")
    parser.add_argument("--steps", type=int, help="of one repeat; by default the pair's own")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        name, _, rest = arguments.only.partition(":")
        values = {**arguments.setting, "folder": Path(arguments.setting["folder"])}
        print(json.dumps(ONLY[name](rest, Setting(**values))))
        return
    pair, device = PAIRS[arguments.pair], accelerator().device
    batch, steps = arguments.batch_size or pair.batch, arguments.steps or pair.steps
    with TemporaryDirectory() as folder:
        methods, runs = tuple(arguments.methods.split(",")), tuple((arguments.runs or ";".join(RUNS)).split(";"))
        setting = Setting(
            arguments.pair, batch, steps, arguments.repeats, arguments.precision, methods, runs, Path(folder)
        )
        setting.draw()
        print(f"{pair.teacher} -> {pair.student}, batch {batch}, device {device}, {torch.get_num_threads()} thread(s)")
        for name in arguments.what.split(","):
            WHAT[name](setting)


if __name__ == "__main__":
    main()
