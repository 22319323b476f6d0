"""What one of two processes holds between two steps of training a ViT, by train.parallel: ddp and fsdp2.

Run: python benchmarks/sharding.py [--model vit_base_patch16_224] [--processes 2] [--methods lora,full]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--only", choices=("ddp", "fsdp2"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if arguments.only:
        for method in methods:
            found = measure(arguments.only, arguments.model, method)
            if os.environ["RANK"] == "0":
                print(json.dumps(found), flush=True)
        return
    print("| method | train.parallel | weights | gradients | moments | together |")
    print("|---|---|---|---|---|---|")
    sides = {parallel: in_processes(parallel, arguments) for parallel in ("ddp", "fsdp2")}
    for number, method in enumerate(methods):
        for parallel, found in sides.items():
            sizes = [*found[number], sum(found[number])]
            print(f"| {method} | {parallel} | {' | '.join(f'{size / 2**20:.1f} MiB' for size in sizes)} |")


def in_processes(parallel: str, arguments: argparse.Namespace) -> list[list[int]]:
    """For each method the bytes that the first process holds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(arguments.processes)}
    command = [sys.executable, __file__, "--only", parallel]
    command += ["--model", arguments.model, "--methods", arguments.methods]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **group, "RANK": str(rank)})
        for rank in range(arguments.processes)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a process of {parallel} failed")
    return [json.loads(line) for line in outputs[0].splitlines()]


def measure(parallel: str, model: str, method: str) -> list[int]:
    """Bytes of weights, gradients and moments on this process after one step of one image."""
    import torch
    from torch import Tensor
    from torch.distributed.tensor import DTensor

    from remap.backbones.build import build
    from remap.distributed.sharding import bytes_held, shard
    from remap.engine.optim import make_optimizer
    from remap.network import tuned

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    network = tuned(build(model, "none", 10), method, {})
    if parallel == "fsdp2":
        shard([network], torch.device("cpu"))
    optimizer = make_optimizer(network, [], 1e-3, 0.0)
    network.attached.train()
    pixels = torch.randn(1, 3, *network.anatomy.image_size)
    network.model.forward_head(network.model.forward_features(pixels)).square().mean().backward()
    optimizer.step()

    def held(tensors: Iterable[Tensor | None]) -> int:
        parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
        return sum(part.numel() * part.element_size() for part in parts)

    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [bytes_held(network), held(p.grad for p in network.model.parameters()), held(moments)]


if __name__ == "__main__":
    main()
