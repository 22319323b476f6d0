"""Reading the numbers of a step late, as on a GPU: on the CPU, where the device has nothing left to do. Expected values
are those of runs whose host reads every step at once."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from remap.engine import late, loop
from remap.errors import Interrupted, TrainingError
from remap.pipeline.run import resume, start
from remap.remapping.objective import Objective
from remap.runs.run_dir import RunDir

ALWAYS, NEVER = "train.checkpoint_seconds=0", "train.checkpoint_seconds=1000"


@pytest.fixture
def reads_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "DEVICES", ("cpu",))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Make the loss NaN in some updates (from 0); a resumed run goes on with the same updates."""

    def install(updates: set[int]) -> None:
        forward, attempt, now = Objective.forward, loop.forward_backward, [0]

        def poisoned(objective: Objective, *rest: Any) -> Any:
            total, parts = forward(objective, *rest)
            return (total * float("nan") if now[0] in updates else total), parts

        def counted(training: Any, update: int) -> Any:
            now[0] = update
            return attempt(training, update)

        monkeypatch.setattr(Objective, "forward", poisoned)
        monkeypatch.setattr(loop, "forward_backward", counted)

    return install


def recipe_of(tiny: Any, *settings: str) -> Any:
    return tiny.recipe(*settings, method="lora", losses="ce", teacher=None)


def tensors_of(run: Path) -> bytes:
    return (RunDir(run).task / "task.safetensors").read_bytes()


def test_a_late_host_changes_nothing(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    history: Callable[[Path], list[dict]],
) -> None:
    """Weights, losses of each epoch, and what a callback hears: every step once, in order."""

    class Heard:
        def __init__(self) -> None:
            self.steps = list[tuple[int, float]]()

        def on_step(self, step: int, values: Any) -> None:
            self.steps.append((step, values["loss"]))

        def on_epoch(self, step: int, record: Any) -> None: ...

        def on_end(self, summary: Any) -> None: ...

    at_once, later = Heard(), Heard()
    start(recipe_of(tiny, NEVER), tmp_path / "at_once", callbacks=[at_once])
    monkeypatch.setattr(late, "DEVICES", ("cpu",))
    start(recipe_of(tiny, NEVER), tmp_path / "later", callbacks=[later])
    assert tensors_of(tmp_path / "later") == tensors_of(tmp_path / "at_once")
    assert history(tmp_path / "later") == history(tmp_path / "at_once")
    assert later.steps == at_once.steps and [step for step, _ in later.steps] == list(range(1, 7))


def test_the_device_leaves_out_a_step_that_is_not_finite(
    tiny: Any, tmp_path: Path, reads_late: None, poison: Callable[[set[int]], None], watch: Callable[..., Any]
) -> None:
    """One bad step: weights and moments are those of a host that reads at once, which never called the optimiser."""
    poison({1})
    progress = watch(lambda done: None)
    result = start(recipe_of(tiny, NEVER), tmp_path / "later", progress)
    assert result.summary["faults"] == {"skipped_steps": 1, "learning_rate_factor": 1.0, "accumulation": 1}
    assert [line for line in progress.said if "epoch 1, step 2" in line and "the step is skipped" in line]
    late.DEVICES = ()
    start(recipe_of(tiny, NEVER), tmp_path / "at_once")
    assert tensors_of(tmp_path / "later") == tensors_of(tmp_path / "at_once")


def test_what_a_method_does_at_a_step_is_done_where_the_step_is_left_out(
    tiny: Any, tmp_path: Path, poison: Callable[[set[int]], None]
) -> None:
    """Half of six steps is the third: half of four tokens go then, whether it is finite or not."""
    poison({2})
    settings = ("method.num_prompts=4", "method.prune_tokens=0.5", "method.prune_at=0.5")
    recipe = tiny.recipe(*settings, method="e2vpt", losses="ce", teacher=None)
    assert start(recipe, tmp_path / "run").summary["faults"]["skipped_steps"] == 1
    mask_p = load_file(RunDir(tmp_path / "run").task / "task.safetensors")["remap_prompts.token_mask"]
    assert sorted(mask_p.tolist()) == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.slow
