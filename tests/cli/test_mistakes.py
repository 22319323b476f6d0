"""Wrong words, wrong data, wrong folders: one clear message each, exit code 2, nothing lost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import Result

from remap.errors import DiskFull
from remap_cli import launch

WORDS = [
    (["--method", "vpt_dep"], ["unknown method 'vpt_dep'", "did you mean 'vpt_deep'"]),
    (["--losses", "ce,kdd"], ["unknown loss 'kdd'", "did you mean 'kd'"]),
    (["--losses", "ce:x"], ["losses", "must be a number"]),
    (["--set", "train.epoch=3"], ["train.epoch: unknown key", "did you mean 'epochs'"]),
    (
        ["--method", "vpt_deep", "--set", "method.num_prompt=3"],
        ["method.num_prompt: unknown key", "did you mean 'num_prompts'"],
    ),
    (["--set", "losses.kd.temperature=0"], ["losses[1].temperature", "greater than 0"]),
    (["--recipe", "digit"], ["no shipped recipe", "did you mean 'digits'"]),
    (["--recipe", "absent.yaml"], ["absent.yaml", "no such file"]),
    (["--set", "teacher.prepare=prob"], ["teacher.prepare", "did you mean 'probe'"]),
    (["--resume", "absent"], ["there is no run directory absent"]),
    (["--resume", "absent", "--epochs", "9"], ["there is no run directory absent"]),
    (["--epochs", "1", "--set", "train.warmup_epochs=1"], ["warmup_epochs"]),
    (["--method", "lora+vpt_dep"], ["unknown method 'vpt_dep'", "did you mean 'vpt_deep'"]),
    (["--method", "lora+linear"], ["'linear' cannot be combined"]),
    (["--method", "vpt_deep+e2vpt"], ["both add tokens"]),
    (["--method", "lora+lora"], ["names a method twice"]),
    (["--method", "lora+ssf", "--set", "method.rank=4"], ["method.rank: unknown key"]),
    (["--method", "linear", "--losses", "ce,attention"], ["attention cannot teach linear"]),
    (["--set", "rank=4", "--method", "lora"], ["command line: 1 problem", "did you mean 'method.rank'"]),
    (["--method", "vpt_deep,lora"], ["command line: 1 problem", "did you mean 'vpt_deep+lora'"]),
    (["--set", "foo=1"], ["foo: unknown key (allowed: name, seed, task, data, teacher, teachers,"]),
    (["--set", "taks=multilabel"], ["did you mean 'task'?"]),
    (["--set", "method=5"], ["method: should be a name, or a mapping of keys, got 5"]),
    (["--set", "method.rank=abc"], ["method.rank: should be a whole number, got 'abc'"]),
    (["--set", "losses.tokens.layers=uniform"], ["--losses ce:0.1,kd,attention,tokens"]),
    (["--set", "train.lr=0.1", "--set", "train.base_lr=0.2"], ["train.base_lr: train.lr is the rate"]),
    (["--devices", "2"], ["asks for 2 processes and has 1", "torchrun"]),
]
THINGS = [
    (["--student", "vit_smal"], ["unknown model 'vit_smal'", "did you mean 'vit_small'"]),
    (
        ["--student", "starnet_s050", "--weights", "none", "--method", "vpt_deep", "--losses", "ce"],
        ["vpt_deep does not fit other networks of timm", "take vpt_pad or vp"],
    ),
    (["--data", "absent"], ["no such data", "absent"]),
    (["--student", "self"], ["'self' is made of the student, and can only be its teacher"]),
    (["--student", "shrink(teacher, depth=99)"], ["depth", "99"]),
    (["--teacher", "no/such/run"], ["no such model or run directory"]),
]


@pytest.mark.parametrize(("words", "parts"), WORDS)
def test_a_wrong_word_is_named_and_leaves_nothing(
    remap: Callable[..., Result], words: list[str], parts: list[str], tmp_path: Path
) -> None:
    result = remap("distill", *words)
    assert result.exit_code == 2
    assert [part for part in parts if part not in result.message] == []
    assert list(tmp_path.iterdir()) == []


_NOTHING = ": got nothing after '=' (to set no value, write"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--losses", "ce,,kd"], "losses: a name is missing, got 'ce,,kd'"),
        (["--losses", "ce,kd:x"], "losses: 'kd:x': the weight after the colon must be a number, got 'x'"),
        (["--set", "train.epochs=null"], "train.epochs: should be a whole number, got nothing"),
        (["--set", "train.epochs="], f"--set train.epochs={_NOTHING} train.epochs=null)"),
        (["--set", "data.labels= "], f"--set data.labels= {_NOTHING} data.labels=null)"),
    ],
)
def test_what_was_given_is_said_once_and_as_it_was_typed(
    remap: Callable[..., Result], words: list[str], problem: str
) -> None:
    assert remap("distill", *words).message == f"command line: 1 problem\n  - {problem}"


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [({}, "no launcher"), ({"ACCELERATE_DYNAMO_MODE": "default"}, "accelerate launch, which started one process")],
)
def test_the_launcher_that_started_one_process_is_named(
    remap: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], launcher: str
) -> None:
    """The variable is the only trace of `accelerate launch --cpu`."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert f"given:   {launcher}" in remap("distill", "--devices", "2").message


