"""Checkpoints are whole, belong to one recipe, and say what is wrong when they do not fit.

Files are damaged, forged and read by hand: SHA-256 by hashlib, headers by struct and json.
"""

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from remap.engine import checkpoint_files
from remap.engine.checkpoint import load_checkpoint, save_checkpoint, snapshot
from remap.engine.checkpoint_files import has_checkpoint
from remap.engine.state import State
from remap.errors import RunError, TrainingError
from remap.io import atomic_write
from remap.pipeline.run import resume, start
from remap.recipe import dump
from remap.runs.run_dir import RunDir

ONE = ["000001.json", "000001.safetensors"]
TWO = [*ONE, "000002.json", "000002.safetensors"]


@pytest.fixture
def stopped(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> Path:
    """A run that crashed in step 5, with a checkpoint after step 4."""

    def crash(done: int) -> None:
        if done == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        start(tiny.recipe("train.checkpoint_seconds=0", method="vpt_deep"), tmp_path / "run", watch(crash))
    return tmp_path / "run"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder of two generations, of states 1 and 2, with weights of seeds 1 and 2."""
    for number in (1, 2):
        _save(tmp_path / "c", State("abc", step=number), *_trained(seed=number))
    return tmp_path / "c"


def test_a_checkpoint_gives_back_numbers_and_counters(tmp_path: Path) -> None:
    """Saved and read back: parameters, buffers, AdamW's moments, memory and the state are equal to the last bit."""
    parameters, optimizer = _trained(seed=0)
    state = State(
        "abc",
        epoch=2,
        step=2**53 - 1,  # the last whole number that every reader of JSON keeps
        seconds=0.1 + 0.2,
        loss_sums={"loss": 1 / 3, "ce": 5e-324, "kd": -1.7976931348623157e308},
        history=[{"epoch": 1, "loss": 2 / 3}, {"epoch": 2, "loss": 1e-7}],
        lr_factor=0.125,
    )
    trained = {**parameters, "mean": torch.tensor([1.5, -2.0]), "batches": torch.tensor(7)}
    _save(tmp_path / "c", state, trained, optimizer, {"a/b": torch.tensor([0.1])})
    others, other = _trained(seed=1)
    found = {**others, "mean": torch.zeros(2), "batches": torch.tensor(0)}
    loaded, memory, _ = load_checkpoint(tmp_path / "c", "abc", found, other, _silent)
    assert loaded == state and torch.equal(memory.pop("a/b"), torch.tensor([0.1])) and not memory
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    for name, parameter in parameters.items():
        assert len(optimizer.state[parameter]) == 3
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[others[name]][key], value), (name, key)


def test_a_manifest_is_what_sha256_says(two: Path) -> None:
    """hashlib over the file's bytes; the newest manifest is written last."""
    assert sorted(os.listdir(two)) == TWO
    for number in (1, 2):
        manifest = json.loads((two / f"00000{number}.json").read_text())
        data = (two / f"00000{number}.safetensors").read_bytes()
        assert manifest["tensors"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert manifest["generation"] == number and manifest["state"]["step"] == number


def test_going_back_to_the_start_forgets_the_moments(tmp_path: Path) -> None:
    """A generation from before the first step holds none, and those of the broken steps must not stay."""
    parameters, optimizer = _trained(seed=0, steps=0)
    _save(tmp_path, State("abc"), parameters, optimizer)
    others, other = _trained(seed=1)
    load_checkpoint(tmp_path, "abc", others, other, _silent)
    assert len(other.state) == 0
    assert all(torch.equal(others[name], parameter) for name, parameter in parameters.items())


def test_a_checkpoint_of_another_recipe_is_refused(stopped: Path, tiny: Any) -> None:
    (stopped / "recipe.yaml").write_text(dump(tiny.recipe("train.checkpoint_seconds=0", method="vpt_deep", seed=9)))
    before = sorted(os.listdir(RunDir(stopped).checkpoint))
    with pytest.raises(RunError, match="belongs to another recipe"):
        resume(stopped)
    assert sorted(os.listdir(RunDir(stopped).checkpoint)) == before


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (
            "r1+f2-143+30+w1",
            (
                "144 training images and 30 without labels, fingerprint 'f1', then",
                "143 training images and 30 without labels, fingerprint 'f2', now",
            ),
        ),
        ("r1+f1-143+30+w1", ("144 training images and 30 without", "143 training images and 30 without")),
        ("r1+f1-144+30+w2", ("their weights differ", "digest 'w1' then, 'w2' now")),
        ("r2+f1-144+30+w1", ("belongs to another recipe", "digest 'r1' then, 'r2' now")),
    ],
)
def test_what_differs_from_the_run_is_said_in_words(tmp_path: Path, now: str, words: tuple[str, ...]) -> None:
    """A digest of letters: recipe, images (fingerprint, with labels, without), weights."""
    _save(tmp_path / "c", State("r1+f1-144+30+w1"), *_trained(seed=0))
    with pytest.raises(RunError) as caught:
        load_checkpoint(tmp_path / "c", now, *_trained(seed=0), _silent)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_manifest_that_is_no_json_is_blamed_itself(two: Path) -> None:
    """In words, and not in those of a parser."""
    (two / "000002.json").write_text('{"a":\n')
    said: list[str] = []
    load_checkpoint(two, "abc", *_trained(seed=0), said.append)
    assert said[0].startswith(f"{two / '000002.json'} is damaged: it is not JSON;")


