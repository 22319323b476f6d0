"""Signals while a command still reads its libraries, some of which swallow whatever is raised in them."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# Seconds after the start, from right after Python is up to the reading of PyTorch and the first batches.
MOMENTS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@pytest.mark.parametrize("after", MOMENTS)
def test_a_signal_at_any_early_moment_ends_the_command(
    tiny: Any, tmp_path: Path, start_process: Callable[..., subprocess.Popen], after: float
) -> None:
    number = random.Random(int(100 * after)).choice([signal.SIGINT, signal.SIGTERM])
    words = tiny.arguments("train.epochs=500", losses="ce")
    words = [word for word in words if not word.startswith("--teacher")]
    process = start_process("remap_cli", "tune", *words, f"--output={tmp_path / 'run'}")
    time.sleep(after + random.Random(int(1000 * after)).uniform(0.0, 0.2))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    # Before the program's own handlers are there, Python's end it: by the signal itself.
    assert process.returncode in (128 + number, -number), errors
