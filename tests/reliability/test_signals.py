"""Real processes and real signals: what is saved, how soon they leave, and that they go on to the same bytes.

The processes are forked from this one, which has imported everything, so twenty of them cost a few seconds; each is a
process group of its own and calls the command line's ``main``. Expected values: an undisturbed twin.
"""

import json
import os
import random
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remap.engine import interrupt
from remap.engine.launch import accelerator
from remap.progress import Step
from remap.running import start
from remap.runs.rundir import RunDir
from remap_cli import train, view
from remap_cli.main import main

FORK = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "soak.py"))
fork, wait = FORK["fork"], FORK["wait"]
STEPS, EPOCHS = 6, 3
TRAINING, EVALUATION, LESSONS, UNTRAINED = (
    *("epoch ", "evaluating the student", "teacher outputs"),
    "evaluating the untrained student",
)
# Seconds from a signal to the exit: the promise; and for two processes.
SOON, TOGETHER = 5.0, 10.0


@dataclass
class Pictures:
    """96 + 200 pictures, so that six steps make an epoch and evaluation takes four batches."""

    data: Path
    tiny: Any

    def words(self, *settings: str) -> list[str]:
        shared = (f"train.epochs={EPOCHS}", "train.batch_size=16", "train.checkpoint_seconds=3600", "data.workers=2")
        shared = (*shared, "teacher.allow_weak=true", "data.memory_gib=0.000001", "losses.kd.weight=0.5")
        return self.tiny.arguments(f"data.source={self.data}", *shared, *settings, losses="ce,kd")
