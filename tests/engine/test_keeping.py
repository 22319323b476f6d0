"""Teacher outputs and frozen features that processes compute together. Source: one process with two micro-batches."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from remap.engine import keeping
from remap.engine.teacher import Teacher
from remap.running import start

WORKER = Path(__file__).parent / "workers" / "keeping.py"
IMAGES = 24
# Outputs fit in memory, images do not, so unreadable ones are found on the way.
SHORT_OF_MEMORY = "data.memory_gib=1e-5"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("data.augment=shift", "data.views=2"), {"method": "lora", "losses": "ce,kd"}),
        ((), {"method": "linear", "losses": "ce,kd"}),
    ],
    ids=["two views", "frozen features"],
)
def test_two_processes_compute_a_share_each_and_hold_all(
    tiny: Any, tmp_path: Path, settings: tuple[str, ...], words: dict[str, str]
) -> None:
    """Shares of micro-batches of 4: 12 of 24 images each, less the broken one, which both know of in the end."""
    shutil.copytree(tiny.data, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "train").glob("*/*.png"))[5]
    broken.write_bytes(broken.read_bytes()[:200])
    words = {**tiny.words(**words), "data": str(tmp_path / "data")}
    settings = (*tiny.SETTINGS, *settings, SHORT_OF_MEMORY, "data.max_bad=0.2", "teacher.allow_weak=true")
    work = {1: (*settings, "train.accumulation=2"), 2: settings}
    for count, each in work.items():
        arguments = json.dumps([count, str(tmp_path / "run" / str(count)), words, each])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, str(WORKER), arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, first, second = (_noted(tmp_path / "run", count, rank) for count, rank in ((1, 0), (2, 0), (2, 1)))
    views = 2 if "data.views=2" in settings else 1
    assert one[0]["asked"] == first[0]["asked"] + second[0]["asked"] == views * (IMAGES - 1)
    assert abs(first[0]["asked"] - second[0]["asked"]) == views
    assert one[0]["bad"] == first[0]["bad"] == second[0]["bad"] == [5]
    assert one[0]["summary"] == first[0]["summary"] == [str(broken.relative_to(tmp_path / "data"))]
    assert ("feature" in str(list(one[1]))) == (words["method"] == "linear")
    for held in (first[1], second[1]):
        assert held.keys() == one[1].keys()
        assert all(torch.equal(held[name], one[1][name]) for name in held)


def test_outputs_are_computed_in_parts_where_memory_runs_out(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest_difference: Callable[..., float]
) -> None:
    """The student is that of a teacher with memory enough, to the rounding of another batch shape."""
    plain = start(tiny.recipe(), tmp_path / "plain")
    items, sizes = Teacher.items, []

    def short(teacher: Teacher, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.append(len(images_BCHW))
        if len(images_BCHW) > 3:
            raise torch.OutOfMemoryError("no more than three images")
        return items(teacher, images_BCHW)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "items", short)
        parts = start(tiny.recipe(), tmp_path / "parts")
    assert sizes[:4] == [1, 8, 4, 2] and set(sizes[4:]) == {2}, "halved until it fits, and kept at that"
    assert largest_difference(plain.student.tensors, parts.student.tensors) < 1e-4

    monkeypatch.setattr(keeping, "is_sharded", lambda network: True)
    monkeypatch.setattr(Teacher, "items", short)
    with pytest.raises(Exception, match="out of memory"):
        start(tiny.recipe(), tmp_path / "sharded")


def _noted(run: Path, count: int, rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    stem = f"{run / str(count)}-{count}-{rank}"
    return json.loads(Path(f"{stem}.json").read_text()), load_file(f"{stem}.safetensors")
