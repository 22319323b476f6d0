"""Which kernels run a network, by tables that were measured before: of attention, of convolutions; compiled or not.

There is no trial at the start of a run: its noise would decide the last bits, and a resumed or repeated run would
differ from the first.
"""

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import PLAIN_CLASS, plain_class

# Time of a ViT-S block with PyTorch's fused attention over that with the explicit one, by number of tokens; for a
# device, a precision and whether it trains. From benchmarks/kernels.py, one thread: fp32 on an AMD EPYC with AVX2 (the
# Xeon decides alike), bf16 on an Intel Xeon with AMX, where PyTorch's fused backward pass is slow. Kept to avx512_bf16
# (ONEDNN_MAX_CPU_ISA), the Xeon decides alike too.
FUSED_OVER_EXPLICIT: dict[tuple[str, str, bool], dict[int, float]] = {
    ("cpu", "fp32", False): {65: 1.02, 197: 0.87, 577: 0.63},
    ("cpu", "fp32", True): {65: 0.96, 197: 0.93, 577: 0.77},
    ("cpu", "bf16", False): {65: 0.91, 197: 0.94, 577: 0.60},
    ("cpu", "bf16", True): {65: 1.61, 197: 1.24, 577: 1.22},
}
# What a measurement has to differ by to count: pairs of one scatter by as much.
RESOLVED = 0.1
# Steps from which on compiling pays by kind of device: about a minute of compiling against a quarter of a 25 ms step.
# An estimate: benchmarks/gpu_step.py measures both.
COMPILED_FROM = {"cuda": 10_000}


class _InFloat32(nn.Conv2d):
    """A depthwise convolution whose backward pass does not run in bfloat16; mixed in before its own class."""

    def forward(self, x: Tensor) -> Tensor:
        # What a backward pass does not reach stays as it is, and equals what was cached of it.
        if not torch.is_autocast_enabled(x.device.type) or not (x.requires_grad or self.weight.requires_grad):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


# By the class that it is mixed into.
_IN_FLOAT32: dict[type, type] = {}


def train_depthwise_in_float32(model: nn.Module) -> None:
    """Let the depthwise convolutions of a model that trains under bfloat16 autocast on a CPU compute in float32.

    The class of the layers changes, and not their ``forward``: copies of them, compiled blocks and blocks that are
    computed again in the backward pass then do as they do.
    """
    for layer in model.modules():
        depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
        if depthwise and not isinstance(layer, _InFloat32):
            kind = type(layer)
            if kind not in _IN_FLOAT32:
                _IN_FLOAT32[kind] = type(kind.__name__, (_InFloat32, kind), {PLAIN_CLASS: plain_class(layer)})
            layer.__class__ = _IN_FLOAT32[kind]


def channels_last(model: nn.Module, device: str, *, bf16: bool) -> bool:
    """Return whether images go through a model with their channels last.

    On a CPU, if its convolutions overlap; in float32 only if some are grouped too, since others become slower.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    overlap = any(layer.kernel_size > layer.stride for layer in layers)
    return device == "cpu" and overlap and (bf16 or any(layer.groups > 1 for layer in layers))


def with_channels_last(x_BCHW: Tensor) -> Tensor:
    """Return (B, C, H, W) with the channels last in memory: convolutions go by the strides of what they are given."""
    # Not ``contiguous``: it returns images of one channel as they are, with strides that count as channels first.
    return torch.empty_like(x_BCHW, memory_format=torch.channels_last).copy_(x_BCHW)


def fused_attention(setting: str, device: str, *, bf16: bool, trains: bool, tokens: int | None) -> tuple[bool, str]:
    """Return whether attention is fused, and why in words.

    Args:
        setting: ``train.fused_attention``.
        device: Its type.
        tokens: Of a sequence; None where blocks see windows or stages.
    """
    if setting != "auto":
        return setting == "on", "train.fused_attention"
    if device != "cpu":
        return True, f"as PyTorch has it on {device}"
    precision = "bf16" if bf16 else "fp32"
    table = FUSED_OVER_EXPLICIT.get((device, precision, trains), {})
    row = max((one for one in table if tokens is not None and one <= tokens), default=None)
    if row is None:
        return False, f"not measured for {tokens or 'windows of'} tokens in {precision}"
    fused = table[row] < 1 - RESOLVED
    close = "" if fused or table[row] >= 1 else ", too close to count"
    return fused, f"fused takes {table[row]:.2f} of the time of explicit at {row} tokens in {precision}{close}"


def compiled(setting: bool | str, device: str, steps: int, *, checkpointed: bool = False) -> tuple[bool, str]:
    """Return whether blocks are compiled in a run of so many steps, and why in words.

    Args:
        checkpointed: Whether they are computed again in the backward pass, and so not compiled.
    """
    if checkpointed:
        return False, "train.checkpoint_blocks"
    if setting != "auto":
        return bool(setting), "train.compile"
    least = COMPILED_FROM.get(device)
    if least is None:
        return False, f"not by default on {device}"
    return steps >= least, f"{steps:,} steps; it pays from about {least:,} on"
