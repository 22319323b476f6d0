"""ViT-L/16 to ViT-S/16 at 224 pixels in bf16: a step of remap, a bare loop, timm's task and peft, side by side.

Run: python benchmarks/gpu_step.py --json FILE [--methods full,vpt_deep,lora,linear] [--seconds 170] [--smoke]
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from distillation import CLASSES, CLIP, PAIRS, PEAK, TEMPERATURE, Alone, Engine, Setting, TimmTask, timed
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from remap.distributed.device_memory import peak_bytes, reset_peak
from remap.engine import late
from remap.network import Runner

# Dense bf16 operations a second of the tensor cores, without sparsity, as NVIDIA's data sheets have them. The first
# name that is part of the card's counts.
BF16_PEAK = {
    **{"B200": 2.25e15, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12},
    **{"L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12},
}


class Noise(Setting):
    """Noise as bitmaps: PNG of noise would take longer than what is measured."""

    def draw(self) -> None:
        draws, side = np.random.default_rng(0), PAIRS[self.pair].side
        for split, count in (("train", self.steps * self.batch), ("val", CLASSES)):
            for index in range(max(count, CLASSES)):
                path = self.data / split / str(index % CLASSES) / f"{index}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draws.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(path)


class Loop:
    """What one would write in a script, with the teacher in every step: two networks, two losses, AdamW, clipping."""

    def __init__(self, engine: Engine, student: Callable[[Tensor], Tensor], trained: list[nn.Parameter]) -> None:
        self.engine, self.student, self.trained = engine, student, trained
        self.teacher = Runner(engine.parts.teachers[0].network, bf16=engine.parts.bf16)
        self.source = engine.parts.views.train
        self.labels = torch.from_numpy(self.source.split.labels)

    def run(self, epochs: int) -> None:
        optimizer = torch.optim.AdamW(self.trained, lr=PEAK, weight_decay=0.0, fused=True)
        size, device = self.engine.setting.batch, self.engine.device
        for epoch in range(epochs):
            order = np.random.default_rng(epoch).permutation(len(self.labels))
            for start in range(0, len(order) - size + 1, size):
                images, good = self.source.batch(order[start : start + size])
                images, labels = images.to(device, non_blocking=True), self.labels[good].to(device, non_blocking=True)
                with torch.no_grad():
                    wanted = self.teacher(images).logits_BC.float()
                logits = self.student(images).float()
                soft = (F.log_softmax(one / TEMPERATURE, -1) for one in (logits, wanted))
                kd = F.kl_div(*soft, reduction="batchmean", log_target=True) * TEMPERATURE**2
                (F.cross_entropy(logits, labels) + kd).backward()
                torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)


def bare(engine: Engine) -> Loop:
    """The loop on the engine's own student."""
    student = engine.parts.student
    runner = Runner(student, bf16=engine.parts.bf16)
    student.attached.train()
    return Loop(engine, lambda images: runner(images).logits_BC, list(student.trained.values()))


def with_peft(engine: Engine) -> Loop:
    """The loop on peft's LoRA of the same rank on the fused layer of queries, keys and values."""
    import timm
    from peft import LoraConfig, get_peft_model

    pair = PAIRS[engine.setting.pair]
    name = engine.parts.student.identity.model if pair.student.startswith("mini") else pair.student
    config = LoraConfig(target_modules=["qkv"], r=8, modules_to_save=["head"])
    model = get_peft_model(timm.create_model(name, num_classes=CLASSES), config).to(engine.device).train()
    preprocess, bf16 = Runner(engine.parts.student).preprocess, engine.parts.bf16

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=bf16):
            return model(preprocess(images))

    return Loop(engine, forward, [p for p in model.parameters() if p.requires_grad])


def repeated(work: Callable[[], None], epochs: int) -> None:
    for _ in range(epochs):
        work()


@contextmanager
def read_at_once(engine: Engine) -> Iterator[None]:
    """The host waits for the numbers of each step, as on a CPU."""
    devices, late.DEVICES = late.DEVICES, ()
    yield
    late.DEVICES = devices


def at_once(engine: Engine) -> None:
    with read_at_once(engine):
        engine.run("online")


