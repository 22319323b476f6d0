"""What a teacher costs in training, and what the engine adds: a step of remap against the same step by hand, as timm's
own task and as torchdistill's box; cached outputs against running the teacher in every step; what one attention term
adds; and how near the dry run's estimates come.

Run: python benchmarks/distillation.py [--what bare,timm,torchdistill,cached,views,attention,estimate]
    [--precision fp32,bf16] [--pair mini|base|large] [--repeats 5]
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
from torch.nn import functional as F
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
from remap.network import Network, Runner
from remap.pipeline.components import build_components
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import make_teacher
from remap.pipeline.teacher_shares import finite_views
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
CLASSES, PEAK, CLIP, TEMPERATURE, FLOOR = 10, 1e-4, 1.0, 4.0, 1e-6
ATTENTION, BARE_LOSSES = ("attention", "attention_cls", "relations"), "ce,kd,attention"
WHERE = {"memory": "cached", "online": "online"}


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
    losses: tuple[str, ...] = ("ce,kd", "ce,kd,feature")
    views: int = 0  # random crops of each image, one an epoch; 0 is the image itself, in one epoch

    @property
    def epochs(self) -> int:
        return self.views or 1

    @property
    def data(self) -> Path:
        return self.folder / "images"

    def recipe(self, method: str, losses: str) -> Recipe:
        pair = PAIRS[self.pair]
        words = {"teacher": pair.teacher, "student": pair.student, "data": str(self.data), "method": method}
        optimiser = [f"train.lr={PEAK}", "train.warmup_epochs=0", f"train.clip_norm={CLIP}", "train.weight_decay=0"]
        models = ["teacher.weights=none", "student.weights=none", "teacher.allow_weak=true"]
        crop = "data.crop={scale: [0.08, 1.0], ratio: [0.75, 1.3333333333333333]}"
        views = ["data.augment=custom", crop, f"data.views={self.views}"] if self.views else []
        run = [f"train.precision={self.precision}", "train.checkpoint_seconds=1000000"]
        return resolve(
            words={**words, "losses": losses, "batch_size": self.batch, "epochs": self.epochs},
            settings=[*optimiser, *models, *views, *run],
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
        self.kept["memory"] = cache_in_memory(
            self.teacher, finite_views(self.parts), size, size, accelerator(), Silent()
        )

    def cache_on_disk(self) -> None:
        items = {name: OutputFormat(shape) for name, shape in self.teacher.shapes(self.parts.views.view.shape).items()}
        key = {"benchmark": [self.recipe.digest(), self.setting.pair]}
        store = OutputStore.open(self.setting.folder / "cache", key, items)
        views = finite_views(self.parts)
        size = self.setting.batch
        self.kept["disk"] = cache_on_disk(self.teacher, store, views, size, size, accelerator(), Silent())

    def run(self, where: str) -> None:
        """Train for the recipe's epochs."""
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
        for _ in range(self.engine.setting.steps * self.engine.setting.epochs):
            self.engine.teacher.items(self.images)

    def train_student(self) -> None:
        self.engine.parts.student.attached.train()
        for _ in range(self.engine.setting.steps * self.engine.setting.epochs):
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


def compared(what: str, against: str, setting: Setting, times: dict[str, list[float]]) -> None:
    """Print a row of ``COMPARED``; remap's times come first."""
    shown = [milliseconds(seconds, setting.steps) for seconds in times.values()]
    row(f"{what}, batch {setting.batch}", against, setting.precision, *shown, ratio(*times.values())[1])


def table(*columns: str) -> None:
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


# --- cached outputs against online


