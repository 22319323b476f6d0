"""Time of a ViT-S block with fused attention over that with explicit attention: rows of remap/backbones/kernels.py.

Run: python benchmarks/kernels.py [--tokens 65,197,577] [--precisions fp32,bf16] [--repeats 9] [--seconds 0.3]

With ``--models NAMES`` instead of attention: time of those networks as ``choose_kernels`` and ``Runner`` run their
convolutions over that with channels first and every layer under autocast.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from timm.models.vision_transformer import Block

from remap.backbones.kernels import channels_last, train_depthwise_in_float32, with_channels_last

WIDTH, HEADS = 384, 6
# Images in a batch and their side, for --models: those of the runs that benchmarks/stronger_teacher.py does.
IMAGES, SIDE = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="65,197,577")
    parser.add_argument("--precisions", default="fp32")
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one of the repeats of one kernel, about")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for precision in options.precisions.split(","):
        for trains in (False, True):
            for name in options.models:
                ratios = compare_convolutions(device, precision, name, options.repeats, options.seconds, trains=trains)
                row = (device.type, precision, "training" if trains else "forward", name)
                print(f"{row}: {statistics.median(ratios):.3f}  # {min(ratios):.3f} to {max(ratios):.3f}", flush=True)
            for tokens in () if options.models else map(int, options.tokens.split(",")):
                ratios = compare(device, precision, tokens, options.repeats, options.seconds, trains=trains)
                row = (device.type, precision, "training" if trains else "forward", tokens)
                print(f"{row}: {statistics.median(ratios):.3f}  # {min(ratios):.3f} to {max(ratios):.3f}", flush=True)


def compare(
    device: torch.device, precision: str, tokens: int, repeats: int, seconds: float, *, trains: bool
) -> list[float]:
    """Ratios fused / explicit, in turns."""
    block = Block(WIDTH, HEADS, qkv_bias=True).to(device).train(trains)
    # About 4,000 tokens a pass on a CPU thread; a GPU needs more to be busy.
    batch = max(1, (4000 if device.type == "cpu" else 100_000) // tokens)
    x = torch.randn(batch, tokens, WIDTH, device=device, requires_grad=trains)

    def step() -> None:
        with torch.set_grad_enabled(trains), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            y = block(x)
        if trains:
            y.float().square().mean().backward()
            x.grad = None
            block.zero_grad(set_to_none=True)

    def with_kernel(fused: bool, count: int) -> float:
        block.attn.fused_attn = fused
        return clocked(step, count, device)

    return in_turns(with_kernel, repeats, seconds)


def compare_convolutions(
    device: torch.device, precision: str, name: str, repeats: int, seconds: float, *, trains: bool
) -> list[float]:
    """Ratios chosen / plain of a network of timm, in turns."""
    bf16 = precision == "bf16"
    networks = {chosen: timm.create_model(name, num_classes=10).to(device).train(trains) for chosen in (True, False)}
    images = torch.rand(IMAGES, 3, SIDE, SIDE, device=device)
    if bf16 and trains:
        train_depthwise_in_float32(networks[True])
    last = channels_last(networks[True], device.type, bf16=bf16)
    inputs = {True: with_channels_last(images) if last else images, False: images}

    def with_kernel(chosen: bool, count: int) -> float:
        def step() -> None:
            with torch.set_grad_enabled(trains), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                y = networks[chosen](inputs[chosen])
            if trains:
                y.float().square().mean().backward()
                networks[chosen].zero_grad(set_to_none=True)

        return clocked(step, count, device)

    return in_turns(with_kernel, repeats, seconds)


def in_turns(with_kernel: Callable[[bool, int], float], repeats: int, seconds: float) -> list[float]:
    """Ratios of one kernel's time to the other's, given the seconds of so many steps; which goes first alternates."""
    once = max(with_kernel(one, 1) for one in (True, False) * 2)
    count = max(1, round(seconds / once))
    ratios = []
    for repeat in range(repeats):
        times = {one: with_kernel(one, count) for one in ((True, False) if repeat % 2 else (False, True))}
        ratios.append(times[True] / times[False])
    return ratios


def clocked(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Seconds; on the CPU those of the processor, which waiting on a busy machine does not add to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


if __name__ == "__main__":
    main()
