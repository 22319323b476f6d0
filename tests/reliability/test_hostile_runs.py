"""Run directories of strangers: links that lead out of them, records that are JSON and nonsense, states that are none.

What is expected stands in SECURITY.md: nothing is written or deleted elsewhere, and bad input is one message.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.errors import RunError
from remap.pipeline.compare import compare
from remap.pipeline.repeat import repeat
from remap.pipeline.run import resume, start
from remap.progress import Silent
from remap.runs.run_dir import RunDir
from remap.runs.summary_schema import summary_problem

HUGE = 10**400
Change = Callable[[dict], object]


@pytest.fixture(scope="module")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tiny.recipe(), tmp_path_factory.mktemp("hostile") / "run").run_dir


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of somebody who goes on with a stranger's run: a task and a checkpoint of his own."""
    folder = tmp_path / "victim"
    for name in ("task.json", "000001.json", "000001.safetensors", ".notes.1.tmp"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"my own {name}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, change: Change) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def stop(run: Path) -> None:
    """As if it had been stopped after its last checkpoint."""
    (run / "summary.json").unlink()
    edit(run / "status.json", lambda status: status.update(status="stopped"))


@pytest.mark.guarantee(14)
@pytest.mark.parametrize(
    "place",
    ["task", "checkpoint", "teacher", "teacher/task", "teacher-2", "student_model", "fault", "a/b/c", "metrics.jsonl"],
)
def test_a_run_does_not_write_through_links(run: Path, victim: Path, place: str) -> None:
    """Its files went to where the link leads, and the newest of a stranger's checkpoints deleted the older ones."""
    stop(run)
    link = run / place
    if place == "checkpoint":  # so that the stranger's are found there: of generations 2 and 3
        for path in link.iterdir():
            shutil.copy(path, victim)
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim / "task.json" if place == "metrics.jsonl" else victim)
    before, records = contents(victim), {name: (run / name).read_bytes() for name in ("status.json", "recipe.yaml")}
    with pytest.raises(RunError, match="is a link") as caught:
        resume(run)
    assert str(link) in str(caught.value) and str(victim) in str(caught.value)
    assert contents(victim) == before
    assert {name: (run / name).read_bytes() for name in records} == records


def test_a_run_may_be_named_by_a_link(run: Path, tmp_path: Path) -> None:
    """That one the user has made."""
    stop(run)
    (tmp_path / "latest").symlink_to(run)
    resume(tmp_path / "latest")
    assert RunDir(run).is_done


@pytest.mark.guarantee(14)
def test_a_comparison_does_not_write_through_links(tiny: Any, tmp_path: Path, victim: Path) -> None:
    """Its shared teacher lies beside its runs; and a run of it may be a link itself."""
    recipe = tiny.recipe("train.epochs=1", "train.warmup_epochs=0", losses="kd")
    folder, before = tmp_path / "cmp", contents(victim)
    folder.mkdir()
    (folder / "teacher").symlink_to(victim)
    with pytest.raises(RunError, match="is a link"):
        compare(recipe, ["linear"], 1, folder, Silent())
    (folder / "teacher").unlink()
    (folder / "linear-alone-s0").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(RunError, match="is a link"):
        compare(recipe, ["linear"], 1, folder, Silent())
    assert contents(victim) == before and not contents(tmp_path / "elsewhere")


def test_a_summary_of_a_run_can_be_shown(made: Path, tiny: Any, tmp_path: Path) -> None:
    """Of runs with one, two and no teachers."""
    recipe = tiny.recipe("train.epochs=1", "train.warmup_epochs=0", losses="kd")
    two = start(recipe.model_copy(update={"teachers": (*recipe.teachers, recipe.teacher)}), tmp_path / "two")
    none = start(tiny.recipe(losses="ce", teacher=None), tmp_path / "none")
    assert summary_problem(RunDir(made).summary()) is None
    assert summary_problem(two.summary) is None and len(two.summary["more_teachers"]) == 1
    assert summary_problem(none.summary) is None and "teacher" not in none.summary


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.clear(), "it has no run_dir"),
        (lambda s: s.update(run_dir=5), "run_dir is not what"),
        (lambda s: s.update(seconds=HUGE), "seconds is not what"),
        (lambda s: s.update(seconds=2**60), "seconds is not what"),
        (lambda s: s.update(data=[]), "it has no data.source"),
        (lambda s: s["data"].update(train_images=-1), "data.train_images is not what"),
        (lambda s: s["student"].update(accuracy="x"), "student.accuracy is not what"),
        (lambda s: s["student"].update(accuracy=95), "student.accuracy is not what"),
        (lambda s: s["student"].pop("correct"), "it has no student.correct"),
        (lambda s: s["student"].update(correct="all"), "student.correct is not what"),
        (lambda s: s["student"].pop("model"), "it has no student.model"),
        (lambda s: s["data"].update(skipped=["a.png"]), "data.skipped is not what"),
        (lambda s: s.update(peak_memory_bytes="much"), "peak_memory_bytes is not what"),
        (lambda s: s.update(blocks={"pairs": {"attention": [1]}, "student": 2, "teacher": 3}), "blocks is not what"),
        (lambda s: s["student"].update(total_parameters=0), "student.total_parameters is not what"),
        (lambda s: s["student"].update(test_accuracy=[]), "student.test_accuracy is not a number"),
        (lambda s: s.update(teacher=None), "it has no teacher.model"),
        (lambda s: s["teacher"].update(accuracy="x"), "teacher.accuracy is not what"),
        (lambda s: s["student"].update(interval=[0.1, "x"]), "student.interval is not two numbers"),
        (lambda s: s["teacher"].update(interval=[]), "teacher.interval is not two numbers"),
        (lambda s: s.update(more_teachers=5), "more_teachers is not a list"),
        (lambda s: s.update(more_teachers=[{}]), "it has no more_teachers.0.model"),
    ],
)
def test_a_summary_that_cannot_be_shown_is_written_again(
    run: Path, made: Path, watch: type[Any], change: Change, says: str
) -> None:
    edit(run / "summary.json", change)
    progress = watch(lambda step: None)
    resume(run, progress)
    assert any(says in line and "it is written again" in line for line in progress.said), progress.said
    assert progress.steps == 0
    now, before = (json.loads((folder / "summary.json").read_text()) for folder in (run, made))
    assert now["student"] == before["student"] and now["teacher"] == before["teacher"]


