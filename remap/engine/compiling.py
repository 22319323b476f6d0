"""torch.compile for the blocks of student and teachers."""

import torch

from remap.backbones.kernels import compiled
from remap.distributed.sharding import is_sharded
from remap.engine.teacher import Teacher
from remap.engine.training import Training
from remap.network import Network


def compile_networks(training: Training) -> None:
    """Compile the blocks of the student and of teachers that run in every step, if the recipe or the table says so."""
    job, spec = training.job, training.spec
    steps = spec.epochs * training.plan.steps
    device = training.accelerator.device.type
    on, _ = compiled(spec.compile, device, steps, checkpointed=spec.checkpoint_blocks)
    if not on:
        return
    compile_blocks(job.student, "reduce-overhead" if spec.compile == "graphs" else None)
    for teacher in job.teachers:
        if type(teacher) is Teacher and teacher.cached is None and not is_sharded(teacher.network):
            compile_blocks(teacher.network)


def compile_blocks(network: Network, mode: str | None = None) -> None:
    """Compile block by block: most methods' blocks share one graph, so start-up is short, and hooks outside stay.

    Args:
        mode: Of torch.compile; "reduce-overhead" replays CUDA graphs, for networks whose kernels are short.
    """
    # Methods that replace a layer's forward have one graph per block; PyTorch would give up at the ninth.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * network.anatomy.depth)
    # Hooks that come later count: reports and other runs of this process attach theirs to blocks compiled before.
    config.skip_nnmodule_hook_guards = False
    for path in dict.fromkeys(block.block for block in network.anatomy.blocks if block.block):
        network.model.get_submodule(path).compile(mode=mode)
