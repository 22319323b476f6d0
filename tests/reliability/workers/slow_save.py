"""The command line; every process gets SIGTERM in its first evaluation, and the first one saves slowly then."""

import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from remap.engine import training
from remap.engine.state import State
from remap_cli import console
from remap_cli.main import main

SECONDS = 2.0
save, wait = training.save_checkpoint, console.Reporter.wait


def slow_save(folder: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
    if state.step:  # not the one at the start
        time.sleep(SECONDS)
    save(folder, state, tensors)


def stopped_wait(self: console.Reporter, what: str, total: int | None = None) -> AbstractContextManager[Any]:
    if what == "evaluating the student":
        signal.raise_signal(signal.SIGTERM)
    return wait(self, what, total)


training.save_checkpoint = slow_save
console.Reporter.wait = stopped_wait
main()
