"""torch.compile for the blocks of student and teachers."""

import torch

from remap.network import Network


def compile_blocks(network: Network) -> None:
    """Compile block by block: most methods' blocks share one graph, so start-up is short, and hooks outside stay."""
    # Methods that replace a layer's forward have one graph per block; PyTorch would give up at the ninth.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * network.anatomy.depth)
    for path in dict.fromkeys(block.block for block in network.anatomy.blocks if block.block):
        network.model.get_submodule(path).compile()