def test_a_folder_that_was_moved_is_not_made_again(tmp_path: Path) -> None:
    """A run directory that got another name while the run is going: the checkpoints must not be in two places."""
    run = tmp_path / "run"
    run.mkdir()
    _save(run / "checkpoint", State("abc", step=1), *_trained(seed=1))
    run.rename(tmp_path / "moved")
    with pytest.raises(RunError, match=f"{run} has been moved or removed"):
        _save(run / "checkpoint", State("abc", step=2), *_trained(seed=2))
    assert sorted(os.listdir(tmp_path)) == ["moved"] and sorted(os.listdir(tmp_path / "moved" / "checkpoint")) == ONE
    (tmp_path / "moved").rename(run)
    _save(run / "checkpoint", State("abc", step=2), *_trained(seed=2))
    assert sorted(os.listdir(run / "checkpoint")) == TWO


def test_a_checkpoint_of_another_shape_is_refused(two: Path) -> None:
    parameters, _ = _trained(seed=0)
    wider = {"weight": torch.nn.Parameter(torch.zeros(3, 5)), "bias": parameters["bias"]}
    with pytest.raises(RunError, match="does not fit this model"):
        load_checkpoint(two, "abc", wider, torch.optim.AdamW(wider.values()), _silent)


def _flip(data: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("name", ["000002.safetensors", "000002.json"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "flipped", "empty", "text", "gone", "a link", "a folder"])
def test_the_generation_before_stands_in_for_a_damaged_one(two: Path, name: str, damage: str) -> None:
    path, said = two / name, list[str]()
    data = path.read_bytes()
    changed = {
        "truncated": data[:-10],
        "longer": data + b"x",
        "flipped": _flip(data, len(data) // 2, 0),
        "empty": b"",
        "text": b"not a checkpoint",
    }
    path.unlink()
    if damage == "a link":
        path.symlink_to(two.parent / "elsewhere")
        (two.parent / "elsewhere").write_bytes(data)
    elif damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(changed[damage])
    parameters, optimizer = _trained(seed=0)
    state, *_ = load_checkpoint(two, "abc", parameters, optimizer, said.append)
    first, _ = _trained(seed=1)
    assert state == State("abc", step=1)
    assert all(torch.equal(parameters[key], first[key]) for key in first)
    if (name, damage) == ("000002.json", "gone"):
        assert not said, "as a writer that was killed before its manifest leaves it"
    else:
        words = "is missing" if damage == "gone" else "is damaged: "
        assert len(said) == 1 and f"{path} {words}" in said[0] and "continuing from 000001" in said[0]
    if path.is_dir():
        path.rmdir()
    _save(two, State("abc", step=2), parameters, optimizer)
    assert sorted(os.listdir(two)) == TWO
    assert load_checkpoint(two, "abc", parameters, optimizer, said.append)[0] == State("abc", step=2)


def _refuse(patch: pytest.MonkeyPatch, name: str, number: int, times: float) -> list[str]:
    """Let the system refuse to open a file so many times; gives the list of those refusals."""
    refused: list[str] = []
    opened = os.open

    def open_(path: Any, *arguments: Any, **words: Any) -> int:
        if str(path).endswith(name) and len(refused) < times:
            refused.append(str(path))
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **words)

    patch.setattr(checkpoint_files, "PAUSE", 0.001)
    patch.setattr(os, "open", open_)
    return refused


@pytest.mark.parametrize("name", ["000002.safetensors", "000002.json"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_read_for_now_is_not_damaged(
    two: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again; if that does not help, nothing is deleted, and later the newest is there."""
    said: list[str] = []
    refused = _refuse(monkeypatch, name, number, times=2)
    state, *_ = load_checkpoint(two, "abc", *_trained(seed=0), said.append)
    assert state.step == 2 and not said and len(refused) == 2
    before = {path.name: path.read_bytes() for path in two.iterdir()}
    monkeypatch.undo()
    refused = _refuse(monkeypatch, name, number, times=float("inf"))
    with pytest.raises(RunError, match=f"{name} cannot be read") as caught:
        load_checkpoint(two, "abc", *_trained(seed=0), said.append)
    assert os.strerror(number) in str(caught.value) and "--resume" in str(caught.value)
    assert 2 <= len(refused) <= 10 and not said
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in two.iterdir()} == before
    assert load_checkpoint(two, "abc", *_trained(seed=0), said.append)[0].step == 2


def test_a_folder_that_cannot_be_listed_is_no_new_start(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checkpoint_files, "PAUSE", 0.001)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunError, match="cannot be read: Input/output error"):
        has_checkpoint(two)


def test_no_flipped_bit_of_a_manifest_passes(two: Path) -> None:
    """Each byte in turn. What may change unseen is white space: then the state is the same, exactly."""
    data = (two / "000002.json").read_bytes()
    tensors = (two / "000002.safetensors").read_bytes()
    parameters, optimizer = _trained(seed=0)
    passed = 0
    for place in range(len(data)):
        (two / "000002.json").write_bytes(_flip(data, place, place % 7))
        (two / "000002.safetensors").write_bytes(tensors)
        said: list[str] = []
        state, *_ = load_checkpoint(two, "abc", parameters, optimizer, said.append)
        assert state.step == (1 if said else 2), place
        passed += not said
    assert passed <= data.count(b" ") + data.count(b"\n")


def test_a_run_goes_on_from_the_older_generation(
    stopped: Path, tiny: Any, tmp_path: Path, watch: Callable[..., Any], largest_difference: Callable[..., float]
) -> None:
    """The newest is damaged: said, trained again from the one before, and equal to a twin without a break."""
    newest = max(RunDir(stopped).checkpoint.glob("*.safetensors"))
    newest.write_bytes(_flip(newest.read_bytes(), newest.stat().st_size - 10, 0))
    progress = watch(lambda done: None)
    result = resume(stopped, progress)
    expected = start(tiny.recipe("train.checkpoint_seconds=0", method="vpt_deep"), tmp_path / "twin")
    assert any(f"{newest} is damaged: its SHA-256 differs" in text for text in progress.said)
    assert largest_difference(result.student.trained, expected.student.trained) == 0.0


def test_with_all_generations_damaged_nothing_is_guessed(stopped: Path) -> None:
    places = sorted(RunDir(stopped).checkpoint.glob("*.safetensors"))
    for place in places:
        place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(RunError, match="no checkpoint in .* is complete") as caught:
        resume(stopped)
    assert len(places) == 2 and all(f"{place} is damaged" in str(caught.value) for place in places)
    assert "start the run again" in (caught.value.do or "")
    assert RunDir(stopped).status() == "failed"


@pytest.mark.parametrize(
    ("left", "finished"),
    [
        ((), False),
        (("000001.safetensors",), False),  # killed in the first save: the run starts from its beginning
        ((".000001.safetensors.77.tmp", ".000001.json.77.tmp"), False),
        (("000002.safetensors",), True),  # manifests were there once
        (("000001.json",), True),
        (("notes.json", "1.json", "0000001.json", "000000.json"), False),
    ],
)
def test_a_start_without_a_checkpoint_is_told_from_a_lost_one(
    tmp_path: Path, left: tuple[str, ...], finished: bool
) -> None:
    for name in left:
        (tmp_path / name).write_bytes(b"")
    assert has_checkpoint(tmp_path) is finished
    assert has_checkpoint(tmp_path / "missing") is False
    if finished:
        with pytest.raises(RunError, match="no checkpoint in .* is complete"):
            load_checkpoint(tmp_path, "abc", *_trained(seed=0), _silent)


def _forged(folder: Path, number: int = 1, *, body: dict | None = None, **state: object) -> None:
    """A manifest of whatever content, sealed as real ones are, over tensors that fit."""
    folder.mkdir(exist_ok=True)
    if not (folder / f"{number:06d}.safetensors").exists():
        (folder / f"{number:06d}.safetensors").write_bytes(save(snapshot(*_trained(seed=0))))
    data = (folder / f"{number:06d}.safetensors").read_bytes()
    content: dict = {
        "format": 1,
        "generation": number,
        "tensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "state": {**vars(State("abc")), **state},
    }
    content |= body or {}
    sealed = {**content, "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    (folder / f"{number:06d}.json").write_text(json.dumps(sealed))


def test_a_manifest_made_by_hand_is_read(tmp_path: Path) -> None:
    """What the next test forges is refused for what is wrong with it only."""
    _forged(tmp_path / "c", epoch=1, history=[{"epoch": 1, "loss": 0.5}], seconds=3)
    state, *_ = load_checkpoint(tmp_path / "c", "abc", *_trained(seed=1), _silent)
    assert state == State("abc", epoch=1, history=[{"epoch": 1, "loss": 0.5}], seconds=3)


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": -1},
        {"epoch": True},
        {"epoch": "1"},
        {"epoch": 2**52},
        {"step": 1.0},
        {"step": 10**400},
        {"seconds": None},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"accumulation": 0},
        {"digest": ["abc"]},
        {"loss_sums": {"loss": "a"}},
        {"loss_sums": {"loss": 10**400}},
        {"loss_sums": []},
        {"history": {}},
        {"history": [1]},
        {"epoch": 1, "history": [{}]},
        {"epoch": 1, "history": [{"epoch": 1, "loss": [[]]}]},
        {"another": 1},
    ],
    ids=str,
)
def test_a_state_of_a_stranger_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    _forged(tmp_path / "c", **state)
    _refused(tmp_path / "c")


@pytest.mark.parametrize(
    "body",
    [
        {"format": 2},
        {"format": None},
        {"generation": 9},
        {"generation": "../../000001"},
        {"tensors": None},
        {"tensors": []},
        {"tensors": {"bytes": 1}},
        {"tensors": {"bytes": "many", "sha256": "../../etc/passwd"}},
        {"state": None},
        {"state": []},
    ],
    ids=str,
)
def test_a_manifest_of_a_stranger_is_refused(tmp_path: Path, body: dict) -> None:
    _forged(tmp_path / "c", body=body)
    _refused(tmp_path / "c")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"sha256":' * 50_000,
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"epoch": ' + b"9" * 5000 + b"}",
        b"\0" * 99,
    ],
    ids=["deep list", "deep object", "null", "list", "not text", "long number", "zeros"],
)
def test_a_text_that_is_no_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    _forged(tmp_path / "c")
    (tmp_path / "c" / "000001.json").write_bytes(text)
    _refused(tmp_path / "c")


@pytest.mark.parametrize("name", ["000001.json", "000001.safetensors"])
def test_a_file_too_large_or_no_file_is_not_read(tmp_path: Path, name: str) -> None:
    """A terabyte without blocks on disk, and a pipe that nobody writes to: to read either would never end."""
    _forged(tmp_path / "c")
    os.truncate(tmp_path / "c" / name, 2**40)
    _refused(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    os.mkfifo(tmp_path / "c" / name)
    _refused(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer/exp_avg": torch.zeros(1)},
        {"optimizer/exp_avg/../../x": torch.zeros(1)},
        {"optimizer/exp_avg/weight": torch.zeros(3, 5)},
        {"optimizer/exp_avg/weight": torch.zeros(())},
        {"optimizer/exp_avg/weight": torch.zeros(3, 4, dtype=torch.int64)},
        {"optimizer/step/weight": torch.zeros(3, 4)},
        {"optimizer/step/weight": None},
        {"optimizer/more/weight": torch.zeros(3, 4)},
        {"parameter/weight": torch.zeros(3, 4, dtype=torch.float64)},
        {"parameter/weight": None},
        {"parameter/\x1b[31m": torch.zeros(1)},
    ],
    ids=lambda change: ",".join(f"{ascii(key)} {value is not None}" for key, value in change.items()),
)
def test_tensors_of_a_stranger_are_refused(tmp_path: Path, change: dict[str, Tensor | None]) -> None:
    tensors = {**snapshot(*_trained(seed=0)), **change}
    (tmp_path / "c").mkdir()
    data = save({name: tensor for name, tensor in tensors.items() if tensor is not None})
    (tmp_path / "c" / "000001.safetensors").write_bytes(data)
    _forged(tmp_path / "c")
    with pytest.raises(RunError, match="does not fit this model") as caught:
        load_checkpoint(tmp_path / "c", "abc", *_trained(seed=1), _silent)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [struct.pack("<Q", 2**62), struct.pack("<Q", 2) + b"{}", b"\x80\x04.", struct.pack("<Q", 3) + b"[1]"],
    ids=["huge header", "no tensors", "pickle", "a list"],
)
def test_a_file_that_is_no_tensors_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "000001.safetensors").write_bytes(data)
    _forged(tmp_path / "c")
    with pytest.raises(RunError):
        load_checkpoint(tmp_path / "c", "abc", *_trained(seed=1), _silent)


def _refused(folder: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint in .* is complete[\\s\\S]*is damaged"):
        load_checkpoint(folder, "abc", *_trained(seed=1), _silent)


def test_the_file_holds_what_is_trained_and_no_backbone(stopped: Path) -> None:
    """Read without safetensors: eight bytes of header length, then JSON."""
    data = max(RunDir(stopped).checkpoint.glob("*.safetensors")).read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    names = {name.split("/")[-1] for name in header if name != "__metadata__"}
    assert names == {"remap_prompts.prompts", "head.weight", "head.bias"}


def test_a_disk_that_refuses_everything_still_gives_the_first_message(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any]
) -> None:
    def refuse(path: Path, data: bytes, **_: Any) -> None:
        raise RunError(f"cannot write {path}: Input/output error")

    def fill(done: int) -> None:
        monkeypatch.setattr(atomic_write, "write_bytes", refuse)
        monkeypatch.setattr("remap.engine.checkpoint_files.write_bytes", refuse)

    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl"):  # the first thing that must be written
        start(tiny.recipe("train.checkpoint_seconds=0"), tmp_path / "run", watch(fill))
    assert RunDir(tmp_path / "run").status() == "running", "the last status that could be written"


@pytest.mark.parametrize("by", ["save", "load"])
def test_what_a_killed_writer_left_is_swept_away(two: Path, by: str) -> None:
    strays = (".000003.safetensors.99999.tmp", ".000003.json.99999.tmp", "000003.safetensors", "000000.safetensors")
    others = ("notes.txt", "best.safetensors", ".000003.safetensors", "000003.safetensors.99999.tmp")
    for name in (*strays, *others):
        (two / name).write_bytes(b"half a checkpoint")
    (two / "000000.json").write_bytes(b"")
    if by == "save":
        _save(two, State("abc", step=3), *_trained(seed=3))
        left = ["000002.json", "000002.safetensors", "000003.json", "000003.safetensors"]
    else:
        load_checkpoint(two, "abc", *_trained(seed=0), _silent)
        left = TWO
    assert sorted(os.listdir(two)) == sorted([*left, *others]), "and what is not ours stays"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_never_written(two: Path, value: float) -> None:
    before = {name: (two / name).read_bytes() for name in TWO}
    parameters, optimizer = _trained(seed=3)
    tensors = snapshot(parameters, optimizer)
    broken = tensors["optimizer/exp_avg/weight"].clone()
    broken[1, 2] = value
    with pytest.raises(TrainingError, match="optimizer/exp_avg/weight"):
        save_checkpoint(two, State("abc", step=3), {**tensors, "optimizer/exp_avg/weight": broken})
    with pytest.raises(TrainingError, match="seconds"):
        save_checkpoint(two, State("abc", step=3, seconds=value), tensors)
    with pytest.raises(TrainingError, match="loss_sums"):
        save_checkpoint(two, State("abc", step=3, loss_sums={"loss": value}), tensors)
    assert {name: (two / name).read_bytes() for name in sorted(os.listdir(two))} == before


def test_a_snapshot_names_what_it_holds() -> None:
    parameters, optimizer = _trained(seed=0)
    tensors = snapshot(parameters, optimizer, {"score": torch.ones(2)})
    moments = {f"optimizer/{key}/{name}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(tensors) == {"parameter/weight", "parameter/bias", "memory/score", *moments}
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_old_generations_go_when_new_ones_come(tmp_path: Path) -> None:
    parameters, optimizer = _trained(seed=0)
    for step in range(12):
        _save(tmp_path, State("abc", step=step), parameters, optimizer)
    assert sorted(os.listdir(tmp_path)) == sorted(
        f"{number:06d}.{kind}" for number in (11, 12) for kind in ("json", "safetensors")
    )
    assert set(load_file(tmp_path / "000012.safetensors")) == set(snapshot(parameters, optimizer))


def _save(
    folder: Path,
    state: State,
    trained: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    memory: dict[str, Tensor] | None = None,
) -> None:
    save_checkpoint(folder, state, snapshot(trained, optimizer, memory))


def _silent(text: str) -> None:
    raise AssertionError(f"nothing was to be said: {text}")


def _trained(seed: int, steps: int = 2) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(seed)
    parameters = {"weight": torch.nn.Parameter(torch.randn(3, 4)), "bias": torch.nn.Parameter(torch.randn(3))}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    for _ in range(steps):
        sum((p**2).sum() for p in parameters.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer
