"""A teacher that its student has overtaken loses weight, for good, and the run says so."""

import json
import signal
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from remap.engine.job import Job
from remap.engine.overtaken import compare_with_teachers, share_left
from remap.engine.state import State
from remap.errors import Interrupted, RecipeError
from remap.pipeline.run import resume, start

# A teacher that is not tuned at all.
WEAK = ("teacher.overtaken=fade", "teacher.prepare=bitfit", "teacher.epochs=1", "teacher.lr=1e-9")
WORDS = {"losses": "ce,kd", "method": "full"}


def test_the_share_falls_over_two_standard_errors() -> None:
    """Of two shares of 0.5 and 0.8 of 100 images: sqrt((0.25 + 0.16) / 100)."""
    error = sqrt(0.0041)
    assert share_left(0.5, 0.8, 100) == share_left(0.8, 0.8, 100) == 1.0
    assert share_left(0.8, 0.5, 100) == 0.0
    teacher = 0.8 - error
    expected = 1 - error / (2 * sqrt((0.16 + teacher * (1 - teacher)) / 100))
    assert share_left(0.8, teacher, 100) == pytest.approx(expected)
    assert share_left(1.0, 0.0, 100) == 0.0  # where the standard error is 0


def test_it_gets_nothing_back_and_each_loss_is_said() -> None:
    said: list[str] = []
    job = SimpleNamespace(
        may_be_overtaken={0: 0.8, 1: 0.9}, evaluation_images=100, progress=SimpleNamespace(say=said.append)
    )
    state = State("")
    for epoch, accuracy in enumerate((0.7, 0.82, 0.81, 0.95)):
        compare_with_teachers(cast(Job, job), state, accuracy, epoch)
    assert state.teacher_shares["0"] == 0.0 and 0.0 < state.teacher_shares["1"] < 1.0
    assert state.overtaken == {"0": 1, "1": 3}
    assert len(said) == 3 and "80.0% against 82.0%" in said[0] and said[1].endswith("count no more")


def test_a_run_records_the_weight_that_is_left(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], largest_difference: Callable[..., float]
) -> None:
    """It is resumed, from the 13th of 18 steps after the teacher's 3, to the same bits."""
    recipe = tiny.recipe(*WEAK, "teacher.allow_weak=true", "train.epochs=6", **WORDS)

    def interrupt(step: int) -> None:
        if step == 3 + 13:
            signal.raise_signal(signal.SIGTERM)

    result = start(recipe, tmp_path / "run")
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "stopped", watch(interrupt))
    resumed = resume(tmp_path / "stopped")
    assert largest_difference(resumed.student.tensors, result.student.tensors) == 0.0
    assert resumed.summary["teacher"] == result.summary["teacher"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    teacher = result.summary["teacher"]
    assert teacher["weight_left"] < 1.0 and teacher["overtaken"] < 6
    assert rows[-1]["kd.weight"] < 1.0 and "kd.weight" not in result.summary["final_losses"]
    for row in rows:  # cross-entropy, and the divergence times what was left in that epoch
        assert row["loss"] == pytest.approx(row["ce"] + row.get("kd.weight", 1.0) * row["kd"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"losses": "kd"}, "nothing would be left to learn"),
        ({"losses": "ce,feature"}, "no loss reads logits"),
        ({"teacher": "ema"}, "made of the student"),
    ],
)
def test_what_cannot_fade_is_refused(tiny: Any, words: dict[str, str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        tiny.recipe("teacher.overtaken=fade", **words)
