"""distill, tune, eval, predict and compare on a folder of pictures, as a user would call them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import Result

from remap.errors import RemapError
from remap.pipeline.student_api import load_student
from remap.recipe import resolve
from remap_cli.estimates import _disk
from remap_cli.run_summary import announce

WANTED = {
    "run_dir",
    "seconds",
    "teacher.accuracy",
    "student.accuracy",
    "student.trainable_parameters",
    "student.total_parameters",
    "student.task_bytes",
}


def _flat(values: dict, prefix: str = "") -> dict:
    pairs = {f"{prefix}{key}": value for key, value in values.items()}
    return pairs | {
        k: v for key, one in pairs.items() if isinstance(one, dict) for k, v in _flat(one, f"{key}.").items()
    }


@pytest.fixture
def run(run_json: Callable[..., dict], pictures: Path, tiny: list[str], weak: list[str]) -> dict:
    return run_json("distill", "--data", pictures, "--method", "bitfit", *tiny, *weak)


def test_distill_then_eval_then_predict(run: dict, run_json: Callable[..., dict], pictures: Path) -> None:
    assert set(_flat(run)) >= WANTED
    assert run["data"]["skipped"] == [["train/red/notes.gif", ".gif files are not read"]]
    assert run["student"]["trainable_parameters"] < run["student"]["total_parameters"]
    again = run_json("eval", run["run_dir"])
    assert again["left_out"] == {".gif files are not read": 1}
    assert (again["correct"], again["images"]) == (run["student"]["correct"], 12)
    assert sum(row["images"] for row in again["classes"]) == 12
    found = run_json("predict", run["run_dir"], pictures / "val", "--top", "2")
    right = sum(Path(row["path"]).parent.name == row["top"][0]["class"] for row in found)
    assert right == run["student"]["correct"]
    assert all(sum(c["probability"] for c in row["top"]) == pytest.approx(1.0, abs=1e-5) for row in found)


def test_python_predicts_a_pillow_image_as_its_file(run: dict, tmp_path: Path) -> None:
    """EXIF 6: the camera was held upright; a reader must turn the pixels by a quarter."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    student = load_student(run["run_dir"])
    path = str(tmp_path / "turned.png")
    with Image.open(path) as image:
        assert np.array_equal(student.pixels(image), student.pixels(path))
        assert student.predict([image]) == student.predict([path])
    (tmp_path / "broken.png").write_bytes(b"text")
    with pytest.raises(RemapError, match="an image cannot be read: not an image\n  given:   .*broken.png"):
        student.predict([tmp_path / "broken.png"])


def test_a_student_computes_on_the_accelerator_if_there_is_one(run: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's meta device stands for the accelerator: what is there tells where it would be."""
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("meta"))
    assert load_student(run["run_dir"]).device.type == "meta"
    assert load_student(run["run_dir"], "cpu").device.type == "cpu"


def test_eval_names_its_images(run: dict, remap: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "other" / "red").mkdir(parents=True)
    (tmp_path / "other" / "red" / "0.png").write_bytes(b"text")
    result = remap("eval", run["run_dir"], "--data", "other")
    assert result.exit_code == 2
    assert result.message.startswith("1 of 1 other images cannot be read\n  given:   red/0.png (not an image)")


def test_eval_on_other_data_counts_all_of_it(run: dict, run_json: Callable[..., dict], pictures: Path) -> None:
    assert run_json("eval", run["run_dir"], "--data", pictures / "val")["correct"] == run["student"]["correct"]