@pytest.mark.parametrize(("words", "parts"), THINGS)
def test_what_is_not_there_is_named_and_a_run_that_began_says_failed(
    remap: Callable[..., Result], words: list[str], parts: list[str], tmp_path: Path
) -> None:
    """Models and data are opened inside the run, which then keeps the message."""
    result = remap("distill", *words)
    assert result.exit_code == 2
    assert [part for part in parts if part not in result.message] == []
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}
    for run in tmp_path.glob("runs/*"):
        status = json.loads((run / "status.json").read_text())
        assert status["status"] == "failed" and all(part in status["message"] for part in parts)


@pytest.mark.parametrize("words", ["eval runs", "tasks add shelf a=runs"])
def test_of_a_folder_of_runs_one_is_named(remap: Callable[..., Result], tmp_path: Path, words: str) -> None:
    (tmp_path / "runs" / "photos-001").mkdir(parents=True)
    (tmp_path / "runs" / "photos-001" / "recipe.yaml").touch()
    assert "runs/photos-001" in remap(*words.split()).message.partition("name a run in it, such as ")[2]


def test_of_a_folder_of_comparisons_one_is_named(remap: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "suite" / "digits").mkdir(parents=True)
    (tmp_path / "suite" / "digits" / "compare.json").touch()
    result = remap("report", "suite")
    assert result.exit_code == 2 and "name a comparison in it, such as suite/digits" in result.message


def test_a_folder_that_is_not_there_is_not_advised(remap: Callable[..., Result], tmp_path: Path) -> None:
    assert "ls runs" not in remap("eval", "absent").message
    (tmp_path / "runs").mkdir()
    assert "see `ls runs`" in remap("eval", "absent").message


ABSENT = ("absent", "there is no run directory absent", "no such folder")
NEITHER = "is not a run directory or task folder", "it has neither recipe.yaml nor"


@pytest.mark.parametrize(("name", "what", "given"), [ABSENT, (".", *NEITHER)])
@pytest.mark.parametrize("command", ["predict RUN PICTURES", "export RUN --to onnx", "tasks add shelf name=RUN"])
def test_what_is_not_a_run_is_named_by_what_was_given(
    remap: Callable[..., Result], pictures: Path, command: str, name: str, what: str, given: str, tmp_path: Path
) -> None:
    result = remap(*command.replace("RUN", name).replace("PICTURES", str(pictures)).split())
    assert result.exit_code == 2 and what in result.message
    assert f"given:   {given}" in result.message and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "what", "given"), [ABSENT, ("photos", *NEITHER)])
@pytest.mark.parametrize("command", ["predict RUN PICTURES", "export RUN --to onnx", "tasks add shelf name=RUN"])
def test_a_recipe_of_init_beside_a_wrong_name_is_not_called_an_unfinished_run(
    remap: Callable[..., Result], pictures: Path, command: str, name: str, what: str, given: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "recipe.yaml").write_text("data: {source: photos}\n")  # where `remap init` writes it
    result = remap(*command.replace("RUN", name).replace("PICTURES", str(pictures)).split())
    assert result.exit_code == 2 and what in result.message
    assert f"given:   {given}" in result.message and "resume" not in result.message


@pytest.mark.parametrize("command", ["predict absent x.png", "export absent --to onnx", "eval absent", "repeat absent"])
def test_a_run_that_is_not_there_is_refused_without_pytorch(command: str, tmp_path: Path) -> None:
    """PyTorch takes seconds to load; nothing of it is needed to see that a folder is missing."""
    code = "import sys\nfrom remap_cli.main import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "there is no run directory absent" in done.stderr and done.stdout == "False\n"


