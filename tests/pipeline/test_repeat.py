"""A run repeated: what counts as equal, what is refused before anything is trained, and that the run is only read."""

import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remap.data.fingerprint import fingerprint
from remap.data.sources import open_data
from remap.errors import DataError, Interrupted, RunError
from remap.pipeline.compare import compare as compare_methods
from remap.pipeline.evaluate_run import evaluate_run
from remap.pipeline.repeat import repeat
from remap.pipeline.run import start
from remap.pipeline.run_differences import compare, differing, differing_tensors
from remap.progress import Silent
from remap.recipe import dump
from remap.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

Watch = Callable[..., Any]


@pytest.fixture(scope="module")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on data and a student of its own, which tests may change and put back."""
    root = tmp_path_factory.mktemp("repeat")
    shutil.copytree(tiny.data, root / "data")
    shutil.copytree(tiny.student.removeprefix("local-dir:"), root / "student")
    words = {"data": str(root / "data"), "student": f"local-dir:{root / 'student'}"}
    return start(tiny.recipe("data.augment=shift", **words), root / "runs" / "run").run_dir


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of that run: run directories may be moved."""
    return shutil.copytree(made, tmp_path / "run")


def state_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file's SHA-256 and time of change."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def edit(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.guarantee(23)
def test_a_repeat_is_equal_and_leaves_the_run_alone(run: Path) -> None:
    before = state_of(run)
    found = repeat(run, workers=3)
    assert state_of(run) == before
    assert found["equal"] and found["tensors"] == [] and found["environment"] == []
    assert Path(found["repeat"]) == run.parent / "run-repeat-001"
    assert RunDir.open(Path(found["repeat"])).recipe().data.workers == 3
    names = {"task file", "teacher file", "history", "accuracy", "images", "backbone", "frozen weights", "teacher"}
    names |= {"accumulation", "skipped steps", "learning-rate factor"}
    assert {check["what"] for check in found["checks"]} == names
    second = repeat(run)  # the next free number
    assert second["repeat"].endswith("run-repeat-002") and second["equal"]


@pytest.mark.guarantee(23)
def test_each_difference_is_found(run: Path, tmp_path: Path) -> None:
    """One thing at a time is changed in a copy; the difference of a tensor is the number that was added."""
    other = RunDir(shutil.copytree(run, tmp_path / "other"))
    assert compare(RunDir(run), other)["equal"]
    task = other.path / "task" / "task.safetensors"
    tensors = load_file(task)
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, task)
    reference = load_file(run / "task" / "task.safetensors")[name].abs().max().item()
    assert compare(RunDir(run), other)["tensors"] == [{"name": name, "largest_difference": reference}]
    edit(other.path / "summary.json", lambda s: s["student"].update(correct=s["student"]["correct"] - 1))
    edit(other.path / "summary.json", lambda s: s["data"].update(fingerprint="0" * 64))
    edit(other.path / "summary.json", lambda s: s["teacher"].update(accuracy=0.5))
    edit(other.path / "summary.json", lambda s: s["frozen"].update(sha256="1" * 64))
    edit(other.path / "summary.json", lambda s: s["student"].update(backbone_sha256="2" * 64))
    faults = {"accumulation": 2, "skipped_steps": 1, "learning_rate_factor": 0.5}
    edit(other.path / "summary.json", lambda s: s.update(faults=faults))
    edit(other.path / "environment.json", lambda e: e["packages"].update(torch="2.10.0"))
    edit(other.path / "environment.json", lambda e: e.update(threads=7))
    records = (other.path / "metrics.jsonl").read_text().splitlines()
    last = json.loads(records[-1])
    last |= {"loss": last["loss"] + 1.0, "seconds": 1e6}
    (other.path / "metrics.jsonl").write_text("\n".join([*records[:-1], json.dumps(last)]) + "\n")
    shutil.rmtree(other.path / "teacher")
    found = compare(RunDir(run), other)
    assert not found["equal"] and not any(check["equal"] for check in found["checks"])
    assert {row["what"]: row["repeat"] for row in found["environment"]} == {"packages.torch": "2.10.0", "threads": "7"}
    (told,) = [check for check in found["checks"] if check["what"] == "history"]
    assert told["first"].startswith("epoch 2 of 2") and told["first"] != told["repeat"]