def cached(setting: Setting) -> None:
    """Online over cached, beside the bound: (teacher's forward + student's step) / student's step.

    The bound by FLOPs takes each operation of both networks for equally fast. Where the step runs at a lower rate than
    the teacher's forward pass (operations on elements, the optimiser, small matrices), no code can reach it.
    """
    steps = setting.steps * setting.epochs
    for method in setting.methods:
        for losses in setting.losses:
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
            rates = [
                f"{flops * steps / statistics.median(times[side]) / 1e9:.0f}"
                for side, flops in (("teacher", teacher), ("student", step))
            ]
            row(
                *(f"`{method}`", losses, setting.precision, *(milliseconds(times[where], steps) for where in sides)),
                *(shown_memory, shown_disk, shown_bound, f"{by_flops:.2f} ({step / forward:.2f})"),
                *(f"{in_memory / by_time:.0%}, {in_memory / by_flops:.0%}", ", ".join(rates)),
            )


def cached_views(setting: Setting) -> None:
    """The same with four random crops of each image, a quarter of the steps in each epoch."""
    setting = replace(setting, steps=max(1, setting.steps // 4), views=4, folder=setting.folder / "views")
    setting.draw()
    cached(setting)


# --- against other loops


class Bare:
    """What one would write in a script: tensors, a permutation, three losses, AdamW, clipping."""

    def __init__(self, setting: Setting, *, online: bool) -> None:
        self.setting = setting
        self.parts = build_components(setting.recipe("vpt_deep", BARE_LOSSES), None, Silent(), SharedResources())
        student, teacher = self.parts.student, self.parts.teachers[0].network
        source = self.parts.views.train
        self.device, self.bf16 = accelerator().device, self.parts.bf16
        self.pixels, _ = source.batch(range(len(source.split)))
        self.labels = torch.from_numpy(source.split.labels)
        self.student, self.teacher = Runner(student).to(self.device), Runner(teacher).to(self.device)
        self.caught: dict[str, Tensor] = {}
        for name, network in (("student", student), ("teacher", teacher)):
            network.model.blocks[-1].attn.qkv.register_forward_hook(
                lambda module, args, output, name=name: self.caught.update({name: output})
            )
        self.trained = list(student.trained.values())
        self.targets: list[Tensor] | None = None
        if not online:
            parts = [self._teacher(part.to(self.device)) for part in self.pixels.split(setting.batch)]
            self.targets = [torch.cat([one.cpu() for one in column]) for column in zip(*parts, strict=True)]

    def run(self) -> None:
        """One epoch."""
        optimizer = torch.optim.AdamW(self.trained, lr=PEAK, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.setting.steps)
        self.parts.student.attached.train()
        for rows in torch.randperm(len(self.labels)).split(self.setting.batch)[: self.setting.steps]:
            self._step(optimizer, rows)
            schedule.step()

    def _step(self, optimizer: torch.optim.Optimizer, rows: Tensor) -> float:
        images, labels = self.pixels[rows].to(self.device), self.labels[rows].to(self.device)
        if self.targets is None:
            wanted, wanted_map = self._teacher(images)
        else:
            wanted, wanted_map = (stored[rows].to(self.device) for stored in self.targets)
        with self._autocast():
            logits = self.student(images).logits_BC.float()
        found_map = self._map("student", self.parts.student, 10)
        soft = F.log_softmax(logits / TEMPERATURE, -1), F.log_softmax(wanted / TEMPERATURE, -1)
        kd = F.kl_div(*soft, reduction="batchmean", log_target=True) * TEMPERATURE**2
        attention = F.kl_div((found_map + FLOOR).log(), wanted_map, reduction="sum") / found_map.shape[:-1].numel()
        loss = F.cross_entropy(logits, labels) + kd + attention
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # a script shows its loss, too

    @torch.no_grad()
    def _teacher(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            logits = self.teacher(images).logits_BC.float()
        return logits, self._map("teacher", self.parts.teachers[0].network, 0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _map(self, name: str, network: Network, prompts: int) -> Tensor:
        """Attention of the last block over {class, patches}, mean over heads: (B, S, S)."""
        attention, qkv_BTE = network.model.blocks[-1].attn, self.caught[name]
        shape = (*qkv_BTE.shape[:2], 3, attention.num_heads, attention.head_dim)
        q, k, _ = qkv_BTE.reshape(shape).permute(2, 0, 3, 1, 4).float().unbind(0)
        if prompts:
            q, k = (torch.cat([x[:, :, :1], x[:, :, 1 + prompts :]], dim=2) for x in (q, k))
        return (q * attention.scale @ k.mT).softmax(-1).mean(1)


def against_bare(setting: Setting) -> None:
    """Deep prompts with labels, KD and attention; the teacher's outputs computed beforehand, and in every step."""
    for where in ("memory", "online"):
        engine, bare = Engine(setting, "vpt_deep", BARE_LOSSES), Bare(setting, online=where == "online")
        if where == "memory":
            engine.cache_in_memory()
        times = in_turns({"remap": partial(engine.run, where), "bare": bare.run}, setting.repeats)
        compared(f"`vpt_deep`, {BARE_LOSSES}, teacher {WHERE[where]}", "a loop by hand", setting, times)
        engine.teacher.close()


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

    def begin(self) -> None:
        self.task.train()
        self.optimizer = torch.optim.AdamW(self.trained, lr=PEAK, weight_decay=0.0, fused=True)

    def loss(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.parts.bf16):
            return self.task(self.preprocess(images_BCHW), labels_B)["loss"]

    def update(self, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self) -> None:
        """One epoch."""
        self.begin()
        order, size = np.random.default_rng(0).permutation(len(self.labels)), self.setting.batch
        for start in range(0, self.setting.steps * size, size):
            images, good = self.source.batch(order[start : start + size])
            images, labels = (one.to(self.device, non_blocking=True) for one in (images, self.labels[good]))
            self.update(self.loss(images, labels))


class TorchdistillBox(TimmTask):
    """torchdistill's ``DistillationBox`` with its ``KDLoss``, on the same networks; its losses are not read back."""

    def __init__(self, setting: Setting) -> None:
        from torchdistill.core.distillation import DistillationBox

        super().__init__(setting)
        output = {"student_module_path": ".", "student_module_io": "output"}
        output |= {"teacher_module_path": ".", "teacher_module_io": "output"}
        # Labels and KD with weight 1 each, as in remap.
        weights = {"temperature": TEMPERATURE, "alpha": 1.0, "beta": 1.0, "reduction": "batchmean"}
        term = {"criterion": {"key": "KDLoss", "kwargs": {**output, **weights}}, "weight": 1.0}
        forward = {"forward_proc": "forward_batch_only"}
        self.config = {
            "num_epochs": 1,
            "teacher": {**forward, "requires_grad": False},
            "student": {**forward, "requires_grad": True},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": term}}},
        }
        optimizer = {"key": "AdamW", "kwargs": {"lr": PEAK, "weight_decay": 0.0, "fused": True}, "max_grad_norm": CLIP}
        self.config["optimizer"] = optimizer
        models = self.parts.teachers[0].network.model, self.parts.student.model
        self.box = DistillationBox(*models, {}, self.config, self.device, [], False, 1.0)

    def begin(self) -> None:
        self.box.pre_epoch_process(epoch=0)

    def loss(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.parts.bf16):
            return self.box.forward_process(self.preprocess(images_BCHW), labels_B, None)

    def update(self, loss: Tensor) -> None:
        self.box.post_forward_process(loss)


OTHERS = {"timm": TimmTask, "torchdistill": TorchdistillBox}


def against_other(name: str, setting: Setting) -> None:
    """Online logit distillation of the whole student, labels + KD."""
    engine, other = Engine(setting, "full", "ce,kd"), OTHERS[name](setting)
    alone = Alone(engine)
    ours = alone.step(alone.images, alone.targets, alone.labels)[0]
    other.begin()
    theirs = other.loss(alone.images, alone.labels.classes_B)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2 if engine.parts.bf16 else 1e-4, atol=0.0)
    alone.close()
    del ours, theirs
    times = in_turns({"remap": lambda: engine.run("online"), name: other.run}, setting.repeats)
    compared("`full`, ce,kd, teacher online", name, setting, times)
    if name != "timm":
        return
    found: dict[str, list[dict]] = {"remap": [], "timm": []}
    for _ in range(max(1, setting.repeats // 2)):
        for side, peaks in found.items():
            peaks.append(in_a_process(f"peak:{side}", setting))
    for key, what in (("peak", "peak memory"), ("growth", "of it, since training began")):
        sides = {side: [one[key] for one in peaks] for side, peaks in found.items()}
        shown = [_size(statistics.median(sides[side])) for side in found]
        row(what, name, setting.precision, *shown, ratio(*sides.values())[1])


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
    for method in setting.methods:
        engines = {"": Engine(setting, method, without)}
        engines |= {name: Engine(setting, method, f"{without},{name}") for name in ATTENTION}
        for where in ("memory", "online"):
            if where == "memory":
                for engine in engines.values():
                    engine.cache_in_memory()
            sides = {name: partial(engine.run, where) for name, engine in engines.items()}
            times = in_turns(sides, setting.repeats)
            for name in ATTENTION:
                row(
                    *(f"`{method}`", setting.precision, WHERE[where], f"`{name}`"),
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
    for name in setting.runs:
        pairs: dict[str, list[tuple[float, float]]] = {}
        for _ in range(setting.repeats):
            of_time = in_a_process(f"estimate:{name}", setting, tight=False)
            of_memory = in_a_process(f"estimate:{name}", setting)
            for key, found in (*((key, of_time) for key in ("step", "whole", "kept", "task")), ("memory", of_memory)):
                pairs.setdefault(key, []).append(found[key])
        row(
            *(f"`{name}`", setting.precision),
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
    settings = [*settings, f"train.precision={setting.precision}"]
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
COMPARED = ("what", "against", "precision", "remap", "other side", "ratio (range, pairs)")
CACHED = (
    *("method", "losses", "precision", "online", "cached in memory", "on disk", "speed-up, memory", "speed-up, disk"),
    *("bound by time", "bound by FLOPs (student's step in forward passes)", "share of the bound by time, by FLOPs"),
    "GFLOP/s of the teacher's forward, the student's step",
)
ADDED = ("method", "precision", "teacher", "loss", "step without", "step with", "ratio (range, pairs)")
ESTIMATED = (f"{what}, estimate / run" for what in ("step", "whole run", "memory", "cached outputs", "task"))
WHAT: dict[str, tuple[Sequence[str], Callable[[Setting], None]]] = {
    "bare": (COMPARED, against_bare),
    **{name: (COMPARED, partial(against_other, name)) for name in OTHERS},
    "cached": (CACHED, cached),
    "views": (CACHED, cached_views),
    "attention": (ADDED, attention),
    "estimate": (("run", "precision", *ESTIMATED), estimates),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", default=",".join(WHAT), help="sections, with commas between")
    parser.add_argument("--pair", choices=PAIRS, default="mini")
    parser.add_argument("--methods", default="full,vpt_deep")
    parser.add_argument("--losses", default="ce,kd;ce,kd,feature", help="of the cached sections, with ; between")
    parser.add_argument("--runs", help=f"of the section estimate, with ; between: {'; '.join(RUNS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="by default the pair's own")
    parser.add_argument("--steps", type=int, help="of one repeat; by default the pair's own")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16, or both with a comma between")
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
        some = (methods, runs, Path(folder), tuple(arguments.losses.split(";")))
        settings = [
            Setting(arguments.pair, batch, steps, arguments.repeats, precision, *some)
            for precision in arguments.precision.split(",")
        ]
        settings[0].draw()
        print(f"{pair.teacher} -> {pair.student}, batch {batch}, device {device}, {torch.get_num_threads()} thread(s)")
        columns: Sequence[str] = ()
        for name in arguments.what.split(","):
            before, (columns, section) = columns, WHAT[name]
            if columns != before:  # sections of one form are one table
                table(*columns)
            for setting in settings:
                section(setting)


if __name__ == "__main__":
    main()