@pytest.mark.parametrize("name", ["run", "run/task"])
def test_a_run_that_was_killed_names_no_message_that_is_not_there(
    remap: Callable[..., Result], pictures: Path, name: str, tmp_path: Path
) -> None:
    (tmp_path / "run" / "task").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("data: {source: photos}\n")
    (tmp_path / "run" / "status.json").write_text('{"status": "running"}')
    said = remap("predict", name, pictures).message
    assert "run holds no tuned student: its run has not finished" in said
    assert "do:      resume with: remap tune --resume run," in said and "complete message" not in said
    (tmp_path / "run" / "status.json").write_text('{"status": "failed", "message": "no such data\\nmore"}')
    assert "do:      run/status.json has the complete message; resume with" in remap("predict", name, pictures).message


def test_images_without_classes_are_pointed_to_commands_that_take_them(
    remap: Callable[..., Result], pictures: Path
) -> None:
    said = remap("data", "check", pictures / "train" / "red").message
    assert "images without labels are for `remap predict`, and for --unlabeled of `remap distill`" in said


def test_the_page_of_data_check_is_named(remap: Callable[..., Result], pictures: Path, tmp_path: Path) -> None:
    result = remap("data", "check", pictures, "--html", "page.html", "--json")
    assert "written: page.html" in result.stderr and (tmp_path / "page.html").is_file()
    json.loads(result.stdout)