def test_the_history_shows_the_number_that_differs(run: Path, tmp_path: Path) -> None:
    """One bit of one loss, which the weighted sum above it need not show; then an epoch less, then none."""
    other = RunDir(shutil.copytree(run, tmp_path / "other"))

    def told() -> tuple[str, str]:
        (check,) = [one for one in compare(RunDir(run), other)["checks"] if one["what"] == "history"]
        assert not check["equal"]
        return check["first"], check["repeat"]

    first, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    moved = math.nextafter(first["ce"], 1e9)
    path = other.path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (first | {"ce": moved}, last)))
    assert told() == (f"epoch 1 of 2: ce {first['ce']!r}", f"epoch 1 of 2: ce {moved!r}") and first["ce"] != moved
    path.write_text(json.dumps(first) + "\n")
    assert told() == (f"epoch 1 of 2: loss {first['loss']!r}", f"epoch 1 of 1: loss {first['loss']!r}")
    path.write_text("")
    assert told()[1] == "no epoch"


def test_outputs_on_disk_are_named_and_make_no_teacher_another_one(run: Path, tmp_path: Path) -> None:
    """They may be of another run, in whose batches they were computed."""
    other = RunDir(shutil.copytree(run, tmp_path / "other"))
    assert compare(RunDir(run), other)["outputs_on_disk"] == {"first": [], "repeat": []}
    edit(other.path / "summary.json", lambda s: s["teacher"].update(outputs="disk", model="vit_x"))
    edit(run / "summary.json", lambda s: s["teacher"].update(outputs="each step", model="vit_x"))
    found = compare(RunDir(run), other)
    assert found["equal"] and found["outputs_on_disk"] == {"first": [], "repeat": ["vit_x"]}


def test_times_do_not_count(run: Path, tmp_path: Path) -> None:
    other = RunDir(shutil.copytree(run, tmp_path / "other"))
    lines = [json.loads(line) | {"seconds": 9.0} for line in (other.path / "metrics.jsonl").read_text().splitlines()]
    (other.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit(other.path / "environment.json", lambda e: e.update(time="2020-01-01T00:00:00Z"))
    edit(other.path / "summary.json", lambda s: s.update(seconds=9.0, train_seconds=9.0, peak_memory_bytes=1))
    found = compare(RunDir(run), other)
    assert found["equal"] and found["environment"] == []


def test_tensors_are_compared_by_name_shape_and_size_of_the_difference(tmp_path: Path) -> None:
    """Powers of two, whose differences are exact."""
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"

    def base() -> torch.Tensor:
        return torch.arange(6.0).reshape(2, 3)

    save_file({"same": base(), "moved": base(), "shape": base(), "gone": base()}, one)
    moved = base()
    moved[1, 2] += 2**-10
    save_file({"same": base(), "moved": moved, "shape": base().reshape(3, 2), "new": base()}, other)
    found = {row["name"]: row["largest_difference"] for row in differing_tensors(one, other)}
    assert found == {"moved": 2**-10, "shape": None, "gone": None, "new": None}


def test_records_are_compared_entry_by_entry() -> None:
    first = {"a": 1, "b": {"c": "x", "d": [1, 2]}, "e": True}
    second = {"a": 1, "b": {"c": "y", "d": [1, 2]}, "f": None}
    assert differing(first, second) == [
        {"what": "b.c", "first": "x", "repeat": "y"},
        {"what": "e", "first": "True", "repeat": "-"},
        {"what": "f", "first": "-", "repeat": "None"},
    ]


def _status(status: str, message: str = "") -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / "status.json").write_text(json.dumps({"status": status, "message": message, "time": ""}))

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_status("stopped", "stopped by a signal"), ["it was stopped", "by a signal", "remap distill --resume"]),
        (_status("failed", "out of memory\nmore"), ["it failed", "out of memory", "finish it first"]),
        (_status("running"), ["it has not finished"]),
        (lambda run: (run / "summary.json").unlink(), ["no result that could be compared"]),
        (lambda run: (run / "recipe.yaml").unlink(), ["is not a run directory"]),
        (lambda run: (run / "task" / "task.safetensors").write_bytes(b"x"), ["task.safetensors is damaged"]),
        (lambda run: (run / "metrics.jsonl").unlink(), ["cannot read", "metrics.jsonl"]),
        (lambda run: (run / "environment.json").unlink(), ["cannot read", "environment.json"]),
        (lambda run: (run / "environment.json").write_text("[]"), ["environment.json: it is not a JSON object", "do:"]),
        (
            lambda run: edit(run / "environment.json", lambda e: e.update(resumed=[1])),
            ["'resumed' is not a list", "do:"],
        ),
        (lambda run: (run / "summary.json").write_text("[]"), ["summary.json: it is not a JSON object", "do:"]),
        (lambda run: edit(run / "summary.json", lambda s: s.update(data=[])), ["are not figures", "--recipe"]),
        (lambda run: edit(run / "summary.json", lambda s: s.pop("student")), ["no figures of this version", "student"]),
        (lambda run: edit(run / "summary.json", lambda s: s.update(processes=2)), ["made by 2 process", "1 process"]),
    ],
)
def test_a_run_that_cannot_be_repeated_is_refused_before_training(
    run: Path, change: Callable[[Path], None], parts: list[str], watch: Watch
) -> None:
    change(run)
    steps = watch(lambda done: None)
    with pytest.raises(RunError) as caught:
        repeat(run, progress=steps)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert steps.steps == 0 and [path.name for path in run.parent.iterdir()] == [run.name]


