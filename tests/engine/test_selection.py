"""Which epoch is the result: the best by held-out training images, early stopping, running averages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remap.data.sources import open_data
from remap.engine.selection import best_epoch, is_over
from remap.engine.state import State
from remap.errors import RecipeError
from remap.pipeline.run import resume, start
from remap.progress import Silent
from remap.recipe.schema import TrainSpec
from remap.runs.summary_schema import choice_in_words
from remap.runs.task import load_task


def state(*values: float | None) -> State:
    """A state after one epoch for each value; None is an epoch without an evaluation."""
    records = [{"epoch": n, **({} if v is None else {"selection": v})} for n, v in enumerate(values, 1)]
    return State("abc", epoch=len(values), history=records)


@pytest.mark.parametrize(
    ("values", "metric", "best"),
    [
        ((0.5, 0.9, 0.7), "accuracy", 2),
        ((0.9, 0.5, 0.9), "accuracy", 1),  # of equal ones the first
        ((0.9, 0.5, 0.7), "loss", 2),
        ((None, 0.2, None, 0.3), "f1", 4),
        ((None,), "accuracy", 0),
    ],
)
def test_the_best_epoch(values: tuple, metric: str, best: int) -> None:
    assert best_epoch(state(*values).history, metric) == best


def test_training_stops_after_patience_epochs_without_a_better_one() -> None:
    """The best of 9 planned epochs is the second; with a patience of 2 the fourth is the last."""
    values, spec = (0.1, 0.9, 0.8, 0.9, 0.95), TrainSpec(epochs=9, patience=2)
    assert [is_over(state(*values[:n]), spec) for n in range(6)] == [False, False, False, False, True, False]
    rare = TrainSpec(epochs=9, patience=2, eval_every=3)
    values = (None, None, 0.9, None, None, 0.8)
    assert [is_over(state(*values[:n]), rare) for n in range(7)] == [False] * 6 + [True]
    assert is_over(state(*[0.1] * 9), TrainSpec(epochs=9)) and not is_over(state(*[0.1] * 8), TrainSpec(epochs=9))


def test_selection_images_are_training_images(tiny: Any) -> None:
    whole, part = (open_data(tiny.data, None, 0.2, selection=share) for share in (None, 0.25))
    assert sorted([*part.train.names, *part.selection.names]) == sorted(whole.train.names)
    assert part.val.names == whole.val.names and len(part.selection) == 6
    both = open_data(tiny.data, None, 0.2, held_out=0.25, selection=0.25)
    parts = [set(split.names) for split in (both.train, both.val, both.selection)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 24


@pytest.fixture(scope="module")
def chosen(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A rate that soon spoils the student, so that the best epoch is not the last, and patience ends the run."""
    settings = ("train.keep=best", "train.patience=2", "train.epochs=12", "train.lr=0.3", "data.selection=0.4")
    run = tmp_path_factory.mktemp("chosen") / "run"
    return run, dict(start(tiny.recipe(*settings, method="full", losses="ce", teacher=None), run).summary)


