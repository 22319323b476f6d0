"""Exports answer as the student does, by code that is not remap's: onnxruntime, torch.export, timm and peft."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import remap
from remap.data.pixels import Pixels
from remap.data.views import View
from remap.errors import RemapError, RunError
from remap.exporting import export
from remap.exporting.check import Comparison, compare, require_equal
from remap.exporting.export import Exported, export_student, making
from remap.exporting.format import ExportOptions
from remap.exporting.int8 import require_gate
from remap.exporting.int8_training import RoundedInput, RoundedWeight
from remap.exporting.model_card import _code, literal, table
from remap.exporting.task_source import SourceImages, TaskSource
from remap.network import tuned
from remap.pipeline.class_words import write_words
from remap.pipeline.run import start
from remap.progress import Silent
from remap.recipe.schema import DataSpec, ModelSpec
from remap.runs.task import open_backbone, save_task

Finished = Callable[[str], Path]


HAS_ONNX = all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="the extra 'onnx' is not installed")


def test_an_option_that_no_export_has_is_named(finished: Finished) -> None:
    with pytest.raises(RemapError, match="inptu: unknown option; did you mean 'input'?"):
        export_student(finished("linear"), "task", inptu="uint8")


def test_two_classes_that_are_as_likely_may_change_places() -> None:
    """Answers may be off by 1e-4: the first image's two classes are 1e-6 apart, the second one's 1."""
    images = SourceImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None, "two images")
    near, far = torch.tensor([[2.0, 2.000001, 0.0], [2.0, 3.0, 0.0]]), torch.tensor([[2.000001, 2.0, 0.0]] * 2)

    def compared(expected: torch.Tensor, found: torch.Tensor) -> Comparison:
        return compare(lambda views: expected[: len(views)], lambda views: found[: len(views)], images, (1, 1))

    assert compared(near[:1].repeat(2, 1), far).same_labels == 2
    assert compared(near, far).same_labels == 1
    with pytest.raises(RunError, match="answers otherwise"):
        require_equal(compared(near, far), "onnx")


@needs_onnx
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt_deep", {}),
        ("vpt_deep", {"input": "uint8", "layout": "nhwc", "softmax": True}),
        pytest.param("adaptformer", {"input": "uint8"}, marks=pytest.mark.slow),
        pytest.param("lora", {}, marks=pytest.mark.slow),
    ],
)
def test_onnx_runs_without_torch_and_remap(
    finished: Finished, tiny: Any, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """Source: the student's own answers to the files, and a process in which torch and remap cannot be imported."""
    run, output = finished(method), tmp_path / "onnx"
    found = export_student(run, "onnx", output, **options)
    assert found.comparison is not None and found.comparison.count == 9
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "classify.py", "export.json", "model.onnx"]

    import onnx

    model = onnx.load(output / "model.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["blue", "green", "red"]
    assert json.loads(metadata["method"])["name"] == method
    assert {item.domain: item.version for item in model.opset_import}[""] == 18

    assert len(card_code(output).splitlines()) <= 20
    pictures = sorted(Path(tiny.data, "val").rglob("*.png"))
    expected = [name for name, _ in remap.load_student(run, "cpu").predict(pictures)]
    assert classified({output: ("remap", "torch", "timm")}, pictures) == expected


@pytest.mark.slow
def test_the_file_alone_answers_in_a_clean_environment(finished: Finished, tiny: Any, tmp_path: Path) -> None:
    """A virtual environment that holds numpy, Pillow and onnxruntime, as links to those here, and nothing else."""
    run, pictures = finished("vpt_deep"), sorted(Path(tiny.data, "val").rglob("*.png"))
    output = tmp_path / "onnx"
    export_student(run, "onnx", output)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for name in ("numpy", "PIL", "onnxruntime"):
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        here = Path(spec.origin).parent
        (packages / name).symlink_to(here)
        for libraries in here.parent.glob(f"{'pillow' if name == 'PIL' else name}.libs"):
            (packages / libraries.name).symlink_to(libraries)
    python = str(tmp_path / "venv/bin/python")
    assert subprocess.run([python, "-c", "import remap"], capture_output=True, cwd=output).returncode == 1
    expected = [name for name, _ in remap.load_student(run, "cpu").predict(pictures)]
    assert classified({output: ()}, pictures, python) == expected


# Runs the code of each card on each file, in a process that cannot import some packages.
CARDS = """
import os, sys
files = sys.argv[1:]
for folder, code, without in {cards}:
    os.chdir(folder)
    sys.modules.update(dict.fromkeys(without))
    for sys.argv[1] in files:
        exec(code, dict())
    for name in without:
        del sys.modules[name]
"""


def classified(cards: dict[Path, tuple[str, ...]], pictures: list[Path], python: str = sys.executable) -> list[str]:
    """Return what the cards of some folders print in one process, each without the packages it must do without."""
    loop = CARDS.format(cards=[(str(folder), card_code(folder), without) for folder, without in cards.items()])
    ran = subprocess.run([python, "-c", loop, *map(str, pictures)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


def exported_to_peft(base: ModelSpec, folder: Path) -> Exported:
    """Write a task of LoRA with random values on a backbone into ``task``, and its adapter folder into ``out``."""
    network = tuned(open_backbone(base, 3), "lora", {})
    with torch.no_grad():
        for parameter in network.trained.values():
            parameter.add_(torch.randn_like(parameter))
    network.classes = ("blue", "green", "red")
    save_task(folder / "task", network, View(network.preprocess.size, 1.0, "bicubic"), "lora", {})
    return export_student(folder / "task", "peft", folder / "out")


@pytest.mark.slow
def test_cards_classify_without_remap(finished: Finished, tiny: Any, tmp_path: Path) -> None:
    """Source: the student's own labels of one validation picture a class; a card loads the model for each.

    One process for all, which imports torch once; the first card must do without timm too.
    """
    run, pictures = finished("lora"), sorted(Path(tiny.data, "val").rglob("*.png"))[::3]
    without = {"torch": ("remap", "timm"), "timm": ("remap",), "peft": ("remap",)}
    cards = {export_student(run, to, tmp_path / to).output: names for to, names in without.items()}
    assert all(len(card_code(folder).splitlines()) <= 25 for folder in cards)
    expected = [name for name, _ in remap.load_student(run, "cpu").predict(pictures)]
    assert classified(cards, pictures) == 3 * expected


def test_torch_program_takes_any_batch(finished: Finished, tmp_path: Path) -> None:
    run = finished("vpt_deep")
    found = export_student(run, "torch", tmp_path / "out", input="uint8")
    extra = {"metadata.json": ""}
    program = torch.export.load(found.file, extra_files=extra).module()
    views = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    torch.testing.assert_close(
        program(views), remap.load_student(run, "cpu").logits_of_views(views), rtol=1e-4, atol=1e-5
    )
    assert json.loads(extra["metadata.json"])["classes"] == ["blue", "green", "red"]


def test_timm_folder_is_a_model_of_timm(finished: Finished, tmp_path: Path) -> None:
    """Source: timm builds it from the folder alone, and its own preprocessing is the run's."""
    run = finished("lora")
    student = remap.load_student(run, "cpu")
    found = student.export("timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{found.output}", pretrained=True).eval()
    assert list(model.pretrained_cfg["label_names"]) == ["blue", "green", "red"]
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], tuple(config["mean"]), config["crop_pct"]) == ((3, 16, 16), (0.5, 0.5, 0.5), 1.0)
    views = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    expected = student.logits_of_views(views)
    with torch.no_grad():
        torch.testing.assert_close(model(views / 127.5 - 1), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student.merge()(views / 127.5 - 1), expected, rtol=1e-4, atol=1e-5)
        assert any("remap_" in name for name, _ in student.model.named_parameters()), "merge left the student alone"


@pytest.mark.parametrize("method", ["lora", "ia3", "hira"])
def test_peft_loads_the_adapter_with_its_classifier(finished: Finished, tmp_path: Path, method: str) -> None:
    """Source: peft's own forward on timm's own model; the check of the export compares with the student."""
    found = export_student(finished(method), "peft", tmp_path / "out")
    config = json.loads((found.output / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"] and config["base_model_name_or_path"].startswith("local-dir:")
    assert found.comparison is not None and found.comparison.same_labels == 9


@pytest.mark.parametrize("layout", ["timm's", "of a script"])
def test_the_card_says_which_file_the_weights_are_of(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """And its Python takes that file, where timm reads it; the student's own answer is expected."""
    folder = Path(tiny.student.removeprefix("local-dir:"))
    state = {name: tensor + 0.1 for name, tensor in load_file(folder / "model.safetensors").items()}
    if layout == "of a script":
        state = {f"student.backbone.{name}": tensor for name, tensor in state.items()}
    weights = tmp_path / "elsewhere" / "mine.safetensors"
    weights.parent.mkdir()
    save_file(state, weights)
    found = exported_to_peft(ModelSpec(model=tiny.student, weights=str(weights)), tmp_path)
    card, digest = (found.output / "README.md").read_text(), hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"weights of the file mine.safetensors (SHA-256 {digest}), licence: unknown, check" in card
    assert str(weights.parent) not in card and found.record["base_weights"] == "mine.safetensors"
    if layout == "of a script":
        assert "```python" not in card
        return
    shutil.copy(weights, found.output)
    monkeypatch.chdir(found.output)
    picture, known = next(Path(tiny.data, "val").rglob("*.png")), dict[str, Any]()
    monkeypatch.setattr(sys, "argv", ["classify.py", str(picture)])
    exec(card_code(found.output), known)
    answer = known["model"](torch.from_numpy(known["images"]))
    expected = remap.load_student(tmp_path / "task", "cpu").logits([picture])
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_card_opens_a_base_model_that_timm_does_not_have(tiny: Any, tmp_path: Path) -> None:
    """That of the shipped student, in a process that has imported nothing of remap; the student's own labels."""
    found = exported_to_peft(ModelSpec(model="mini_student"), tmp_path)
    pictures = sorted(Path(tiny.data, "val").rglob("*.png"))[::3]
    expected = [name for name, _ in remap.load_student(tmp_path / "task", "cpu").predict(pictures)]
    assert classified({found.output: ()}, pictures) == expected


def test_task_is_copied_as_it_was_sealed(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished("vpt_deep")
    student = remap.load_student(run, "cpu")
    student.save(tmp_path / "out")
    for name in ("task.json", "task.safetensors"):
        assert (tmp_path / "out" / "task" / name).read_bytes() == (run / "task" / name).read_bytes()
    views = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    again = remap.load_student(tmp_path / "out", "cpu").logits_of_views(views)
    assert torch.equal(again, student.logits_of_views(views))
    with pytest.raises(RunError, match="is there already"):
        student.save(tmp_path / "out")
    assert student.save(tmp_path / "out", force=True).comparison.images.startswith("9 evaluation images")
    monkeypatch.chdir(tmp_path / "out")
    copied = export_student(".", "task", tmp_path / "copy")
    assert "# out: 3 classes" in (tmp_path / "copy" / "README.md").read_text()
    assert copied.comparison.images.startswith("random pixels"), "a task folder does not say where its images are"


@pytest.mark.parametrize(
    ("method", "to", "options", "says"),
    [
        ("vpt_deep", "timm", {}, "allowed: --to onnx, torch, task"),
        ("vpt_deep", "peft", {}, "vpt_deep is not a method of PEFT"),
        ("vpt_deep", "openvino", {}, "timmx"),
        ("vpt_deep", "tflite", {}, "unknown format 'tflite'"),
        ("lora", "timm", {"softmax": True}, "given:   --softmax\n  allowed: onnx, torch"),
        ("lora", "timm", {"input": "uint8"}, "given:   --input uint8\n"),
        ("lora", "torch", {"input": "int4"}, "there is no such input"),
        ("lora", "onnx", {"max_drop": 3.0}, "add --int8 static"),
        ("lora", "onnx", {"int8_epochs": 5, "int8": "static"}, "--int8-epochs is for --int8 qat"),
        ("lora", "onnx", {"int8_epochs": 3}, "--int8-epochs is for --int8 qat"),  # also as many as without it
        ("lora", "onnx", {"max_drop": 1.0}, "add --int8 static"),
        ("lora", "onnx", {"images": None}, "--images is a number of images"),
        ("lora", "onnx", {"max_drop": float("nan"), "int8": "static"}, "allowed: 0 to 100"),
    ],
)
def test_what_cannot_be_is_one_error(
    finished: Finished, tmp_path: Path, method: str, to: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RemapError) as caught:
        export_student(finished(method), to, tmp_path / "out", **options)
    assert says in str(caught.value) and not list(tmp_path.iterdir())


def test_int8_of_a_task_folder_is_refused_before_anything_is_written(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remap.exporting.onnx_file.OnnxFile.write", lambda *_: pytest.fail("written"))
    with pytest.raises(RunError, match="does not say where its images are\n.*name the run directory"):
        export_student(finished("lora") / "task", "onnx", tmp_path / "out", int8="static")


@pytest.mark.parametrize("to", ["timm", "peft"])
def test_weights_can_be_read_by_whom_the_folder_can(finished: Finished, tmp_path: Path, to: str) -> None:
    """As the umask says, where the safetensors library writes for its user alone."""
    export_student(finished("lora"), to, tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_an_export_that_answers_otherwise_is_removed(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.student_answer
    monkeypatch.setattr(export, "student_answer", lambda *given: lambda views: right(*given)(views) + 2e-3)
    with pytest.raises(RunError, match="answers otherwise"):
        export_student(finished("vpt_deep"), "task", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_force_replaces_nothing_but_an_export(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="is there already\n  given:   --force replaces exports alone"):
        export_student(finished("vpt_deep"), "task", tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    export_student(finished("vpt_deep"), "task", tmp_path / "out")
    (tmp_path / "out" / "task" / "notes.txt").write_text("of a user")
    with pytest.raises(RunError, match=r"did not write(.|\n)*task/notes.txt"):
        export_student(finished("vpt_deep"), "task", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "task" / "notes.txt").read_text() == "of a user"


def test_an_empty_folder_is_filled(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run directory may be. It stays the same folder, which may be a mount, or where a shell is."""
    run, mine = finished("vpt_deep"), tmp_path / "mine"
    mine.mkdir()
    before = mine.stat().st_ino
    monkeypatch.chdir(mine)
    export_student(run, "task", ".")
    assert sorted(path.name for path in mine.iterdir()) == ["README.md", "classify.py", "export.json", "task"]
    assert mine.stat().st_ino == before and list(tmp_path.iterdir()) == [mine]
    assert remap.load_student(mine, "cpu").classes == ("blue", "green", "red")
    export_student(run, "task", tmp_path / "new")
    with pytest.raises(RunError, match="is there already"):
        export_student(run, "task", ".")
    export_student(run, "task", ".", force=True)
    assert (mine / "export.json").is_file() and list(mine.parent.glob(".*")) == []


def test_what_came_into_the_folder_meanwhile_stays(finished: Finished, tmp_path: Path) -> None:
    for made_before in (True, False):
        output = tmp_path / f"mine-{made_before}"
        if made_before:
            output.mkdir()
        with pytest.raises(RunError, match="Directory not empty"), making(output, force=False) as folder:
            folder.mkdir()
            (folder / "model").touch()
            output.mkdir(exist_ok=True)
            (output / "letter.txt").write_text("dear")
        assert [path.name for path in output.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("force", [True, False])
def test_an_export_whose_replacement_was_killed_is_there_again(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """The process was killed between two renames: it left the earlier export and the new one beside the place."""
    export_student(finished("vpt_deep"), "task", tmp_path / "out")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "out").rename(tmp_path / f".out.{ended.pid}.old")
    (tmp_path / f".out.{ended.pid}.tmp").mkdir()
    running = tmp_path / f".out.{os.getppid()}.tmp"  # of another process, which still writes
    running.mkdir()
    if force:
        export_student(finished("vpt_deep"), "task", tmp_path / "out", force=True)
    else:
        with pytest.raises(RunError, match="is there already"):
            export_student(finished("vpt_deep"), "task", tmp_path / "out")
    assert remap.load_student(tmp_path / "out", "cpu").classes == ("blue", "green", "red")
    assert sorted(path.name for path in tmp_path.iterdir()) == [running.name, "out"]


def test_a_student_on_a_folder_of_the_name_of_cut_ones_is_copied(tiny: Any, tmp_path: Path) -> None:
    """`remap shrink --output X/student_model` makes such a folder, which belongs to no run."""
    shutil.copytree(tiny.student.removeprefix("local-dir:"), tmp_path / "student_model")
    words = {"student": f"local-dir:{tmp_path / 'student_model'}", "teacher": None, "losses": "ce", "method": "linear"}
    start(tiny.recipe("train.epochs=1", **words), tmp_path / "runs" / "run")
    export_student(tmp_path / "runs" / "run", "task", tmp_path / "out")
    assert remap.load_student(tmp_path / "out", "cpu").classes == ("blue", "green", "red")


def test_names_begin_no_markup() -> None:
    """Source: CommonMark 0.31, 2.4: a backslash before punctuation makes it literal."""
    assert literal("<b>cat</b> [x](y) `z` *w* a_b") == r"\<b>cat\</b> \[x](y) \`z\` \*w\* a_b"
    assert _code("a") == "`a`" and _code("a `b`` c") == "``` a `b`` c ```"


@pytest.mark.parametrize(("images", "epochs"), [(0, 3), ("9", 3), (9, 0), (9, 1.5)])
def test_numbers_of_an_export_are_whole(finished: Finished, tmp_path: Path, images: Any, epochs: Any) -> None:
    with pytest.raises(RunError, match=r"is a number of (images|epochs)"):
        export_student(finished("vpt_deep"), "onnx", tmp_path / "out", images=images, int8="qat", int8_epochs=epochs)


def test_a_bar_in_a_name_stays_in_its_cell() -> None:
    """Source: GitHub Flavored Markdown, 4.10: a cell holds a bar that is escaped."""
    assert table([("classes", "cat|dog, a\nb")])[2:] == [r"| classes | cat\|dog, a\nb |"]


def _task(folder: Path, channels: int, pixels: Pixels) -> Path:
    """A task folder of a tiny network of so many channels, drawn at random."""
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": channels}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **shape)
    values = {"mean": (0.4,) * channels, "std": (0.3,) * channels}
    model.pretrained_cfg.update(input_size=(channels, 16, 16), crop_pct=1.0, **values)
    save_for_hf(model, str(folder / "model"), model_args=shape, safe_serialization=True)
    network = tuned(open_backbone(ModelSpec(model=f"local-dir:{folder / 'model'}"), 3), "lora", {})
    with torch.no_grad():
        for parameter in network.trained.values():
            parameter.add_(torch.randn_like(parameter))
    network.classes = ("a", "b", "c")
    save_task(folder / "task", network, View(16, 0.8, "bicubic", pixels), "lora", {})
    return folder / "task"


def _here(folder: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the card's Python on each file, in this process."""
    monkeypatch.chdir(folder)
    for file in files:
        monkeypatch.setattr(sys, "argv", ["classify.py", str(file)])
        exec(card_code(folder), {})


def test_the_card_reads_images_of_many_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Expected: the student's own label of a 16-bit array of five channels."""
    task, draws = _task(tmp_path, 5, Pixels(channels=5)), np.random.default_rng(0)
    files = [tmp_path / f"{number}.npy" for number in range(6)]
    for number, file in enumerate(files):
        np.save(file, draws.integers(0, 9_000 * (number + 1), (20, 24, 5)).astype(np.uint16))
    export_student(task, "torch", tmp_path / "out")
    _here(tmp_path / "out", files, monkeypatch)
    found = capsys.readouterr().out.split()
    assert found == [name for name, _ in remap.load_student(task, "cpu").predict(files)]
    assert len(set(found)) > 1


def test_the_card_makes_greys_for_a_student_of_greys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher in colours has its student's views in colours too; a model of timm takes greys alone."""
    task, draws = _task(tmp_path, 1, Pixels()), np.random.default_rng(0)
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for number, file in enumerate(files):
        Image.fromarray(draws.integers(0, 60 * (number + 1), (20, 24, 3)).astype(np.uint8)).save(file)
    export_student(task, "timm", tmp_path / "out")
    _here(tmp_path / "out", files, monkeypatch)
    found = capsys.readouterr().out.split()
    assert found == [name for name, _ in remap.load_student(task, "cpu").predict(files)]
    assert len(set(found)) > 1


def test_the_card_refuses_colours_whose_values_it_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 bits in 16, Pillow's upper 8 are nearly black. The file is a PNG of one pixel (PNG 3, section 11.2)."""
    task = _task(tmp_path, 3, Pixels(value_range=(0.0, 4095.0)))
    head, rows = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), zlib.compress(b"\0" + struct.pack(">3H", 4000, 9, 9))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "wide.png").write_bytes(content)
    export_student(task, "torch", tmp_path / "out")
    with pytest.raises(AssertionError, match="colours of 16 bits: remap predict reads them"):
        _here(tmp_path / "out", [tmp_path / "wide.png"], monkeypatch)


TIMMX = """
import shutil
class TimmxError(Exception): ...
def export_model(runtime, name, *, pretrained, output):
    shutil.copytree(name.removeprefix("local-dir:"), output)
"""
OPENVINO = """
import timm, torch
class Core:
    def compile_model(self, path, device):
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        return lambda images: [model(torch.from_numpy(images)).detach().numpy()]
"""


def test_the_card_of_openvino_reads_a_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins for timmx and OpenVINO, with their calls; expected: the student's own labels."""
    (tmp_path / "timmx.py").write_text(TIMMX)
    (tmp_path / "openvino.py").write_text(OPENVINO)
    monkeypatch.syspath_prepend(tmp_path)
    task, draws = _task(tmp_path, 3, Pixels()), np.random.default_rng(0)
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for number, file in enumerate(files):
        Image.fromarray(draws.integers(0, 60 * (number + 1), (20, 24, 3)).astype(np.uint8)).save(file)
    export_student(task, "openvino", tmp_path / "out")
    assert (
        "| input | float32, (pixel / 255 - mean) / std, 1 x 3 x 16 x 16 |" in (tmp_path / "out/README.md").read_text()
    )
    _here(tmp_path / "out", files, monkeypatch)
    found = capsys.readouterr().out.split()
    assert found == [name for name, _ in remap.load_student(task, "cpu").predict(files)]
    assert len(set(found)) > 1
    for name in ("timmx", "openvino"):
        monkeypatch.delitem(sys.modules, name)


def test_the_script_beside_the_card_is_its_python_and_is_replaced_with_it(tmp_path: Path) -> None:
    task, output = _task(tmp_path, 3, Pixels()), tmp_path / "out"
    export_student(task, "timm", output)
    assert (output / "classify.py").read_text().rstrip() == card_code(output).rstrip()
    export_student(task, "timm", output, force=True)
    (output / "mine.txt").touch()
    with pytest.raises(RunError, match="files that the export did not write"):
        export_student(task, "timm", output, force=True)


def card_code(folder: Path) -> str:
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("kind", ["qat", "dynamic"])
def test_int8_is_smaller_products_of_bytes(finished: Finished, tmp_path: Path, kind: str) -> None:
    """Source: the types in the file, and the labels of the 9 images (all of which the float student need not know)."""
    found = export_student(finished("vpt_deep"), "onnx", tmp_path / "out", int8=kind, max_drop=100.0)

    import onnx

    model = onnx.load(found.file)
    weights = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1]
    products = {node.op_type for node in model.graph.node}
    assert len(weights) == 8, "two blocks of four layers each; the first and the last layer stay in float32"
    if kind == "qat":
        made = {name: node.op_type for node in model.graph.node for name in node.output}
        floats = [n for n in model.graph.node if n.op_type == "MatMul" and made.get(n.input[1]) != "DequantizeLinear"]
        assert len(floats) == 4, "two products of activations in each block's attention"
    assert ("QuantizeLinear" if kind == "qat" else "MatMulInteger") in products
    assert "classes" in {entry.key for entry in model.metadata_props}
    assert found.record["int8"]["kind"] == kind and found.record["int8"]["images"] == 9


def test_the_gate_counts_what_is_lost(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images of each class: three of "green" lost are 10 points of all 30 images and 30 of the class."""
    source = TaskSource(finished("vpt_deep"))
    labels = np.repeat(np.arange(3), 10)
    right = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).float()
    wrong = right.clone()
    wrong[10:13] = torch.tensor([1.0, 0.0, 0.0])
    images = SourceImages(torch.zeros(30, 3, 16, 16, dtype=torch.uint8), labels, "30 images")
    monkeypatch.setattr("remap.exporting.int8.student_answer", lambda *given: lambda views: right)
    report = require_gate(source, lambda views: wrong, images, ExportOptions(max_drop=20.0))
    assert report.accuracy == (1.0, 0.9) and report.worst_class == ("green", 30.0) and report.agreement == 0.9
    # One image of a class of one must not hide three of ten: here "blue" has one image, and it is lost too.
    few = SourceImages(torch.zeros(21, 3, 16, 16, dtype=torch.uint8), labels[9:], "21 images")
    lost = torch.cat([torch.tensor([[0.0, 0.0, 1.0]]), wrong[10:]])
    monkeypatch.setattr("remap.exporting.int8.student_answer", lambda *given: lambda views: right[9:])
    with pytest.raises(RunError, match="class green loses 30.0 points"):
        require_gate(source, lambda views: lost, few, ExportOptions(max_drop=19.9))
    monkeypatch.setattr("remap.exporting.int8.student_answer", lambda *given: lambda views: right)
    for allowed in (9.9, 19.9):  # of all images; and of the class, where one of the three may go
        with pytest.raises(RunError, match="costs more accuracy"):
            require_gate(source, lambda views: wrong, images, ExportOptions(max_drop=allowed))


def test_rounding_while_training() -> None:
    """Source: the affine map of Jacob et al. 2018 (arXiv 1712.05877), equation 1, in float64 of NumPy."""
    draws = np.random.default_rng(0)
    weight, values = draws.normal(size=(3, 4)), draws.normal(1.0, 1.0, size=(5, 4))
    scales = np.abs(weight).max(axis=1, keepdims=True) / 127
    found = RoundedWeight()(torch.tensor(weight, dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), np.rint(weight / scales) * scales, atol=1e-6)
    inputs = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    (rounded,) = RoundedInput()(torch.nn.Identity(), (inputs,))
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    scale = (high - low) / 255
    zero = np.rint(-128 - low / scale)
    steps = np.clip(np.rint(values / scale) + zero, -128, 127)
    np.testing.assert_allclose(rounded.detach().numpy(), (steps - zero) * scale, atol=1e-6)
    rounded.sum().backward()
    assert inputs.grad is not None and inputs.grad.sum() >= 19, "gradients pass where nothing is clipped"


def test_texts_that_a_student_needs_are_read_before_it_is_traced(tmp_path: Path) -> None:
    """A task of ``cocoop``, just opened, has not read its text tower yet."""
    backbone = open_backbone(ModelSpec(model="clip:mini"), 2)
    write_words(backbone, DataSpec(), ("ant", "bee"), Silent())
    network = tuned(backbone, "cocoop", {})
    network.classes = ("ant", "bee")
    save_task(tmp_path / "task", network, View(network.preprocess.size, 1.0, "bicubic"), "cocoop", {})
    comparison = export_student(tmp_path / "task", "torch", tmp_path / "out").comparison
    assert comparison is not None and comparison.difference < 1e-4


@pytest.mark.parametrize("to", ["timm", "peft"])
def test_the_image_tower_of_a_pair_is_not_a_model_of_timm(tmp_path: Path, to: str) -> None:
    """Why, and what takes it instead."""
    network = tuned(open_backbone(ModelSpec(model="clip:mini"), 2), "lora", {})
    network.classes, size = ("ant", "bee"), network.preprocess.size
    save_task(tmp_path / "task", network, View(size, 1.0, "bicubic"), "lora", {})
    with pytest.raises(RunError) as caught:
        export_student(tmp_path / "task", to, tmp_path / to)
    assert "the image tower of a vision-language model" in caught.value.what
    assert "behind the projection into the space of the texts" in str(caught.value.given)
    assert caught.value.allowed == "--to onnx, torch, task" and not (tmp_path / to).exists()
    assert export_student(tmp_path / "task", "torch", tmp_path / "torch").comparison is not None