def test_where_checkpoints_are_written_decides_no_bit(
    tiny: Any, tmp_path: Path, reads_late: None, poison: Callable[[set[int]], None], watch: Callable[..., Any]
) -> None:
    """Two bad steps in a row halve the learning rate. A checkpoint right after them, or a signal, makes the host read
    at once. Source: the run without either."""
    poison({1, 2, 4})
    settings = ("train.epochs=3", "data.augment=shift")
    whole = start(recipe_of(tiny, NEVER, *settings), tmp_path / "whole")
    assert whole.summary["faults"]["learning_rate_factor"] == 0.25
    start(recipe_of(tiny, ALWAYS, *settings), tmp_path / "often")
    assert tensors_of(tmp_path / "often") == tensors_of(tmp_path / "whole")
    for step in (1, 2, 3, 4, 5):
        run = tmp_path / str(step)
        with pytest.raises(Interrupted):
            at_step = watch(lambda done, step=step: signal.raise_signal(signal.SIGTERM) if done == step else None)
            start(recipe_of(tiny, NEVER, *settings), run, at_step)
        resume(run)
        assert tensors_of(run) == tensors_of(tmp_path / "whole"), step


@pytest.mark.slow
def test_weights_that_broke_and_a_run_that_stays_bad(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reads_late: None,
    poison: Callable[[set[int]], None],
    watch: Callable[..., Any],
) -> None:
    progress, step, calls = watch(lambda done: None), torch.optim.AdamW.step, [0]

    def overflow(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        found = step(optimizer, *args)
        calls[0] += 1
        if calls[0] == 2:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(float("inf"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        result = start(recipe_of(tiny, ALWAYS), tmp_path / "run", progress)
    assert [line for line in progress.said if line.startswith("back to the checkpoint of epoch 1, step 1")]
    assert all(bool(tensor.isfinite().all()) for tensor in result.student.trained.values())
    poison(set(range(2, 100)))
    with pytest.raises(TrainingError, match="not finite in epoch 2, step 3"):
        start(recipe_of(tiny, NEVER), tmp_path / "bad")


def test_no_step_after_going_back_has_the_earlier_rate(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads_late: None
) -> None:
    """The weights break in the second step, twice: each time the run begins again at half the rate. Source: the rates
    of a run in which nothing breaks."""
    rates, calls = list[float](), [0]
    step, set_rate = torch.optim.AdamW.step, loop.set_learning_rate

    def overflow(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        found = step(optimizer, *args)
        calls[0] += 1
        if calls[0] in (2, 5):  # each way back is three steps later
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(float("inf"))
        return found

    monkeypatch.setattr(
        loop, "set_learning_rate", lambda optimizer, rate: rates.append(rate) or set_rate(optimizer, rate)
    )
    start(recipe_of(tiny, NEVER), tmp_path / "undisturbed")
    undisturbed = rates.copy()
    rates.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        result = start(recipe_of(tiny, NEVER), tmp_path / "run")
    assert result.summary["faults"]["learning_rate_factor"] == 0.25
    factors = [1.0] * 3 + [0.5] * 3 + [0.25] * 6
    begun = undisturbed[:3] * 2 + undisturbed
    assert rates == pytest.approx([rate * factor for rate, factor in zip(begun, factors, strict=True)], rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("train.ema=0.9",), {}),
        (("train.optimizer=sgd",), {}),
        (("train.accumulation=1",), {"method": "adalora"}),
        ((), {"teacher": "ema", "losses": "ce,kd"}),
    ],
)
def test_the_host_reads_at_once_where_more_follows_an_update(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads_late: None, settings: tuple, words: dict
) -> None:
    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("the optimiser alone decides here")

    monkeypatch.setattr(loop, "step_if_finite", refuse)
    given = {"method": "lora", "losses": "ce", "teacher": None, **words}
    start(
        tiny.recipe("train.epochs=1", "teacher.allow_weak=true" if given["teacher"] else NEVER, *settings, **given),
        tmp_path / "run",
    )