def test_predict_reports_an_unreadable_file_and_goes_on(
    run: dict, remap: Callable[..., Result], pictures: Path
) -> None:
    bad = Path(run["run_dir"]) / "bad.png"
    bad.write_text("no image")
    result = remap("predict", run["run_dir"], bad, pictures / "val" / "red", "--json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 2
    assert rows[0]["error"] == "not an image" and len(rows) == 7 and all(row["top"] for row in rows[1:])


def test_predict_reports_a_file_that_is_not_there_and_goes_on(
    run: dict, remap: Callable[..., Result], pictures: Path, tmp_path: Path
) -> None:
    good, link = pictures / "val" / "red" / "0.png", tmp_path / "folder" / "link.png"
    link.parent.mkdir()
    link.symlink_to("nowhere")
    result = remap("predict", run["run_dir"], good, link, "absent.png", link.parent, "--json")
    assert result.exit_code == 2
    assert [(row["error"], len(row["top"])) for row in json.loads(result.stdout)] == [
        (None, 1),
        *[("no such file", 0)] * 3,
    ]
    nothing = remap("predict", run["run_dir"], "absent.png")
    assert nothing.exit_code == 2 and nothing.message.startswith("no such file or folder")


def test_tables_name_what_a_reader_needs(remap: Callable[..., Result], pictures: Path, tiny: list[str]) -> None:
    result = remap("tune", "--data", pictures, "--method", "linear", *tiny)
    assert result.exit_code == 0, getattr(result, "message", result.output)
    for word in ("student + linear", "accuracy", "trained", "saved size", "remap predict runs/pictures"):
        assert word in result.stdout


def test_every_teacher_has_a_row(
    remap: Callable[..., Result], pictures: Path, tiny: list[str], weak: list[str]
) -> None:
    words = ["--data", pictures, *tiny, *weak, "--teacher", "mini_student,ema:0.5", "--losses", "ce,kd"]
    result = remap("distill", *words, "--method", "linear")
    assert result.exit_code == 0, getattr(result, "message", result.output)
    rows = [line.split()[:2] for line in result.stdout.splitlines()]
    assert [row for row in rows if "teacher" in row] == [["teacher", "1"], ["teacher", "2"]]


def test_progress_goes_on_beside_json(remap: Callable[..., Result], pictures: Path, tiny: list[str]) -> None:
    result = remap("tune", "--data", pictures, "--method", "linear", *tiny, "--dry-run", "--json")
    assert json.loads(result.stdout)["student"]["model"]
    assert "method   linear" in result.stderr and "method   linear" not in result.stdout


def test_options_that_are_not_the_methods_own_are_said(
    remap: Callable[..., Result], pictures: Path, tiny: list[str]
) -> None:
    for method, settings, said in (
        ("vpt_deep", [], "vpt_deep, losses"),
        ("vpt_deep", ["num_prompts=3", "dropout=0.1"], "vpt_deep (num_prompts 3), losses"),
        ("lora", ["targets=[q, k]", "rank=8", "dropout=0.5"], "lora (targets [q, k], dropout 0.5), losses"),
        ("vpt_deep+lora", ["lora.rank=2"], "vpt_deep+lora (lora.rank 2), losses"),
    ):
        words = [word for setting in settings for word in ("--set", f"method.{setting}")]
        result = remap("tune", "--data", pictures, "--method", method, *tiny, *words, "--dry-run")
        assert f"method   {said}" in result.stderr, result.stderr


def test_options_that_are_not_the_losses_own_are_said(watch: Any) -> None:
    said = watch(lambda done: None)
    announce(resolve(words={"teacher": "mini_teacher"}, settings=["data.labels=100"]), said)
    assert "method   lora, losses ce x 0.1, kd x 1 (temperature 2), attention x 1" in said.said


def test_the_test_folder_is_in_the_summary_and_shown(
    remap: Callable[..., Result], pictures: Path, tmp_path: Path, tiny: list[str]
) -> None:
    """The folder's name is no markup either."""
    data = shutil.copytree(pictures, tmp_path / "x[/y]")
    shutil.copytree(data / "val", data / "test")
    result = remap("tune", "--data", data, "--method", "linear", *tiny, "--output", "r")
    assert result.exit_code == 0, getattr(result, "message", result.output)
    share = json.loads((tmp_path / "r" / "summary.json").read_text())["student"]["test_accuracy"]
    assert f"{share:.1%}" in result.stdout.partition("test images")[2]
    assert "y]: accuracy on 12 images" in " ".join(result.stdout.split())


def test_the_dry_run_writes_nothing(
    run_json: Callable[..., dict], pictures: Path, tmp_path: Path, tiny: list[str]
) -> None:
    found = run_json("distill", "--data", pictures, "--method", "vpt_deep", "--dry-run", *tiny)
    assert list(tmp_path.iterdir()) == []
    parts = {row["part"]: row["parameters"] for row in found["trainable"]}
    # vpt_deep: depth 4 x 10 prompts x width 128; head: 128 x 2 weights and 2 biases.
    assert parts == {"vpt_deep": 4 * 10 * 128, "head": 128 * 2 + 2}
    assert found["estimate"]["seconds"] > 0 and found["estimate"]["memory_bytes"] > 0


@pytest.mark.parametrize(("words", "wanted"), [((), True), (("--no-baseline", "--losses", "auto"), False)])
def test_distill_compares_with_labels_only(
    run_json: Callable[..., dict], pictures: Path, tiny: list[str], words: tuple[str, ...], wanted: bool
) -> None:
    tiny = [word for word in tiny if word != "baseline=false"][:-1]
    found = run_json("distill", "--data", pictures, "--dry-run", "--method", "linear", *tiny, *words)
    assert found["recipe"]["baseline"] is wanted
    assert (found["estimate"]["baseline_seconds"] > 0) is wanted
    assert (found["estimate"]["trials_seconds"] > 0) is ("auto" in words)


def test_the_dry_run_says_what_lies_on_the_disk() -> None:
    guess = {"steps": 1, "run_bytes": 27_100_000, "disk_bytes": 27_100_000, "task_bytes": 2_700_000}
    assert _disk(guess) == "27.1 MB (checkpoints + task); saved: 2.7 MB"
    assert _disk(guess | {"disk_bytes": 28_100_000}).startswith("27.1 MB (checkpoints + task) + 1.0 MB of teachers;")
    assert _disk(guess | {"steps": 0}).startswith("27.1 MB (task);")


@pytest.mark.slow
def test_a_dry_run_prints_timms_counts(run_json: Callable[..., dict]) -> None:
    """Source: timm's own counts without head, 21.7 M and 5.5 M; prompts 12 x p x 192 (Jia et al. 2022)."""
    words = ["--teacher", "vit_small", "--student", "vit_tiny", "--method", "vpt_deep", "--weights", "none"]
    found = run_json("distill", *words, "--batch-size", "1", "--dry-run")
    assert found["teacher"]["backbone_parameters"] == 21_665_664
    assert found["student"]["backbone_parameters"] == 5_524_416
    assert found["trainable"][0]["parameters"] == 12 * 10 * 192


@pytest.mark.slow
def test_compare_keeps_finished_cells(
    run_json: Callable[..., dict], pictures: Path, tiny: list[str], weak: list[str]
) -> None:
    words = ["compare", "--methods", "linear,bitfit", "--seeds", "2", "--data", pictures, *tiny, *weak]
    table = run_json(*words)
    cells = sorted(path.name for path in Path(table["output"]).iterdir() if (path / "summary.json").exists())
    assert len(cells) == 2 * 2 * 2
    before = {cell: (Path(table["output"]) / cell / "summary.json").stat().st_mtime_ns for cell in cells}
    assert run_json(*words) == table == json.loads((Path(table["output"]) / "compare.json").read_text())
    assert before == {cell: (Path(table["output"]) / cell / "summary.json").stat().st_mtime_ns for cell in cells}
    row = table["rows"][0]
    assert row["teacher"]["mean"] == pytest.approx(sum(row["teacher"]["accuracies"]) / 2)
    assert [row["category"] for row in table["rows"]] == ["1 fine-tuning", "4 parameter tuning"]


def test_compare_refuses_another_recipes_folder(
    remap: Callable[..., Result], pictures: Path, tiny: list[str], weak: list[str]
) -> None:
    words = ["compare", "--methods", "linear", "--seeds", "1", "--data", pictures, *tiny, *weak, "--output", "cmp"]
    assert remap(*words).exit_code == 0
    other = remap(*words, "--set", "train.weight_decay=0.5")
    assert other.exit_code == 2 and "holds a comparison of another recipe" in other.message
