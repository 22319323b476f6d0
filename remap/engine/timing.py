"""How long computing takes, on any device."""

import time

import torch


class Timer:
    """``with Timer(device) as timer: ...``, then ``timer.seconds``: work that a GPU still has to do is waited for."""

    seconds: float

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> "Timer":
        self._wait()  # what was begun before is not counted
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._started

    def _wait(self) -> None:
        if self._device.type != "cpu":  # the CPU has no queue: a call returns when its work is done
            torch.accelerator.synchronize(self._device)