@pytest.mark.parametrize("command", ["eval", "report", "export --to task", "tasks add shelf"])
def test_a_file_in_place_of_a_run_is_called_one(remap: Callable[..., Result], command: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    result = remap(*command.split(), "name=notes.txt" if command.startswith("tasks") else "notes.txt")
    assert result.exit_code == 2 and "given:   it is a file" in result.message


def test_a_recipe_that_is_not_shipped_says_how_a_file_is_named(remap: Callable[..., Result]) -> None:
    assert "name a file that ends in .yaml" in remap("recipes", "validate", ".").message


def test_all_mistakes_come_at_once(remap: Callable[..., Result]) -> None:
    result = remap("distill", "--method", "vpt_dep", "--losses", "ce,kdd", "--set", "data.augment=flip", "--set", "foo")
    assert "4 problems" in result.message


def test_a_run_directory_that_exists_is_left_alone(
    remap: Callable[..., Result], pictures: Path, tmp_path: Path, tiny: list[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    result = remap("tune", "--data", pictures, *tiny, "--output", "mine")
    assert result.exit_code == 2 and "exists already" in result.message and "--resume" not in result.message
    assert result.stderr == "", "nothing is announced before"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


REFUSED = {
    "compare --output FILE": "FILE cannot be the folder of a comparison",
    "compare --output FILE/deeper": "FILE is not a folder",
    "compare --output run": "run is a run directory",
    "compare --sweep train.lr": "--sweep train.lr: write KEY=VALUE,VALUE",
    "compare --sweep train.lrr=1": "train.lrr: unknown key",
    "compare --methods lora,vpt_deep --sweep method.ranks=4": (
        "method.ranks: none of lora, vpt_deep has it; did you mean 'rank'?"
    ),
    "compare --sweep train.epochs=1 --sweep train.epochs=2": "--sweep train.epochs: it is given twice",
    "compare --loss-set ce,kdd": "unknown loss 'kdd'",
    "compare --loss-set ce:x": "--loss-set ce:x: 'ce:x': the weight",
    "compare --budget epoch=1": "--budget epoch=1: not a budget",
    "compare --suite five_categories --output FILE": "FILE cannot be the folder of a comparison",
    "compare --suite offline --methods foo": "unknown method 'foo'",
    "compare --suite offline": "sets.cifar10: its images are not built in",
    "compare --suite five_categories --set train.lrr=1": "train.lrr: unknown key",
    "compare --sessions 2 --output FILE": "FILE cannot be the folder of a comparison",
    "recommend --output FILE": "FILE cannot be the folder of a comparison",
    "recommend --budget minutes=1": "--budget minutes=1: not a budget of this command",
    "recommend --set data.held_out=0.1": "remap recommend: data.held_out holds training images out already",
    "lr --set train.processes=2": "train.processes: a range test runs in one process, not in 2",
    "compare --set train.processes=2": "train.processes: remap compare runs in one process",
    "recommend --set train.processes=2": "train.processes: remap recommend runs in one process",
    "distill --output FILE": "FILE exists already",
}


def test_what_cannot_be_compared_is_refused_before_pytorch_is_loaded(tmp_path: Path) -> None:
    """All in one process, which has none of it yet; nothing is written."""
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    code = f"""
import sys
from remap.errors import RemapError
from remap_cli.app import app
for words, part in {REFUSED!r}.items():
    try:
        app(words.split(), standalone_mode=False)
    except RemapError as error:
        assert part in str(error) and error.exit_code == 2, (words, str(error))
    else:
        raise AssertionError(words)
    assert not {{"torch", "timm"}} & sys.modules.keys(), words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "run"]


def test_a_weak_teacher_stops_the_run(
    remap: Callable[..., Result], pictures: Path, tmp_path: Path, tiny: list[str]
) -> None:
    """A teacher with a random head and no preparation knows nothing."""
    result = remap(
        "distill",
        "--data",
        pictures,
        *tiny,
        "--set",
        "teacher.prepare=none",
        "--teacher",
        "vit_mini_teacher_patch4_32",
        "--output",
        "r",
    )
    assert result.exit_code == 2
    assert "the classifier of" in result.message or "not clearly above chance" in result.message
    assert '"failed"' in (tmp_path / "r" / "status.json").read_text()


def _folder(root: Path, layout: dict[str, int]) -> Path:
    for name, count in layout.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(root / name / f"{index}.png")
    return root


def test_a_teacher_at_chance_asks_for_a_new_run_and_for_no_word_that_was_not_given(
    remap: Callable[..., Result], tmp_path: Path, tiny: list[str]
) -> None:
    """Both classes hold the same images, so half of the answers are right."""
    data = _folder(tmp_path / "data", {"train/a": 8, "train/b": 8, "val/a": 3, "val/b": 3})
    stopped = remap("distill", "--data", data, *tiny)
    assert stopped.exit_code == 2 and "  do:      start a new run: judge it by more images" in stopped.message
    assert "teacher.prepare=full" in stopped.message
    assert "--output" not in stopped.message


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        ({"one": 3}, "at least two classes"),
        ({"one": 3, "two": 0}, "holds no images"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "val/c": 1}, "classes in val that train lacks"),
        ({"a": 1, "b": 3}, "needs two images at least"),
    ],
)
def test_folders_that_cannot_work(
    remap: Callable[..., Result], tmp_path: Path, layout: dict, part: str, tiny: list[str]
) -> None:
    result = remap("tune", "--data", _folder(tmp_path / "data", layout), *tiny)
    assert result.exit_code == 2 and part in result.message


def test_a_bad_evaluation_image_stops_unless_left_out(
    remap: Callable[..., Result], tmp_path: Path, tiny: list[str]
) -> None:
    data = _folder(tmp_path / "data", {"train/a": 8, "train/b": 8, "val/a": 3, "val/b": 3})
    (data / "val" / "a" / "0.png").write_bytes(b"\x89PNG broken")
    words = ["tune", "--data", data, *tiny, "--method", "linear"]
    stopped = remap(*words, "--output", "r1")
    assert stopped.exit_code == 2 and "val/a/0.png" in stopped.message and "--skip-bad" in stopped.message
    assert remap(*words, "--skip-bad", "--output", "r2").exit_code == 0
    assert '"val_images": 5' in (tmp_path / "r2" / "summary.json").read_text()


def test_advice_can_be_typed(remap: Callable[..., Result], tmp_path: Path, tiny: list[str]) -> None:
    """Too many bad images; the run that failed cannot be gone on with, and its recipe serves a new one."""
    data = _folder(tmp_path / "data", {"train/a": 8, "train/b": 8, "val/a": 3, "val/b": 3})
    for index in range(2):
        (data / "train" / "a" / f"{index}.png").write_bytes(b"\x89PNG broken")
    words = ["tune", "--data", data, *tiny, "--method", "linear", "--output", "r"]
    refused = remap(*words)
    assert refused.exit_code == 2 and "10% of them (data.max_bad=0.1)" in refused.message
    taken = remap(*words, "--set", "data.max_bad=0.13")
    assert "failed before it trained" in taken.message and "--resume" not in taken.message
    kept = remap("tune", "--resume", "r", "--set", "data.max_bad=0.13", "--output", "s")
    assert "--set: a resumed run keeps its own recipe" in kept.message
    assert "--output: a resumed run stays in its own folder" in kept.message
    advice = kept.message.split("remap ")[-1]
    assert advice == "tune --recipe r/recipe.yaml OPTIONS --output FOLDER"
    typed = advice.replace("OPTIONS", "--set data.max_bad=0.13").replace("FOLDER", "s").split()
    assert remap(*typed).exit_code == 0 and (tmp_path / "s" / "task" / "task.json").is_file()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (DiskFull("r will not fit on the disk", do="choose another --output"), "then resume with: remap tune --resume"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "a smaller --batch-size"),
    ],
)
def test_the_folder_of_a_run_gives_the_advice_of_the_terminal(
    remap: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, advice: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("remap.pipeline.run.build_components", fail)
    stopped = remap("tune", "--method", "linear", "--output", "r")
    assert stopped.exit_code == 2 and advice in stopped.message
    assert json.loads((tmp_path / "r" / "status.json").read_text())["message"] == stopped.message


def test_a_loss_that_is_not_finite_stops_the_run_and_its_folder_says_so(
    remap: Callable[..., Result], pictures: Path, tmp_path: Path, tiny: list[str]
) -> None:
    words = ["tune", "--data", pictures, *tiny, "--method", "full", "--output", "r"]
    stopped = remap(*words, "--lr", "1e30", "--set", "train.clip_norm=null")
    assert stopped.exit_code == 2 and "not finite" in stopped.message and "--lr" in stopped.message
    assert '"failed"' in (tmp_path / "r" / "status.json").read_text()
    again = remap(*words)
    assert again.exit_code == 2 and "resume that run: --resume r" in again.message  # it has checkpoints
    as_student = ["tune", "--data", pictures, "--student", "r", "--output", "again"]
    for command in (["eval", "r"], ["predict", "r", pictures / "val"], as_student):
        result = remap(*command)
        assert result.exit_code == 2 and not (tmp_path / "again").exists()
        for part in ("its run failed", "not finite", str(Path("r") / "status.json")):
            assert part in result.message


def test_weak_teacher_may_be_allowed(
    remap: Callable[..., Result], pictures: Path, tiny: list[str], weak: list[str]
) -> None:
    assert remap("distill", "--data", pictures, *tiny, *weak, "--method", "linear").exit_code == 0


def test_a_resumed_run_takes_no_other_option(remap: Callable[..., Result], pictures: Path, tiny: list[str]) -> None:
    assert remap("tune", "--data", pictures, *tiny, "--method", "linear", "--output", "r").exit_code == 0
    for option, reason in (("--dry-run", "is not estimated"), ("--skip-bad", "keeps its own recipe")):
        result = remap("tune", "--resume", "r", option)
        assert result.exit_code == 2 and f"{option}: a resumed run {reason}" in result.message


@pytest.mark.parametrize(
    ("command", "advice"), [("repeat", "torchrun --nproc-per-node 900"), ("distill", "--devices 900")]
)
def test_the_files_of_a_run_do_not_start_many_processes(
    remap: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, advice: str
) -> None:
    """A stranger's run directory; nobody has typed a number."""

    def start(count: int | None) -> None:
        assert count is not None and count <= launch.most_unasked()

    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "start_processes", start)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("train: {processes: 900, batch_size: 1800}")
    (tmp_path / "run" / "summary.json").write_text('{"processes": 900}')
    (tmp_path / "run" / "environment.json").write_text('{"variables": {"OMP_NUM_THREADS": "9999999"}}')
    result = remap(*([command, "run"] if command == "repeat" else [command, "--resume", "run"]))
    assert result.exit_code == 2 and "ask for 900 processes; nothing was started" in result.message
    assert advice in result.message and os.environ.get("OMP_NUM_THREADS") != "9999999"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["train", "--data", "x"], "`remap distill` trains with a teacher, `remap tune` without one"),
        (["fit"], "`remap distill` trains with a teacher"),
        (["tune", "--teacher", "vit_large"], "use `remap distill`"),
    ],
)
def test_words_of_other_tools_have_a_hint(remap: Callable[..., Result], words: list[str], advice: str) -> None:
    result = remap(*words)
    assert result.exit_code == 2 and advice in result.message


def test_a_recommendation_has_no_report(remap: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "rec").mkdir()
    for name in ("compare-of.txt", "recommend.json"):
        (tmp_path / "rec" / name).touch()
    result = remap("report", "rec")
    assert result.exit_code == 2 and "rec holds a recommendation, which has no report" in result.message


def test_labels_in_a_file_that_is_not_read_are_to_be_a_csv(remap: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text('{"file": "a.png", "label": "x"}')
    result = remap("data", "check", "labels.jsonl")
    assert result.exit_code == 2 and "convert it to a CSV" in result.message


def test_a_method_that_a_budget_leaves_out_is_named(
    remap: Callable[..., Result], pictures: Path, tiny: list[str], weak: list[str]
) -> None:
    words = [
        "--methods",
        "linear,full",
        "--seeds",
        "1",
        "--budget",
        "parameters=1000",
        "--jobs",
        "1",
        "--losses",
        "ce,kd",
    ]
    result = remap("compare", "--data", pictures, *tiny, *weak, *words)
    assert result.exit_code == 0, getattr(result, "message", result.output)
    assert "left out: full" in " ".join(result.output.split())
