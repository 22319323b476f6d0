"""Checkpoints are whole, belong to one recipe, and say what is wrong when they do not fit."""

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remap import files
from remap.engine.checkpoint import State, load_checkpoint, save_checkpoint
from remap.errors import RemapError, RunError
from remap.recipe import dump
from remap.running import resume, start
from remap.runs.rundir import RunDir


@pytest.fixture
def stopped(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> Path:
    """A run that crashed in step 5, with a checkpoint after step 4."""

    def crash(done: int) -> None:
        if done == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        start(tiny.recipe("train.checkpoint_seconds=0"), tmp_path / "run", watch(crash))
    return tmp_path / "run"


def test_a_checkpoint_gives_back_numbers_and_counters(tmp_path: Path) -> None:
    """Saved and read by hand: parameters, AdamW's moments and the state are equal to the last bit."""
    parameters, optimizer = _trained(seed=0)
    state = State("abc", epoch=2, step=1, seconds=0.1 + 0.2, loss_sums={"loss": 1 / 3}, history=[{"epoch": 1}])
    save_checkpoint(tmp_path / "c" / "last.safetensors", state, parameters, optimizer)
    others, other = _trained(seed=1)
    assert load_checkpoint(tmp_path / "c" / "last.safetensors", "abc", others, other) == (state, {})
    for name, parameter in parameters.items():
        assert torch.equal(others[name], parameter)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[others[name]][key], value), (name, key)


def test_a_checkpoint_of_another_recipe_is_refused(stopped: Path, tiny: Any) -> None:
    (stopped / "recipe.yaml").write_text(dump(tiny.recipe("train.checkpoint_seconds=0", seed=9)))
    with pytest.raises(RunError, match="belongs to another recipe"):
        resume(stopped)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    parameters, optimizer = _trained(seed=0)
    save_checkpoint(tmp_path / "last.safetensors", State("abc"), parameters, optimizer)
    wider = {"weight": torch.nn.Parameter(torch.zeros(3, 5)), "bias": parameters["bias"]}
    with pytest.raises(RunError, match="does not fit this model"):
        load_checkpoint(tmp_path / "last.safetensors", "abc", wider, torch.optim.AdamW(wider.values()))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "state"])
def test_a_damaged_checkpoint_is_refused(stopped: Path, damage: str) -> None:
    path = RunDir(stopped).checkpoint
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-10] ^= 1  # in the numbers, where safetensors itself sees nothing
    if damage == "state":
        place = data.index(b'step\\":')
        digits = data[place : place + 12]
        data[place : place + 12] = digits.replace(b"1", b"0")
        assert bytes(digits) != bytes(data[place : place + 12])
    replaced = {"truncated": data[:-100], "empty": b"", "text": b"not a checkpoint"}
    path.write_bytes(replaced.get(damage, data))
    with pytest.raises(RunError, match="is damaged") as caught:
        resume(stopped)
    assert "start the run again" in (caught.value.do or "")
    assert RunDir(stopped).status() == "failed"


def test_the_file_holds_what_is_trained_and_no_backbone(stopped: Path) -> None:
    """Read without safetensors: eight bytes of header length, then JSON."""
    data = RunDir(stopped).checkpoint.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    names = {name.split("/")[-1] for name in header if name != "__metadata__"}
    assert names == {"remap_prompts.prompts", "head.weight", "head.bias"}


def test_a_full_disk_leaves_the_earlier_checkpoint(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest_difference: Callable[..., float]
) -> None:
    recipe = tiny.recipe("train.checkpoint_seconds=0")
    expected = start(recipe, tmp_path / "twin")
    saves = [0]
    keep = os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp") and "last.safetensors" in os.readlink(
            f"/proc/self/fd/{descriptor}"
        ):
            saves[0] += 1
            if saves[0] == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        keep(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left on device") as caught:
            start(recipe, tmp_path / "run")
    assert caught.value.exit_code == 2 and "last.safetensors" in caught.value.what
    run = RunDir(tmp_path / "run")
    assert run.status() == "failed"
    assert [entry.name for entry in run.checkpoint.parent.iterdir()] == ["last.safetensors"]
    result = resume(tmp_path / "run")
    assert largest_difference(result.student.trained, expected.student.trained) == 0.0


def test_a_disk_that_refuses_everything_still_gives_the_first_message(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any]
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise RunError(f"cannot write {path}: No space left on device")

    def fill(done: int) -> None:
        monkeypatch.setattr(files, "write_bytes", refuse)
        monkeypatch.setattr("remap.engine.checkpoint.write_bytes", refuse)

    with pytest.raises(RemapError, match="cannot write .*last.safetensors"):
        start(tiny.recipe("train.checkpoint_seconds=0"), tmp_path / "run", watch(fill))
    assert RunDir(tmp_path / "run").status() == "running", "the last status that could be written"


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    stray = tmp_path / ".last.safetensors.99999.tmp"
    stray.write_bytes(b"half a checkpoint")
    save_checkpoint(tmp_path / "last.safetensors", State("abc"), *_trained(seed=0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.safetensors"]


def _trained(seed: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(seed)
    parameters = {"weight": torch.nn.Parameter(torch.randn(3, 4)), "bias": torch.nn.Parameter(torch.randn(3))}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    for _ in range(2):
        sum((p**2).sum() for p in parameters.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer
