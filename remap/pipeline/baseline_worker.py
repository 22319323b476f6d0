"""What the process of ``baseline_process`` does: train the baseline in its run directory."""

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch

from remap.errors import RemapError
from remap.pipeline.run import run
from remap.progress import Silent
from remap.runs.run_dir import RunDir
from remap.tuning import METHODS, parts_of


def main() -> None:
    """Load the method that is named; run, or resume, the run directory of the first line, on so many threads."""
    for method in parts_of(sys.argv[1]):
        METHODS.load(method)
    with open(0, "rb", buffering=0, closefd=False) as stream:  # nothing of what follows is read ahead
        line = stream.readline()
    if not line:  # closed before: no baseline is to be trained
        return
    threads, path = json.loads(line)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with suppress(OSError):  # where memory runs out, the system ends this process, and not the student's
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(threads)
    run_dir = RunDir.open(Path(path))
    try:
        run(run_dir.recipe(), run_dir, Silent(), resuming=True)
    except RemapError:  # what it is, the first process finds and says when it trains the baseline itself
        sys.exit(1)


def _follow_parent() -> None:
    while os.read(0, 1):  # until its other end is closed; sys.stdin would hold a lock when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # by which a run saves its state and ends
