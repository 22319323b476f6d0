"""For tests/reliability/test_checkpoints.py: saves in a tight loop, killed at random moments; prints what was found.

Forked from one process that has torch already: a start of Python would cost more than all of the saves.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from remap.engine import checkpoint_files
from remap.engine.checkpoint import load_checkpoint, save_checkpoint, snapshot
from remap.engine.state import State
from remap.errors import RemapError

KILLS = 20
_open = os.open
NAMES = [f"weight{index}" for index in range(8)]
torch.set_num_threads(1)
folder = Path(sys.argv[1])


def trained() -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    """4 MB with the moments."""
    parameters = {name: torch.nn.Parameter(torch.zeros(200, 210)) for name in NAMES}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return parameters, optimizer


tensors = snapshot(*trained())


def save(step: int) -> None:
    """All numbers of a generation are that of its step."""
    for name, tensor in tensors.items():
        if not name.startswith("optimizer/step"):
            tensor.fill_(step)
    save_checkpoint(folder, State("abc", step=step), tensors)


def newest_by_hand() -> int:
    """The step of the newest manifest, whose tensors have its SHA-256 and hold that number only; without remap."""
    manifest = json.loads(max(folder.glob("[0-9]*.json")).read_text())
    data = (folder / f"{manifest['generation']:06d}.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == manifest["tensors"]["sha256"]
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:begin])
    step = manifest["state"]["step"]
    for name in NAMES:
        for kind in ("parameter", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
            first, last = header[f"{kind}/{name}"]["data_offsets"]
            assert (np.frombuffer(data[begin + first : begin + last], "<f4") == step).all()
    return step


def kill_a_writer(delay: float, step: int) -> None:
    """A process that saves steps ``step``, ``step + 1``, ...; killed ``delay`` seconds after its first save."""
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        for number in range(step, step + 10_000):
            save(number)
            os.write(tell, b".") if number == step else None
        os._exit(3)
    assert os.read(ready, 1) == b"."
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    os.close(ready), os.close(tell)


def one_of_two(rank: int, seen: Path) -> None:
    """Half of a run of two processes: the second cannot read the newest generation, and both hold half of a weight."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(seen / "store"), 2), rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    told: list[str] = []
    parameters, optimizer = trained()
    apart = {
        name: torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in parameters.items()
    }
    sharded = torch.optim.AdamW(apart.values(), fused=True)
    state, *_ = load_checkpoint(seen / f"disk{rank}", "abc", apart, sharded, told.append)
    load_checkpoint(seen / f"disk{rank}", "abc", parameters, optimizer, print)
    for trainer, weights in ((optimizer, parameters), (sharded, apart)):
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        trainer.step()
    again, whole = snapshot(apart, sharded), snapshot(parameters, optimizer)
    equal = set(again) == set(whole) and all(torch.equal(again[name], value) for name, value in whole.items())
    halves = [tuple(sharded.state[weight]["exp_avg"].to_local().shape) for weight in apart.values()]
    found = {"step": state.step, "told": told, "equal": equal, "halves": halves, "refused": ["", ""]}
    before = sorted(os.listdir(seen / f"disk{rank}"))
    if rank:
        checkpoint_files.PAUSE, os.open = 0.001, _refuse
    try:
        load_checkpoint(seen / f"disk{rank}", "abc", parameters, optimizer, print)
    except RemapError as error:
        found["refused"] = [type(error).__name__, error.what]
    found["untouched"] = sorted(os.listdir(seen / f"disk{rank}")) == before
    os.open = _open
    (seen / f"seen{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _refuse(path: str, *_: object) -> int:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)


def two_processes(seen: Path) -> list[dict]:
    seen.mkdir()
    for rank in range(2):
        shutil.copytree(folder, seen / f"disk{rank}")
    newest = max((seen / "disk1").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    children = []
    for rank in range(2):
        children.append(os.fork())
        if not children[-1]:
            with leaving():
                one_of_two(rank, seen)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    return [json.loads((seen / f"seen{rank}.json").read_text()) for rank in range(2)]


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Leave a forked process without what its parent would do at its end; an error is printed."""
    code = 1
    try:
        yield
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


started = time.perf_counter()
save(0)
save(1)
seconds = (time.perf_counter() - started) / 2
draws, found = random.Random(7), []
for kill in range(KILLS):
    first = found[-1]["after"] + 1 if found else 2
    kill_a_writer(draws.uniform(0.0, 2.5 * seconds), first)
    left = sorted(os.listdir(folder))
    whole = newest_by_hand()
    if kill % 2:  # a run that goes on: it loads first
        parameters, optimizer = trained()
        state, *_ = load_checkpoint(folder, "abc", parameters, optimizer, print)
        for parameter in parameters.values():
            assert (parameter == state.step).all() and (optimizer.state[parameter]["exp_avg"] == state.step).all()
        loaded, after = state.step, whole
    else:  # one that saves first
        save(whole + 1)
        loaded, after = whole, newest_by_hand()
    swept = sorted(os.listdir(folder))
    found.append({"first": first, "whole": whole, "loaded": loaded, "after": after, "left": left, "swept": swept})
print(json.dumps({"kills": found, "last": found[-1]["after"], "two": two_processes(folder.parent / "seen")}))
