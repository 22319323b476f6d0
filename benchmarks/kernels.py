"""Time of a ViT-S block with fused attention over that with explicit attention: rows of remap/backbones/kernels.py.

Run: python benchmarks/kernels.py [--tokens 65,197,577] [--precisions fp32,bf16] [--repeats 9] [--seconds 0.3]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block

WIDTH, HEADS = 384, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="65,197,577")
    parser.add_argument("--precisions", default="fp32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one of the repeats of one kernel, about")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for precision in options.precisions.split(","):
        for trains in (False, True):
            for tokens in map(int, options.tokens.split(",")):
                ratios = compare(device, precision, tokens, options.repeats, options.seconds, trains=trains)
                row = (device.type, precision, "training" if trains else "forward", tokens)
                print(f"{row}: {statistics.median(ratios):.3f}  # {min(ratios):.3f} to {max(ratios):.3f}", flush=True)


def compare(
    device: torch.device, precision: str, tokens: int, repeats: int, seconds: float, *, trains: bool
) -> list[float]:
    """Ratios fused / explicit, in turns; which goes first alternates."""
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

    once = max(with_kernel(fused, 1) for fused in (True, False) * 2)
    count = max(1, round(seconds / once))
    ratios = []
    for repeat in range(repeats):
        times = {fused: with_kernel(fused, count) for fused in ((True, False) if repeat % 2 else (False, True))}
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
