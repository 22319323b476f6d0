"""A run that was stopped and went on is the run that was not. Expected values: the undisturbed run's, bit for bit."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remap.engine.teacher import Teacher
from remap.errors import Interrupted
from remap.pipeline.run import Result, resume, start
from remap.progress import Step
from remap.recipe import Recipe

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "workers" / "resumed.py"
IMAGES, EPOCHS, STEPS = 24, 3, 4
LAST = EPOCHS * STEPS
# Decoded anew for every batch, so that workers have something to do in every step.
SETTINGS = (f"train.epochs={EPOCHS}", f"train.batch_size={IMAGES // STEPS}", "data.memory_gib=0")
# The tiny student has dropout (0.1) and drop-path (0.2) in its own blocks; what is inserted has dropout of its own.
# With one data worker and with two: what a worker read ahead is thrown away at a stop, whatever the recipe is.
RECIPES: dict[str, tuple[tuple[str, ...], dict[str, str], int]] = {
    # Of 24 images 7 choose the epoch, so that 17 make four steps of 4; patience would end the run with its last epoch.
    "mixed images, an average as the second teacher and as the result, the best epoch, accumulation": (
        (
            *("data.augment=strong", "data.mixup=0.8", "data.cutmix=1.0", "train.accumulation=2"),
            *("train.ema=0.9", "train.keep=best", "train.patience=2", "data.selection=0.3", "train.batch_size=4"),
        ),
        {"method": "full", "losses": "ce,kd,feature", "teacher": "{teacher},ema:0.5"},
        1,
    ),
    "teacher outputs kept on disk, a closed list of views": (
        ("data.augment=strong", "data.views=2", "teacher.cache=disk", "method.adaptformer.dropout=0.1"),
        {"method": "vpt_deep+adaptformer+lora", "losses": "ce,kd,attention"},
        2,
    ),
}


class Losses:
    """A progress reporter that keeps the loss of each step and may call back after it."""

    def __init__(self, after_step: Callable[[int], None] = lambda done: None) -> None:
        self.after_step, self.values = after_step, list[float]()

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        yield _Steps(self, what.startswith("epoch "))


class _Steps:
    def __init__(self, losses: Losses, training: bool) -> None:
        self.losses, self.training = losses, training

    def advance(self, amount: int = 1, **values: float) -> None:
        if self.training and values and amount:
            self.losses.values.append(values["loss"])
            self.losses.after_step(len(self.losses.values))


def stop_after(step: int) -> Losses:
    return Losses(lambda done: signal.raise_signal(signal.SIGTERM) if done == step else None)


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest, tiny: Any) -> Recipe:
    settings, words, workers = RECIPES[request.param]
    filled = {name: word.format(teacher=tiny.teacher) for name, word in words.items()}
    return tiny.recipe(*SETTINGS, "teacher.allow_weak=true", f"data.workers={workers}", *settings, **filled)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[float]]:
    losses = Losses()
    result = start(recipe, tmp_path_factory.mktemp("undisturbed") / "run", losses)
    assert len(losses.values) == LAST and len(set(losses.values)) == LAST
    return result, losses.values


@pytest.mark.guarantee(1)
def test_a_run_goes_on_from_every_step_to_the_same_bits(
    recipe: Recipe,
    undisturbed: tuple[Result, list[float]],
    tmp_path: Path,
    largest_difference: Callable[..., float],
    history: Callable[[Path], list[dict]],
    figure: Callable[..., None],
) -> None:
    expected, losses = undisturbed
    differences = []
    for step in range(1, LAST + 1):
        run, before, after = tmp_path / str(step), stop_after(step), Losses()
        with pytest.raises(Interrupted):
            start(recipe, run, before)
        result = resume(run, after)
        assert before.values == losses[:step] and after.values == losses[step:], f"stopped after step {step}"
        assert history(run) == history(expected.run_dir)
        differences.append(largest_difference(result.student.tensors, expected.student.tensors))
        assert (run / "task" / "task.safetensors").read_bytes() == (
            expected.run_dir / "task" / "task.safetensors"
        ).read_bytes()
    assert differences == [0.0] * LAST
    figure("resume points that end bit-identical", LAST, LAST)
    figure("largest difference of weights", max(differences))


def each_image_once(steps: list[list[int]]) -> int:
    """Epochs that saw each image once, of the indices of all steps in order."""
    epochs = [sum(steps[at : at + STEPS], []) for at in range(0, len(steps), STEPS)]
    return sum(sorted(epoch) == list(range(IMAGES)) for epoch in epochs)


@pytest.mark.guarantee(2)
def test_each_image_is_used_once_an_epoch_across_resumes(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    """A batch is used when the teacher is asked about it; what was read ahead and thrown away does not count."""
    used: list[list[int]] = []
    targets = Teacher.targets

    def noting(teacher: Teacher, images: Any, indices: np.ndarray, view: int) -> Any:
        used.append(indices.tolist())
        return targets(teacher, images, indices, view)

    monkeypatch.setattr(Teacher, "targets", noting)
    seen = 0
    for step in (1, 3, 4, 6, 11):  # 4 is the end of an epoch
        used.clear()
        with pytest.raises(Interrupted):
            start(tiny.recipe(*SETTINGS, "data.augment=shift"), tmp_path / str(step), stop_after(step))
        assert len(used) == step
        resume(tmp_path / str(step))
        assert len(used) == LAST
        seen += each_image_once(used)
    assert seen == 5 * EPOCHS
    figure("epochs across a resume in one process that used each image once", seen, 5 * EPOCHS)


@pytest.mark.guarantee(2)
def test_two_processes_share_each_epoch_out_across_resumes(
    tiny: Any, tmp_path: Path, fork_command: Callable[..., Any], figure: Callable[..., None]
) -> None:
    """Stopped in the second step of the first epoch and in the third of the second, by a signal to one of the two."""
    settings = (*tiny.SETTINGS, *SETTINGS, "data.augment=shift")
    arguments = json.dumps([tiny.words(), settings, [2, 7], str(tmp_path)])
    fork_command(str(WORKER), arguments, count=2).end()
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["went_on"] for rank in ranks] == [2, 2]
    assert all(len(own) == IMAGES // STEPS // 2 for rank in ranks for own in rank["used"])
    steps = [first + second for first, second in zip(ranks[0]["used"], ranks[1]["used"], strict=True)]
    assert len(steps) == LAST and each_image_once(steps) == EPOCHS
    figure("epochs across resumes in two processes that used each image once", EPOCHS, EPOCHS)
