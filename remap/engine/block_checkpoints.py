"""Gradient checkpointing, block by block: activations inside are computed again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174). timm's own switch checkpoints
sequences of blocks, which the hooks of methods and losses would not outlive.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from remap.network import Network


@contextmanager
def checkpointed_blocks(network: Network) -> Iterator[None]:
    """Checkpoint the blocks of a network in passes with gradients; the same numbers come out, dropout included.

    Hooks on a block stay outside, and so do its parameters' shards (FSDP2). Blocks that learn batch statistics, which a
    second pass would count twice, are refused when the student is built.
    """
    paths = dict.fromkeys(block.block for block in network.anatomy.blocks if block.block)
    blocks = [network.model.get_submodule(path) for path in paths]
    replaced = [block.__dict__.get("forward") for block in blocks]  # of a method that gave it one of its own
    for block in blocks:
        block.forward = _checkpointed(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, replaced, strict=True):
            if forward is None:
                # Any attribute of the instance would go on hiding the forward of its class.
                del block.__dict__["forward"]
            else:
                block.forward = forward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)  # without gradients no activations are held, so there is nothing to save
        # The reentrant kind gives no gradients to a block whose input needs none, as behind a frozen beginning.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
