"""What methods, teachers and crashes add to resuming. The expected values are the undisturbed run's.

Every step of a run with all that is random in it: tests/reliability/test_exact_resume.py.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from remap.errors import Interrupted, MissingData, RunError
from remap.pipeline.run import Result, resume, start
from remap.recipe import Recipe
from remap.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

LAST_STEP = 6

# Memory from step to step of a method or a loss: projectors, batch statistics, places chosen from images before the
# first step, ranks and prompts dropped on the way.
RUNS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "full": (
        ("data.augment=shift", "losses=[{name: ce}, {name: feature, projector: orthogonal}]"),
        {"method": "full"},
    ),
    "mlp": (("data.augment=shift",), {"method": "mlp", "losses": "ce"}),
    "gps": ((), {"method": "gps", "losses": "ce"}),
    "adalora": ((), {"method": "adalora", "losses": "ce,kd"}),
    "e2vpt": (("method.prune_tokens=0.3", "method.prune_segments=0.2"), {"method": "e2vpt", "losses": "ce"}),
}


@pytest.fixture(scope="module", params=sorted(RUNS))
def recipe(request: pytest.FixtureRequest, tiny: Any) -> Recipe:
    settings, words = RUNS[request.param]
    return tiny.recipe(*settings, **words)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return start(recipe, tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_signal_changes_nothing(
    recipe: Recipe,
    undisturbed: Result,
    step: int,
    tmp_path: Path,
    watch: Callable[..., Any],
    largest_difference: Callable[..., float],
    history: Callable[[Path], list[dict]],
) -> None:
    """Step 3 is the end of an epoch, the others lie inside one."""

    def stop(done: int) -> None:
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        start(recipe, tmp_path / "run", watch(stop))
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert str(tmp_path / "run") in (caught.value.do or "")
    assert RunDir(tmp_path / "run").status() == "stopped"
    steps = watch(lambda done: None)
    result = resume(tmp_path / "run", steps)
    assert steps.steps == LAST_STEP - step, "steps were done twice or left out"
    assert largest_difference(result.student.tensors, undisturbed.student.tensors) == 0.0
    assert history(tmp_path / "run") == history(undisturbed.run_dir)
    assert RunDir(tmp_path / "run").status() == "done"


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_crash_goes_on_from_the_last_checkpoint(
    tiny: Any,
    step: int,
    tmp_path: Path,
    watch: Callable[..., Any],
    largest_difference: Callable[..., float],
) -> None:
    """A bug or a killed process saves nothing at the end: what counts is the checkpoint before."""

    def crash(done: int) -> None:
        if done == step:
            raise RuntimeError("power cut")

    recipe = tiny.recipe("train.checkpoint_seconds=0", "data.augment=shift_flip")
    expected = start(recipe, tmp_path / "twin")
    with pytest.raises(RuntimeError, match="power cut"):
        start(recipe, tmp_path / "run", watch(crash))
    assert RunDir(tmp_path / "run").status() == "failed"
    steps = watch(lambda done: None)
    result = resume(tmp_path / "run", steps)
    assert steps.steps == LAST_STEP - (step - 1), "the crashed step is done again, the ones before are not"
    assert largest_difference(result.student.trained, expected.student.trained) == 0.0


@pytest.mark.parametrize("killed", [False, True])
def test_the_time_of_a_run_is_that_of_all_its_parts(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], killed: bool
) -> None:
    """Sources: a sleep in training, which the checkpoint counts, and a figure written into the record by hand."""

    def stop(done: int) -> None:
        if done == 2:
            time.sleep(1.5)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start(tiny.recipe(), tmp_path / "run", watch(stop))
    path = tmp_path / "run" / "status.json"
    noted = json.loads(path.read_text())
    assert 1.5 < noted["seconds"] < 600
    path.write_text(json.dumps(noted | {"seconds": 0.0 if killed else 5000.0}))
    summary = resume(tmp_path / "run").summary
    assert 1.5 < summary["train_seconds"] <= summary["seconds"]
    assert (summary["seconds"] > 5000) != killed and summary["seconds"] < 5600
    assert json.loads(path.read_text())["seconds"] == summary["seconds"]


def test_a_finished_run_is_not_trained_again(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    first = start(tiny.recipe(), tmp_path / "run")
    steps = watch(lambda done: None)
    again = resume(tmp_path / "run", steps)
    assert steps.steps == 0 and again.summary == first.summary


def test_interrupting_a_teacher_in_preparation_names_the_whole_run(
    tiny: Any,
    tmp_path: Path,
    watch: Callable[..., Any],
    largest_difference: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tuned teacher is a run inside the run: going on with it alone would leave the student untrained."""
    recipe = tiny.recipe("teacher.prepare=adaptformer", "teacher.epochs=2")
    expected = start(recipe, tmp_path / "twin")
    monkeypatch.setenv("REMAP_CACHE", str(tmp_path / "cache"))  # or the teacher would be that of the first run

    def stop(done: int) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        start(recipe, tmp_path / "run", watch(stop))
    assert caught.value.exit_code == 130
    assert (caught.value.do or "").endswith(f"remap distill --resume {tmp_path / 'run'}")
    steps = watch(lambda done: None)
    result = resume(tmp_path / "run", steps)
    assert steps.steps == (LAST_STEP - 2) + LAST_STEP
    assert largest_difference(result.student.trained, expected.student.trained) == 0.0


def test_a_file_replaced_by_another_of_equal_name_and_size_is_noticed(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    """Two images of a class change places: names, labels, sizes and even the set of contents stay."""
    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    files = [data / "train" / "red" / name for name in ("00.png", "01.png")]
    one, other = (file.read_bytes() for file in files)
    length = max(len(one), len(other))
    one, other = one.ljust(length, b"\0"), other.ljust(length, b"\0")  # decoders ignore what follows an image
    for file, content in zip(files, (one, other), strict=True):
        file.write_bytes(content)

    def stop(done: int) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start(tiny.recipe(data=str(data)), tmp_path / "run", watch(stop))
    for file, content in zip(files, (other, one), strict=True):
        file.write_bytes(content)
    steps = watch(lambda done: None)
    with pytest.raises(RunError, match="the images are not those that the run"):
        resume(tmp_path / "run", steps)
    assert steps.steps == 0
    for file, content in zip(files, (one, other), strict=True):
        file.write_bytes(content)
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(MissingData, match="recipe.yaml names their path"):
        resume(tmp_path / "run", steps)
    (tmp_path / "elsewhere").rename(data)
    resume(tmp_path / "run", steps)
    assert steps.steps == LAST_STEP - 2


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_other_weights_of_a_model_are_noticed(tiny: Any, tmp_path: Path, watch: Callable[..., Any], which: str) -> None:
    """One number of a frozen matrix changes while the run is stopped; it would end in another student."""
    folder = tmp_path / which
    shutil.copytree(getattr(tiny, which).removeprefix("local-dir:"), folder)

    def stop(done: int) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start(tiny.recipe(**{which: f"local-dir:{folder}"}), tmp_path / "run", watch(stop))
    weights = load_file(folder / "model.safetensors")
    weights["blocks.0.attn.qkv.weight"][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(RunError, match="their weights differ|belongs to another backbone"):
        resume(tmp_path / "run")
