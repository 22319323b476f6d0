"""Time of a training step: the engine against a loop written by hand, in turns, on the same model and losses.

Run: python benchmarks/step_time.py [--repeats 7] [--epochs 1] [--batch-size 64]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional as F

from remap.cache.teacher_cache import cache_in_memory
from remap.distributed.launch import accelerator
from remap.engine import loop
from remap.engine.job import Job
from remap.network import Runner
from remap.pipeline.components import RunComponents, build_components
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import finite_views, make_teacher
from remap.progress import Silent
from remap.recipe import Recipe, resolve
from remap.recipe.schema import TrainSpec
from remap.runs.run_dir import RunDir

TEMPERATURE, FLOOR, PEAK, CLIP = 4.0, 1e-6, 1e-3, 1.0


def recipe_of(batch_size: int, epochs: int) -> Recipe:
    """The embedded pair on the digits with random weights: the numbers in the weights cost no time."""
    settings = [f"train.lr={PEAK}", "train.warmup_epochs=0", f"train.clip_norm={CLIP}", "train.weight_decay=0"]
    models = ["teacher.weights=none", "student.weights=none", "teacher.allow_weak=true"]
    words = {"teacher": "mini_teacher", "method": "vpt_deep", "losses": "ce,kd,attention"}
    return resolve(
        words={**words, "batch_size": batch_size, "epochs": epochs},
        settings=[*settings, *models, "train.checkpoint_seconds=1000000"],
    )


class Side:
    """One of the two loops with its own copy of everything, ready to train any number of steps."""

    def __init__(self, recipe: Recipe, folder: Path, *, online: bool) -> None:
        self.recipe, self.online = recipe, online
        self.parts: RunComponents = build_components(recipe, RunDir.create(folder, recipe), Silent(), SharedResources())
        self.parts.objective.to(accelerator().device)
        self.images = len(self.parts.views.train.split)

    def steps_per_epoch(self) -> int:
        return self.images // self.recipe.train.batch_size


class Engine(Side):
    """``remap.engine.loop`` itself; evaluation is switched off, since the bare loop has none."""

    def __init__(self, recipe: Recipe, folder: Path, *, online: bool) -> None:
        super().__init__(recipe, folder, online=online)
        self.teacher = make_teacher(self.parts, 0)
        if not online:
            size = recipe.train.batch_size
            cache_in_memory(self.teacher, finite_views(self.parts), size, size, accelerator(), Silent())

    def run(self, epochs: int) -> None:
        train: TrainSpec = self.recipe.train.model_copy(update={"epochs": epochs})
        job = Job(
            recipe=self.recipe.model_copy(update={"train": train}),
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
        loop.train(job)


class Bare(Side):
    """What one would write in a script: tensors, a permutation, three losses, AdamW, clipping."""

    def __init__(self, recipe: Recipe, folder: Path, *, online: bool) -> None:
        super().__init__(recipe, folder, online=online)
        self.device, self.bf16 = accelerator().device, self.parts.bf16
        student, teacher = self.parts.student, self.parts.teachers[0].network
        source = self.parts.views.train
        self.pixels, _ = source.batch(range(self.images))
        self.labels = torch.from_numpy(source.split.labels)
        self.student, self.teacher = Runner(student).to(self.device), Runner(teacher).to(self.device)
        self.caught: dict[str, Tensor] = {}
        _catch(student.model.blocks[-1].attn.qkv, self.caught, "student")
        _catch(teacher.model.blocks[-1].attn.qkv, self.caught, "teacher")
        self.trained = list(student.trained.values())
        self.targets = None if online else self._precompute()

    def run(self, epochs: int) -> None:
        optimizer = torch.optim.AdamW(self.trained, lr=PEAK, weight_decay=0.0, fused=True)
        steps, size = self.steps_per_epoch(), self.recipe.train.batch_size
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        self.parts.student.attached.train()
        for _ in range(epochs):
            order = torch.randperm(self.images)
            for step in range(steps):
                self._step(optimizer, order[step * size : (step + 1) * size])
                schedule.step()

    def _step(self, optimizer: torch.optim.Optimizer, rows: Tensor) -> float:
        images, labels = self.pixels[rows].to(self.device), self.labels[rows].to(self.device)
        if self.targets is None:
            wanted, wanted_map = self._teacher(images)
        else:
            wanted, wanted_map = (kept[rows].to(self.device) for kept in self.targets)
        with self._autocast():
            logits = self.student(images).logits_BC.float()
        found_map = _map(self.caught["student"], self.parts.student, 10)
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
        return logits, _map(self.caught["teacher"], self.parts.teachers[0].network, 0)

    def _precompute(self) -> tuple[Tensor, Tensor]:
        parts = [self._teacher(part.to(self.device)) for part in self.pixels.split(64)]
        return torch.cat([one.cpu() for one, _ in parts]), torch.cat([one.cpu() for _, one in parts])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def _catch(module: torch.nn.Module, caught: dict[str, Tensor], name: str) -> None:
    module.register_forward_hook(lambda module, args, output: caught.update({name: output}))


def _map(qkv_BTE: Tensor, network: object, prompts: int) -> Tensor:
    """Attention of the last block over {class, patches}, mean over heads: (B, S, S)."""
    attention = network.model.blocks[-1].attn
    shape = (*qkv_BTE.shape[:2], 3, attention.num_heads, attention.head_dim)
    q, k, _ = qkv_BTE.reshape(shape).permute(2, 0, 3, 1, 4).float().unbind(0)
    if prompts:
        q, k = (torch.cat([x[:, :, :1], x[:, :, 1 + prompts :]], dim=2) for x in (q, k))
    return (q * attention.scale @ k.mT).softmax(-1).mean(1)


@contextmanager
def _clock(times: list[float], device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - started)


def compare(make: Callable[[type[Side], str], Side], repeats: int, epochs: int) -> tuple[list[float], list[float]]:
    """Milliseconds a step of (engine, bare), in turns; which goes first alternates."""
    sides = make(Engine, "engine"), make(Bare, "bare")
    times: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        side.run(1)
    for repeat in range(repeats):
        for index in (0, 1) if repeat % 2 == 0 else (1, 0):
            with _clock(times[index], accelerator().device):
                sides[index].run(epochs)
    steps = epochs * sides[0].steps_per_epoch()
    return tuple([1000 * one / steps for one in side] for side in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=1, help="epochs of 1,000 digits in one repeat")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    recipe = recipe_of(arguments.batch_size, arguments.epochs)
    print(f"device {accelerator().device}, {torch.get_num_threads()} thread(s), batch {arguments.batch_size}")
    for online in (False, True):
        with TemporaryDirectory() as folder:

            def make(kind: type[Side], name: str, folder: str = folder, online: bool = online) -> Side:
                return kind(recipe, Path(folder, name), online=online)

            engine, bare = compare(make, arguments.repeats, arguments.epochs)
        ratios = [ours / theirs for ours, theirs in zip(engine, bare, strict=True)]
        print(
            f"{'teacher online' if online else 'teacher cached'}: engine {statistics.median(engine):.1f} ms, "
            f"bare {statistics.median(bare):.1f} ms, ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs)"
        )


if __name__ == "__main__":
    main()