def test_other_images_and_other_weights_are_refused_before_training(
    made: Path, run: Path, tiny: Any, watch: Watch
) -> None:
    """A validation image, an added file, a folder that is gone, a student of the same shape."""
    root, steps = made.parents[1], watch(lambda done: None)
    image, more = root / "data" / "val" / "red" / "00.png", root / "data" / "train" / "red" / "new.png"
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    with pytest.raises(DataError, match="the images are not those of"):
        repeat(run, progress=steps)
    image.write_bytes(content)
    more.write_bytes(content)
    with pytest.raises(DataError, match="25 training"):
        repeat(run, progress=steps)
    more.unlink()
    (root / "data").rename(root / "elsewhere")
    again = (
        lambda: repeat(run, progress=steps),
        lambda: evaluate_run(run, None, False, steps),
    )
    for ask in again:
        with pytest.raises(DataError, match="no such data") as caught:
            ask()
        assert f"{run / 'recipe.yaml'} names their path" in (caught.value.do or "")
        assert "allowed:" not in str(caught.value), "that is for who chooses images"
        assert "current folder" not in (caught.value.do or ""), "the path is absolute"
    (root / "elsewhere").rename(root / "data")
    weights = root / "student" / "model.safetensors"
    kept = weights.read_bytes()
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(RunError, match="tuned on other weights"):
        repeat(run, progress=steps)
    weights.write_bytes(kept)
    assert steps.steps == 0 and [path.name for path in run.parent.iterdir()] == [run.name]


def test_a_run_that_was_resumed_elsewhere_is_said_to_have_other_bits(run: Path, watch: Watch) -> None:
    """Before it trains and in the result; of the second environment only what is another one is listed."""
    edit(run / "environment.json", lambda e: e.update(resumed=[dict(e)], processes=2))
    recipe = RunDir(run).recipe()  # as --devices 2 writes it
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"processes": 2})})
    (run / "recipe.yaml").write_text(dump(asked.written_out()))
    words, early = "a different number of processes (2, then 1)", list[str]()
    steps = watch(lambda done: early.extend(steps.said) if done == 1 else None)
    found = repeat(run, progress=steps)
    assert sum(f"was resumed with {words}" in line for line in early) == 1
    assert found["changed_on_the_way"] == {"first": [words], "repeat": []}
    assert found["environment"] == [
        {"what": "processes", "first": "2", "repeat": "1"},
        {"what": "resumed 1.processes", "first": "1", "repeat": "-"},
    ]


def test_where_a_repeat_may_go(run: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="cannot be stored in the run"):
        repeat(run, run / "again")
    other = RunDir.create(tmp_path / "other", tiny.recipe("train.epochs=3"))
    before = state_of(other.path)
    with pytest.raises(RunError, match="is a run of another recipe; nothing in it was touched"):
        repeat(run, other.path)
    assert state_of(other.path) == before and not (run / "again").exists()
    monkeypatch.chdir(run)
    assert Path(repeat(Path("."))["repeat"]) == run.parent / "run-repeat-001"


def test_an_interrupted_repeat_goes_on(run: Path, tmp_path: Path, watch: Watch) -> None:
    def stop(done: int) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGTERM)

    target = tmp_path / "again"
    with pytest.raises(Interrupted) as caught:
        repeat(run, target, progress=watch(stop))
    assert (caught.value.do or "").endswith(f"remap repeat {run} --output {target}")
    steps = watch(lambda done: None)
    assert repeat(run, target, progress=steps)["equal"] and steps.steps == 6 - 2
    assert repeat(run, target, progress=steps)["equal"] and steps.steps == 6 - 2, "a finished one is compared only"


