"""For tests/reliability/test_checkpoints.py: saves in a tight loop, killed at random moments; prints what was found.

Forked from one process that has torch already: a start of Python would cost more than all of the saves.
"""

import hashlib
import json
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import torch

from remap.engine.checkpoint import State, load_checkpoint, save_checkpoint, snapshot

KILLS = 20
NAMES = [f"weight{index}" for index in range(8)]
torch.set_num_threads(1)
folder = Path(sys.argv[1])


def trained(value: float) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    """4 MB with the moments; one step with a gradient of 0 leaves the numbers as they are."""
    parameters = {name: torch.nn.Parameter(torch.full((200, 210), value)) for name in NAMES}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0, fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return parameters, optimizer


def save(step: int) -> None:
    save_checkpoint(folder, State("abc", step=step), snapshot(*trained(float(step))))


def newest_by_hand() -> int:
    """The step of the newest manifest, whose tensors have its SHA-256 and hold that number only; without remap."""
    manifest = json.loads(max(folder.glob("[0-9]*.json")).read_text())
    data = (folder / f"{manifest['generation']:06d}.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == manifest["tensors"]["sha256"]
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:begin])
    step = manifest["state"]["step"]
    for name in NAMES:
        first, last = header[f"parameter/{name}"]["data_offsets"]
        assert (np.frombuffer(data[begin + first : begin + last], "<f4") == step).all()
    return step


def killed_writer(delay: float, step: int) -> None:
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


started = time.perf_counter()
save(0)
save(1)
seconds = (time.perf_counter() - started) / 2
draws, found = random.Random(7), []
for kill in range(KILLS):
    first = found[-1]["after"] + 1 if found else 2
    killed_writer(draws.uniform(0.0, 2.5 * seconds), first)
    left = sorted(os.listdir(folder))
    whole = newest_by_hand()
    if kill % 2:  # a run that goes on: it loads first
        parameters, optimizer = trained(0.0)
        state, _ = load_checkpoint(folder, "abc", parameters, optimizer, print)
        assert all((parameter == state.step).all() for parameter in parameters.values())
        moment = torch.full((), float(state.step)) * (1 - 0.9)  # AdamW's first, of one step
        assert all(torch.allclose(optimizer.state[p]["exp_avg"], moment) for p in parameters.values())
        loaded, after = state.step, whole
    else:  # one that saves first
        save(whole + 1)
        loaded, after = whole, newest_by_hand()
    swept = sorted(os.listdir(folder))
    found.append({"first": first, "whole": whole, "loaded": loaded, "after": after, "left": left, "swept": swept})
print(json.dumps({"kills": found, "milliseconds": 1e3 * seconds}))
