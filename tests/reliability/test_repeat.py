"""The same recipe and seed give the same bits on one machine, whatever the number of workers; and it can be checked."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remap.pipeline.repeat import repeat
from remap.pipeline.run import start

pytestmark = pytest.mark.slow

# Decoded anew for every batch, so that workers have something to do in every step; mixed with other images.
SETTINGS = ("data.memory_gib=0", "data.augment=strong", "data.mixup=0.8", "train.accumulation=2")


@pytest.mark.guarantee(23)
def test_any_number_of_workers_gives_the_same_bits(
    tiny: Any, tmp_path: Path, history: Callable[[Path], list[dict]], figure: Callable[..., None]
) -> None:
    """Source: the run with one worker; another seed gives others."""
    runs = {}
    for workers in (1, 2, 5):
        recipe = tiny.recipe(*SETTINGS, f"data.workers={workers}", method="full", losses="ce,kd,feature")
        runs[workers] = start(recipe, tmp_path / str(workers)).run_dir
    assert len({(run / "task" / "task.safetensors").read_bytes() for run in runs.values()}) == 1
    assert history(runs[1]) == history(runs[2]) == history(runs[5])
    other = start(recipe.model_copy(update={"seed": recipe.seed + 1}), tmp_path / "other").run_dir
    assert (other / "task" / "task.safetensors").read_bytes() != (runs[5] / "task" / "task.safetensors").read_bytes()
    figure("numbers of data workers with the same bytes", len(runs), len(runs))


def test_other_threads_are_named_before_and_after(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    """PyTorch splits sums over its threads. Whether bits differ is up to it; that the threads do must be said."""
    run = start(tiny.recipe("train.epochs=1", "train.warmup_epochs=0"), tmp_path / "run").run_dir
    threads, reporter = torch.get_num_threads(), watch(lambda done: None)
    try:
        torch.set_num_threads(threads + 1)
        found = repeat(run, progress=reporter)
    finally:
        torch.set_num_threads(threads)
    assert any(f"has {threads + 1} threads here and had {threads}" in line for line in reporter.said)
    assert found["environment"] == [{"what": "threads", "first": str(threads), "repeat": str(threads + 1)}]
    assert all(row["largest_difference"] < 1e-5 for row in found["tensors"])


@pytest.mark.guarantee(23)
def test_a_run_of_two_processes_is_repeated_by_two(
    tiny: Any,
    tmp_path: Path,
    fork_command: Callable[..., Any],
    start_process: Callable[..., subprocess.Popen],
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
) -> None:
    """Without being told how many: the run's summary says so."""
    run = tmp_path / "run"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as ``start_process`` sets it: a run records it
    fork_command("remap_cli", "distill", *tiny.arguments(*SETTINGS), f"--output={run}", count=2).end()
    again = start_process("remap_cli", "repeat", str(run), "--json")
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    found = json.loads(output)
    assert found["equal"] and found["environment"] == []
    assert json.loads((tmp_path / "run-repeat-001" / "summary.json").read_text())["processes"] == 2
    figure("runs of two processes repeated to the same bytes", 1, 1)