def test_a_damaged_repeat_is_made_whole_or_refused(run: Path, tmp_path: Path, watch: Watch) -> None:
    """A summary that breaks off is written again from the last checkpoint; one without figures is not compared."""
    target, steps = tmp_path / "again", watch(lambda done: None)
    repeat(run, target, progress=steps)
    (target / "summary.json").write_text('{"student": {"acc')
    assert repeat(run, target, progress=steps)["equal"] and steps.steps == 6
    edit(target / "summary.json", lambda s: s.pop("faults"))
    with pytest.raises(RunError, match="holds no figures .*\n.*summary.json has no 'faults'\n.*remove that folder"):
        repeat(run, target, progress=steps)


def test_a_run_of_a_comparison_learns_from_its_shared_teacher(tiny: Any, tmp_path: Path) -> None:
    """The teacher was prepared with the first seed, so that seed 1 alone would make another one."""
    compare_methods(tiny.recipe(losses="ce,kd"), ["linear"], 2, tmp_path / "compare", Silent())
    before = state_of(tmp_path / "compare" / "teacher")
    found = repeat(tmp_path / "compare" / "linear-teacher-s1", tmp_path / "again")
    assert found["equal"] and state_of(tmp_path / "compare" / "teacher") == before


def test_the_environment_says_what_decides_bits_and_nothing_private(run: Path) -> None:
    record = RunDir(run).environment()
    assert record["threads"] == torch.get_num_threads() and record["processes"] == 1 and record["device"] == "cpu"
    assert record["cpu_capability"] == torch.backends.cpu.get_cpu_capability() and record["cpu"] and record["libc"]
    assert record["torch_build"]["torch"] == torch.__version__
    packages = record["packages"]
    # Of the first level, of the second (torch asks for sympy) and of the third (sympy asks for mpmath).
    assert {"torch", "timm", "numpy", "pydantic", "sympy", "mpmath"} <= set(packages) and "pytest" not in packages
    assert all(version and version != "missing" for version in packages.values())
    import getpass
    import platform

    text = json.dumps(record)
    private = {platform.node(), getpass.getuser(), str(Path.home()), str(Path.cwd())} - {"", "/", "root"}
    assert [word for word in private if word in text] == [] and "/" not in text.replace("/proc", "")


def test_a_run_that_goes_on_in_another_environment_records_both(tmp_path: Path, tiny: Any) -> None:
    run = RunDir.create(tmp_path / "run", tiny.recipe())
    run.note_machine({"threads": 1}, resuming=False)
    first = run.environment()
    run.note_machine({"threads": 1}, resuming=True)
    assert run.environment() == first
    for _ in range(2):
        run.note_machine({"threads": 2}, resuming=True)
    record = run.environment()
    assert record["threads"] == 1 and [leg["threads"] for leg in record["resumed"]] == [2]


def test_the_fingerprint_is_of_names_labels_order_and_content(tiny: Any, tmp_path: Path) -> None:
    def of(folder: Path) -> str:
        return fingerprint(open_data(str(folder), None, 0.2), Silent())

    for name in ("one", "two"):
        shutil.copytree(tiny.data, tmp_path / name)
    (tmp_path / "tar").mkdir()
    archive = shutil.make_archive(str(tmp_path / "tar" / "data"), "tar", tmp_path / "one")
    assert of(tmp_path / "one") == of(tmp_path / "two") == of(Path(archive))
    seen = {of(tmp_path / "one")}
    first, second = (tmp_path / "two" / "train" / "red" / name for name in ("00.png", "01.png"))
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])  # the same files in other places
    seen.add(of(tmp_path / "two"))
    first.write_bytes(content[0])
    second.write_bytes(content[1])
    second.rename(second.with_name("other.png"))
    seen.add(of(tmp_path / "two"))
    second.with_name("other.png").rename(tmp_path / "two" / "train" / "blue" / "01b.png")
    seen.add(of(tmp_path / "two"))
    assert len(seen) == 4


def test_unreadable_images_count_the_same_whether_views_are_kept_or_not(tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    (tmp_path / "data" / "train" / "red" / "00.png").write_bytes(b"no image")
    prints = set()
    for gigabytes in (0, 4):
        settings = (f"data.memory_gib={gigabytes}", "train.epochs=1", "train.warmup_epochs=0", "data.max_bad=0.5")
        recipe = tiny.recipe(*settings, data=str(tmp_path / "data"))
        prints.add(start(recipe, tmp_path / str(gigabytes)).summary["data"]["fingerprint"])
    assert prints == {fingerprint(open_data(str(tmp_path / "data"), None, 0.2), Silent())}