def compiled(engine: Engine) -> None:
    whole = engine.recipe
    engine.recipe = whole.model_copy(update={"train": whole.train.model_copy(update={"compile": True})})
    engine.run("online")
    engine.recipe = whole


def measure(setting: Setting, method: str, epochs: int, until: float) -> list[dict[str, Any]]:
    """Rows of one method, each side in turns; a side that fails is a row with its reason."""
    engine = Engine(setting, method, "ce,kd")
    engine.cache_in_memory()
    train = engine.recipe.train.model_copy(update={"epochs": epochs})
    engine.recipe = engine.recipe.model_copy(update={"train": train})
    alone = Alone(engine)
    teacher_flops, _, student_flops = alone.flops()
    online, device = teacher_flops + student_flops, engine.device
    sides: dict[str, tuple[Callable[[], Callable[[], None]], int]] = {
        "remap, online": (lambda: partial(engine.run, "online"), online),
        "remap, cached": (lambda: partial(engine.run, "memory"), student_flops),
        "bare loop, online": (lambda: partial(bare(engine).run, epochs), online),
        "teacher's forward alone": (lambda: partial(repeated, alone.ask_teacher, epochs), teacher_flops),
        "student's step alone": (lambda: partial(repeated, alone.train_student, epochs), student_flops),
    }
    if method == "full" or setting.pair == "mini":
        sides["timm's task, online"] = (lambda: partial(repeated, TimmTask(setting).run, epochs), online)
        sides["remap, online, each step waited for"] = (lambda: partial(at_once, engine), online)
    if method == "lora":
        sides["peft, online"] = (lambda: partial(with_peft(engine).run, epochs), online)
    if device.type == "cuda":  # last: blocks stay compiled
        sides["remap, online, compiled"] = (lambda: partial(compiled, engine), online)
    rows: list[dict[str, Any]] = []
    for name, (make, flops) in sides.items():
        if time.monotonic() > until:
            rows.append({"method": method, "side": name, "skipped": "no time was left"})
            continue
        try:
            work = make()
            first = timed(work)
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            reset_peak(device)
            times = [timed(work) for _ in range(setting.repeats)]
        except Exception as error:  # one side must not cost the others
            rows.append({"method": method, "side": name, "skipped": f"{type(error).__name__}: {str(error)[:300]}"})
            print(rows[-1], flush=True)
            continue
        steps = epochs * setting.steps
        seconds = [one / steps for one in times]
        step, peak = statistics.median(seconds), peak_of_card()
        rows.append(
            {
                **{"method": method, "side": name, "seconds": step, "range": [min(seconds), max(seconds)]},
                **{"images_per_second": setting.batch / step, "flops": flops, "first_run_seconds": first},
                "mfu": flops / step / peak if peak else None,
                "peak_bytes": peak_bytes(device),
                "peak_bytes_above_weights": peak_bytes(device) - before,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    alone.close()
    engine.teacher.close()
    return rows


def peak_of_card() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for card, flops in BF16_PEAK.items() if card in name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--methods", default="full,vpt_deep,lora,linear")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--smoke", action="store_true", help="the mini pair, a few steps: only that all of it runs")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    small = {"pair": "mini", "batch": 2, "steps": 2, "repeats": 1, "precision": "fp32"}
    large = {"pair": "large", "batch": options.batch, "steps": 6, "repeats": 2, "precision": "bf16"}
    found: dict[str, Any] = {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    with TemporaryDirectory() as folder:
        setting = Noise(**(small if options.smoke else large), methods=(), runs=(), folder=Path(folder))
        setting.draw()
        found["setting"] = {k: v for k, v in dataclasses.asdict(setting).items() if k not in ("folder", "runs")}
        found["peak_bf16"], found["rows"] = peak_of_card(), []
        for method in options.methods.split(","):
            if time.monotonic() < until:
                found["rows"] += measure(setting, method, 1 if options.smoke else 3, until)
            else:
                found["rows"].append({"method": method, "side": "all", "skipped": "no time was left"})
            options.json.write_text(json.dumps(found, indent=1))  # after each method: a killed script has the others
    if options.smoke and (skipped := [row for row in found["rows"] if "skipped" in row]):
        raise SystemExit(f"not all sides ran: {skipped}")


if __name__ == "__main__":
    main()