@pytest.mark.parametrize("name", ["summary.json", "task/task.safetensors"])
@pytest.mark.parametrize("content", ["{}", '{"student": {"acc'])
def test_a_comparison_runs_what_is_damaged_again(tiny: Any, tmp_path: Path, name: str, content: str) -> None:
    recipe = tiny.recipe("train.epochs=1", "train.warmup_epochs=0", losses="kd")
    first = compare(recipe, ["linear"], 1, tmp_path / "cmp", Silent())
    (tmp_path / "cmp" / "linear-alone-s0" / name).write_text(content)
    again = compare(recipe, ["linear"], 1, tmp_path / "cmp", Silent())
    assert again["rows"][0]["alone"]["accuracies"] == first["rows"][0]["alone"]["accuracies"]
    assert RunDir(tmp_path / "cmp" / "linear-alone-s0").damage() is None


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("summary.json", lambda s: s["data"].update(fingerprint=5), "entries of summary.json are not figures"),
        ("summary.json", lambda s: s.update(processes=True), "entries of summary.json are not figures"),
        ("summary.json", lambda s: s["student"].update(accuracy=HUGE), "entries of summary.json are not figures"),
        (
            "summary.json",
            lambda s: s["faults"].update(learning_rate_factor=HUGE),
            "entries of summary.json are not figures",
        ),
        ("metrics.jsonl", "", "metrics.jsonl is empty"),
        ("metrics.jsonl", '{"epoch": 1, "loss": "x"}\n', "not an object of numbers"),
        ("metrics.jsonl", '{"epoch": 1, "loss": 2}\n{"epoch": 2, "lo', "metrics.jsonl: line 2: Unterminated string"),
        ("metrics.jsonl", '{"epoch": 1, "loss": {}}\n', "not an object of numbers"),
        ("metrics.jsonl", '{"epoch": 1, "loss": true}\n', "not an object of numbers"),
        ("metrics.jsonl", f'{{"epoch": 1, "loss": {HUGE}}}\n', "not an object of numbers"),
    ],
    ids=lambda value: None if callable(value) else str(value)[:40],
)
def test_nothing_is_trained_to_be_compared_with_nonsense(
    run: Path, watch: type[Any], name: str, change: Change | str, says: str
) -> None:
    if isinstance(change, str):
        (run / name).write_text(change)
    else:
        edit(run / name, change)
    progress = watch(lambda step: None)
    with pytest.raises(RunError, match=says):
        repeat(run, progress=progress)
    assert progress.steps == 0 and [path.name for path in run.parent.iterdir()] == [run.name]


@pytest.mark.parametrize("seconds", [HUGE, -HUGE, "long", True, None, []], ids=lambda value: str(value)[:10])
def test_a_time_that_is_none_counts_nothing(run: Path, seconds: object) -> None:
    stop(run)
    edit(run / "status.json", lambda status: status.update(seconds=seconds))
    assert RunDir(run).seconds() == 0.0
    resume(run)
    assert 0 < RunDir(run).summary()["seconds"] < 1e4


def test_a_folder_called_stop_does_not_stop(run: Path) -> None:
    """It could not be removed, so every run in this place would end at once."""
    stop(run)
    (run / "stop").mkdir()
    resume(run)
    assert RunDir(run).is_done


@pytest.mark.parametrize(
    "state",
    [
        {"step": 10**12, "counted": 0},
        {"step": 4},  # an epoch has three
        {"counted": 3},
        {"epoch": 9, "step": 0, "counted": 0, "history": [{"epoch": n, "loss": 1.0} for n in range(1, 10)]},
        {"epoch": 2, "step": 1, "history": [{"epoch": n, "loss": 1.0} for n in (1, 2)]},
        {"lr_factor": 1e300},
        {"lr_factor": 0.0},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_state_that_no_run_has_is_refused(
    tiny: Any, tmp_path: Path, watch: type[Any], state: dict[str, object]
) -> None:
    """Sealed as real ones are. Training would end at once, as if it were done, or step to infinity."""

    def crash(step: int) -> None:
        if step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        start(tiny.recipe("train.checkpoint_seconds=0"), tmp_path / "run", watch(crash))
    manifest = max((tmp_path / "run" / "checkpoint").glob("*.json"))
    body = json.loads(manifest.read_text())
    assert (body["state"]["epoch"], body["state"]["step"], body["state"]["counted"]) == (1, 1, 1)
    del body["sha256"]
    body["state"] |= state
    manifest.write_text(json.dumps({**body, "sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}))
    progress = watch(lambda step: None)
    with pytest.raises(RunError, match="does not belong to this run"):
        resume(tmp_path / "run", progress)
    assert progress.steps == 0 and RunDir(tmp_path / "run").status() == "failed"