def test_the_best_epoch_is_the_result(chosen: tuple[Path, dict[str, Any]], tiny: Any, tmp_path: Path) -> None:
    """Source: the same run without patience, ended after the best epoch: it trains with the same schedule."""
    run, summary = chosen
    choice, history = summary["choice"], [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [record["selection"] for record in history]
    best = values.index(max(values)) + 1
    assert (choice["best_epoch"], choice["kept_epoch"], choice["epochs_trained"]) == (best, best, best + 2)
    assert best + 2 == len(history) < 12 and choice["images"] == 10
    assert summary["student"]["accuracy"] == history[best - 1]["accuracy"]
    assert choice_in_words(summary) == (
        f"best epoch {best} of {best + 2} by accuracy on 10 held-out training images ({max(values):.1%});"
        " stopped early, 12 epochs were planned"
    )


@pytest.mark.parametrize("ema", [None, 0.7])
def test_what_is_kept_is_the_student_of_that_epoch(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    """Source: the tensors that were evaluated after each epoch, copied there; an average also by hand in float64."""
    from remap.pipeline import epoch_recorder

    evaluated, steps = [], []
    evaluate, step = epoch_recorder.EpochRecorder.after_epoch, torch.optim.AdamW.step

    def after_epoch(recorder: Any) -> dict[str, float]:
        tensors = recorder.components.student.trained
        evaluated.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
        return evaluate(recorder)

    def stepping(optimizer: torch.optim.AdamW) -> None:
        step(optimizer)
        steps.append([p.detach().double() for group in optimizer.param_groups for p in group["params"]])

    monkeypatch.setattr(epoch_recorder.EpochRecorder, "after_epoch", after_epoch)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    settings = ("train.keep=best", "train.epochs=4", "train.lr=0.2", "train.metric=loss", f"train.ema={ema or 'null'}")
    recipe = tiny.recipe(*settings, method="linear", losses="ce", teacher=None)
    result = start(recipe, tmp_path / "run")
    kept = evaluated[result.summary["choice"]["kept_epoch"] - 1]
    loaded, _ = load_task(tmp_path / "run")
    for name, tensor in kept.items():
        assert torch.equal(result.student.trained[name], tensor) and torch.equal(loaded.trained[name], tensor), name
    if ema is not None:
        assert len(steps) == 8 and result.summary["ema"] == 0.7


def test_an_average_is_the_result(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: a = d a + (1 - d) p after each step in float64, d = min(0.7, (1 + n) / (10 + n)), from the first p on."""
    student, averages = [], {}

    from remap.engine.average import Average

    follow = Average.follow

    def following(average: Average, update: int) -> None:
        if not averages:
            averages.update({n: a.double().clone() for n, (a, _) in enumerate(average.pairs)})
        follow(average, update)
        decay = min(0.7, (1 + update) / (10 + update))
        for number, (_, current) in enumerate(average.pairs):
            averages[number] = decay * averages[number] + (1 - decay) * current.detach().double()
        student[:] = [current for _, current in average.pairs]

    monkeypatch.setattr(Average, "follow", following)
    result = start(tiny.recipe("train.ema=0.7", losses="ce", teacher=None), tmp_path / "run")
    assert len(averages) == len(result.student.tensors) > 0
    for number, tensor in enumerate(student):
        torch.testing.assert_close(tensor.detach().double(), averages[number], rtol=1e-5, atol=1e-6)


def test_a_run_with_all_of_it_goes_on_to_the_same_bits(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], history: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: the undisturbed run. Stopped in an epoch, at the end of one, and after the last before it was written."""
    settings = (
        *("train.keep=best", "train.patience=2", "train.epochs=12", "train.lr=0.3", "data.selection=0.4"),
        *("train.ema=0.5", "train.class_weight_power=0.5", "train.class_weight_by=sampling", "train.batch_size=5"),
        *("train.optimizer=nadamw", "data.augment=strong", "train.checkpoint_blocks=true"),
    )
    recipe = tiny.recipe(*settings, "train.checkpoint_seconds=0", method="full", losses="ce", teacher=None)
    whole = start(recipe, tmp_path / "whole")
    trained = whole.summary["choice"]["epochs_trained"]
    assert trained < 12 and whole.summary["choice"]["kept_epoch"] == trained - 2

    def crash(at: int) -> Callable[[int], None]:
        def after_step(done: int) -> None:
            if done == at:
                raise RuntimeError("power cut")

        return after_step

    def unwritten(*_args: object) -> None:
        raise RuntimeError("power cut")

    for at in (2 * trained - 1, 2 * trained, None):  # 14 images, two steps of 5 an epoch
        run = tmp_path / f"{at}"
        with pytest.raises(RuntimeError, match="power cut"), monkeypatch.context() as patch:
            if at is None:
                patch.setattr("remap.pipeline.run.write_results", unwritten)
            start(recipe, run, Silent() if at is None else watch(crash(at)))
        again = resume(run)
        assert history(run) == history(tmp_path / "whole") and again.summary["choice"] == whole.summary["choice"]
        files = [folder / "task" / "task.safetensors" for folder in (run, tmp_path / "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert again.summary["student"]["accuracy"] == whole.summary["student"]["accuracy"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.selection=0.2"], "data.selection: nothing is chosen"),
        (["train.metric=f1"], "train.metric: nothing is chosen"),
        (["train.keep=first"], "train.keep"),
        (["train.ema=1"], "train.ema"),
    ],
)
def test_mistakes_are_said(tiny: Any, settings: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        tiny.recipe(*settings)


def test_what_is_evaluated_decides_only_where_it_chooses(tiny: Any) -> None:
    """eval_every changes the epochs to choose among, and no result otherwise."""
    rare = "train.eval_every=2"
    assert tiny.recipe(rare).digest() == tiny.recipe().digest()
    assert tiny.recipe(rare, "train.keep=best").digest() != tiny.recipe("train.keep=best").digest()
    fade = "teacher.overtaken=fade"
    assert tiny.recipe(rare, fade).digest() != tiny.recipe(fade).digest()
    assert tiny.recipe("train.keep=best").data.selection == 0.1
