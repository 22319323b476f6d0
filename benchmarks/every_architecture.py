"""What each module family of timm can teach and learn: one small instance of each, with random weights.

Run: python benchmarks/every_architecture.py [--models regnetx_002,hiera_tiny_224] [--methods linear,full,norm,lora]
[--output docs/models.jsonl]
"""

import argparse
import contextlib
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import timm
import torch
from torch import nn

from remap.backbones.build import Backbone, build
from remap.backbones.kernels import channels_last, with_channels_last
from remap.errors import RemapError
from remap.network import tuned
from remap.remapping.signals import Needs

T = TypeVar("T")
CLASSES, IMAGES = 3, 2
SIZES = (64, 128, None)  # the first that a network takes; None is its own
# Of modules whose smallest model is large: arguments of timm that make it smaller.
SMALLER = {"deepseek_vit_412m": {"depth": 2}, "gemma4_vit_167m": {"depth": 2}}


def instances() -> Iterator[str]:
    """Yield the model with the fewest parameters of each module of timm."""
    for module in timm.list_modules():
        yield min(timm.list_models(module=module), key=_parameters)


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def opened(name: str) -> Backbone:
    """Build a network of random weights for the smallest images that it takes."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        word = name
        if name in SMALLER:
            config = {"architecture": name, "pretrained_cfg": {}, "model_args": SMALLER[name]}
            (Path(folder) / "config.json").write_text(json.dumps(config))
            word = f"local-dir:{folder}"
        for size in SIZES[:-1]:
            with contextlib.suppress(RemapError):
                return build(word, "none", CLASSES, image_size=size)
        return build(word, "none", CLASSES)


def images_for(backbone: Backbone) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, *backbone.anatomy.image_size, generator=generator)
    # In the layout that runs in bfloat16 give them, which not every network's code takes.
    last = channels_last(backbone.model, "cpu", bf16=True)
    return with_channels_last(images) if last else images


@torch.no_grad()
def teaches(backbone: Backbone) -> str:
    """Return what is wrong with the signals, "" if nothing: logits against timm's own forward, shapes of the rest."""
    model, anatomy = backbone.model.eval(), backbone.anatomy
    network, images = tuned(backbone, "linear", {}), images_for(backbone)
    wanted = model(images)
    with network.tap(Needs(pooled=True, tokens=frozenset(range(anatomy.depth + 1)))) as tap:
        signals = tap(images)
        if (seam := tap.seam) is not None:
            from_seam = seam.rest(seam.stem(images), images, whole_blocks=False)
            if not torch.allclose(from_seam, wanted, atol=1e-5):
                return "the classifiers' mean differs from the logits"
    if not torch.allclose(signals.logits_BC, wanted, atol=1e-5):
        return "logits differ from timm's"
    if signals.pooled_BD is None or signals.pooled_BD.shape != (IMAGES, anatomy.width):
        return f"pooled features are {signals.pooled_BD and tuple(signals.pooled_BD.shape)}, wanted {anatomy.width}"
    for index, tokens in signals.tokens.items():
        block = anatomy.blocks[min(index, anatomy.depth - 1)]
        if tokens.grid != block.grid or tokens.patches_BND.shape != (
            IMAGES,
            block.grid[0] * block.grid[1],
            block.width,
        ):
            return f"stage {index} gives {tuple(tokens.patches_BND.shape)}, wanted {block.grid} x {block.width}"
    return ""


def learns(backbone: Backbone, method: str) -> str:
    """Return what is wrong with a step of training and a reload, "" if nothing."""
    network, again = (tuned(copy.deepcopy(backbone), method, {}) for _ in range(2))
    images, labels = images_for(backbone), torch.arange(IMAGES) % CLASSES
    before = {key: tensor.clone() for key, tensor in network.tensors.items()}
    optimizer = torch.optim.AdamW(network.trained.values(), lr=1e-3)
    network.attached.train()
    nn.functional.cross_entropy(network.model(images), labels).backward()
    optimizer.step()
    kept = {key: tensor.detach().clone() for key, tensor in network.tensors.items()}
    still = all(torch.equal(before[key], kept[key]) for key in kept if not network.anatomy.is_head(key))
    if still and method != "linear":
        return "nothing moved"
    with torch.no_grad():
        for key, tensor in again.tensors.items():
            tensor.copy_(kept[key])
        ours, theirs = (one.model.eval()(images) for one in (network, again))
    if not ours.isfinite().all():
        return "logits are not finite"
    return "" if torch.equal(ours, theirs) else "reloaded logits differ"


def attempt(function: Callable[..., T], *args: object) -> tuple[str, T | None]:
    """Return an error in a line, "" if there was none, and what the function returned."""
    try:
        return "", function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", None


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", default="", help="names of timm; the smallest of each module if there are none")
    options.add_argument("--methods", default="linear,full,norm,lora")
    options.add_argument("--output", help="a file to add records to, such as docs/models.jsonl")
    chosen = options.parse_args()
    methods = chosen.methods.split(",")
    taught = learnt = count = 0
    for name in chosen.models.split(",") if chosen.models else instances():
        count, start = count + 1, time.perf_counter()
        failed, backbone = attempt(opened, name)
        if backbone is not None:
            failed = "".join(filter(None, attempt(teaches, copy.deepcopy(backbone))))
        problems = {method: attempt(learns, backbone, method) for method in methods if backbone is not None}
        problems = {method: error or problem for method, (error, problem) in problems.items() if error or problem}
        taught, learnt = taught + (not failed), learnt + (backbone is not None and not problems)
        side = "" if backbone is None else backbone.anatomy.image_size[0]
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        print(f"{module} {name} {side} {time.perf_counter() - start:.0f} s", failed, problems or "", flush=True)
        if chosen.output:
            family = "" if backbone is None else backbone.anatomy.family
            record = {"module": module, "model": name, "pixels": side, "family": family}
            record |= {"teaches": failed, "learns": problems}
            record |= {"arguments": SMALLER[name]} if name in SMALLER else {}
            with open(chosen.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(f"teach {taught} of {count}, learn {learnt} of {count}")


if __name__ == "__main__":
    main()
