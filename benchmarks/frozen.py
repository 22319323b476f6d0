"""Images a second of training what stands behind a frozen part: kept frozen features against running the whole network.

Run: python benchmarks/frozen.py [--methods linear,mlp,partial] [--images 128] [--batch-size 32] [--repeats 3]
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from remap.cache.frozen_features import FrozenFeatures
from remap.distributed.launch import accelerator
from remap.engine.job import Job, StudentStep
from remap.engine.loop import train as train_job
from remap.pipeline.components import RunComponents, build_components
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import Recipe, resolve

MODEL, SIDE, CLASSES = "vit_small_patch16_224", 224, 10


def draw(folder: Path, images: int) -> None:
    """Noise in ten classes; remap reads the files once and keeps their views in memory as uint8."""
    draws = np.random.default_rng(0)
    for split, count in (("train", images), ("val", CLASSES)):
        for index in range(count):
            path = folder / split / str(index % CLASSES) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)).save(path, compress_level=1)


def recipe_of(method: str, data: Path, batch_size: int) -> Recipe:
    words = {"student": MODEL, "weights": "none", "data": str(data), "method": method, "losses": "ce"}
    settings = ["train.lr=0.001", "train.warmup_epochs=0", "train.checkpoint_seconds=1000000"]
    return resolve(words={**words, "batch_size": batch_size, "epochs": 1}, settings=settings)


def kept(parts: RunComponents, features: FrozenFeatures, epochs: int) -> None:
    """``remap.engine.loop``, without evaluation, which the other loop has not."""
    train = parts.recipe.train.model_copy(update={"epochs": epochs})
    job = Job(
        recipe=parts.recipe.model_copy(update={"train": train}),
        student=parts.student,
        objective=parts.objective,
        teachers=[],
        source=parts.views.train,
        accelerator=accelerator(),
        bf16=parts.bf16,
        progress=Silent(),
        evaluate=lambda: {},
        on_epoch=lambda step, history: None,
        features=features,
    )
    train_job(job)


def naive(parts: RunComponents, steps: int) -> None:
    """A script: pixels, the whole network under autograd, cross-entropy, clipping, AdamW over what trains."""
    student, source, size = parts.student, parts.views.train, parts.recipe.train.batch_size
    device, trained = accelerator().device, list(parts.student.trained.values())
    pixels, _ = source.batch(range(len(source.split)))
    labels = torch.from_numpy(source.split.labels)
    spec = student.preprocess
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (spec.mean, spec.std))
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    student.attached.train()
    order = torch.randperm(len(source.split))
    for step in range(steps):
        rows = order.roll(-step * size)[:size]
        images = (pixels[rows].to(device).float() / 255 - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=parts.bf16):
            logits = student.model(images)
        loss = F.cross_entropy(logits.float(), labels[rows].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def _same_loss(parts: RunComponents, features: FrozenFeatures) -> None:
    """Kept features give the logits of the whole network."""
    source, count = parts.views.train, 4
    pixels, indices = source.batch(range(count))
    runner = StudentStep(parts.student, parts.objective, bf16=parts.bf16).runner
    parts.student.model.eval()
    with torch.no_grad():
        whole = runner(pixels.to(accelerator().device)).logits_BC
        images, _ = features.batch(indices)
        rest = runner(images.to(accelerator().device), features.rows(indices)).logits_BC
    runner.tap.close()
    torch.testing.assert_close(rest, whole, rtol=0.0, atol=1e-2 if parts.bf16 else 1e-5)


def _timed(work) -> float:
    cuda = accelerator().device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(method: str, data: Path, arguments: argparse.Namespace) -> None:
    recipe = recipe_of(method, data, arguments.batch_size)
    parts = build_components(recipe, None, Silent(), SharedResources())
    source, size = parts.views.train, arguments.batch_size
    features = FrozenFeatures(parts.student, source, accelerator(), bf16=parts.bf16)
    each = features.bytes_per_image()
    fill = _timed(lambda: features.compute(max(64, size), size, Silent(), "training images"))
    _same_loss(parts, features)
    steps = len(source.split) // size
    ours, theirs = [], []
    kept(parts, features, 1)
    for repeat in range(arguments.repeats):
        for first in (True, False) if repeat % 2 == 0 else (False, True):
            if first:
                seconds = _timed(lambda: kept(parts, features, arguments.epochs))
                ours.append(arguments.epochs * steps * size / seconds)
            else:
                theirs.append(arguments.steps * size / _timed(lambda: naive(parts, arguments.steps)))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    per_epoch = [len(source.split) / statistics.median(rates) for rates in (ours, theirs)]
    pays = fill / (per_epoch[1] - per_epoch[0])
    print(
        f"| `{method}` | {statistics.median(ours):,.0f} | {statistics.median(theirs):,.1f} | "
        f"{statistics.median(ratios):,.0f} ({min(ratios):,.0f} to {max(ratios):,.0f}, {len(ratios)}) | "
        f"{each / 1024:,.1f} KiB ({features.nbytes / 2**20:,.1f} MiB) | {fill:.1f} s | {pays:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="linear,mlp,partial")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="epochs with kept features in one repeat")
    parser.add_argument("--steps", type=int, default=1, help="steps of the whole network in one repeat")
    arguments = parser.parse_args()
    print(
        f"{MODEL}, {arguments.images} images, batch {arguments.batch_size}, device {accelerator().device}, "
        f"{torch.get_num_threads()} thread(s)\n\n"
        "| method | images/s, kept | images/s, whole network | ratio (range, pairs) | kept an image (in all) | filling "
        "| paid after epochs |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    with TemporaryDirectory() as folder:
        draw(Path(folder), arguments.images)
        for method in arguments.methods.split(","):
            measure(method, Path(folder), arguments)


if __name__ == "__main__":
    main()
