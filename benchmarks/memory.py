"""Peak memory of training prompts on ViT-S/16: the engine against a loop written by hand, each in its own process.

Run: python benchmarks/memory.py [--repeats 3] [--batch-size 16]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

MODEL, STEPS = "vit_small_patch16_224", 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", choices=("engine", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.data, arguments.batch_size)))
        return
    with TemporaryDirectory() as folder:
        draw(Path(folder), arguments.batch_size)
        results = {"engine": [], "bare": []}
        for _ in range(arguments.repeats):
            for side, found in results.items():
                found.append(_in_a_process(side, folder, arguments.batch_size))
    for key, what in (("peak", "peak resident size"), ("saved", "kept for backward")):
        engine, bare = ([one[key] / 2**20 for one in results[side]] for side in ("engine", "bare"))
        ratios = [ours / theirs for ours, theirs in zip(engine, bare, strict=True)]
        print(
            f"{what}: engine {statistics.median(engine):.0f} MiB, bare {statistics.median(bare):.0f} MiB, "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs)"
        )


def _in_a_process(side: str, folder: str, batch_size: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--only", side, "--data", folder, "--batch-size", str(batch_size)]
    # Every tensor in pages of its own (glibc), which go back when it is freed: the peak is then what was alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def draw(folder: Path, batch_size: int) -> None:
    """Noise in two classes: one batch to train on, two images to evaluate."""
    from PIL import Image

    draws = np.random.default_rng(0)
    for split, count in (("train", batch_size), ("val", 2)):
        for index in range(count):
            path = folder / split / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (224, 224, 3)).astype(np.uint8)).save(path)


def measure(side: str, data: Path, batch_size: int) -> dict[str, int]:
    """Bytes: the peak over ``STEPS`` steps, and what one forward pass keeps for its backward pass."""
    from remap.pipeline.components import build_components
    from remap.pipeline.shared import SharedResources
    from remap.progress import Silent
    from remap.recipe import resolve

    words = {"student": MODEL, "weights": "none", "data": str(data), "batch_size": batch_size, "epochs": STEPS}
    recipe = resolve(words={**words, "method": "vpt_deep", "losses": "ce"}, settings=["train.warmup_epochs=0"])
    parts = build_components(recipe, None, Silent(), SharedResources())
    run, forward = (engine if side == "engine" else bare)(recipe, parts)
    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak": peak, "saved": saved_bytes(forward, parts.student.model)}


def engine(recipe, parts):
    """``remap.engine.loop`` and its step module."""
    from remap.data.batches import batches
    from remap.distributed.launch import accelerator
    from remap.engine.job import Job
    from remap.engine.loop import train
    from remap.engine.micro_batch import inputs_of
    from remap.engine.training import Training
    from remap.progress import Silent

    job = Job(
        recipe=recipe,
        student=parts.student,
        objective=parts.objective,
        teachers=[],
        source=parts.views.train,
        accelerator=accelerator(),
        bf16=False,
        progress=Silent(),
        evaluate=lambda: {},
        on_epoch=lambda step, history: None,
    )

    def forward():
        training = Training(job)
        parts.student.attached.train()
        inputs = inputs_of(training, next(batches(job.source, training.plan, 0)), [])
        parts.student.attached.set_sample_keys(inputs.keys_B)
        return training.module(inputs.images_BCHW, inputs.targets, inputs.labels, inputs.features)

    return lambda: train(job), forward


def bare(recipe, parts):
    """A script: one batch of pixels, cross-entropy, AdamW, clipping."""
    import torch

    student, source = parts.student, parts.views.train
    pixels, _ = source.batch(range(len(source.split)))
    labels = torch.from_numpy(source.split.labels)

    def forward():
        student.attached.train()
        return torch.nn.functional.cross_entropy(student.model(pixels.float() / 127.5 - 1.0), labels)

    def run():
        trained = list(student.trained.values())
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        for _ in range(STEPS):
            loss = forward()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    return run, forward


def saved_bytes(forward, model) -> int:
    """Bytes of all storages that autograd holds on to, the model's own parameters not counted."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


if __name__ == "__main__":
    main()
