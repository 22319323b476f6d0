"""Exports answer as the student does, by code that is not remap's: onnxruntime, torch.export, timm and peft."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import remap
from remap.errors import RemapError, RunError
from remap.exporting import check
from remap.exporting.export import export_student
from remap.exporting.format import ExportOptions
from remap.exporting.int8 import require_gate
from remap.exporting.task_source import SourceImages, TaskSource

Finished = Callable[[str], Path]


HAS_ONNX = all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="the extra 'onnx' is not installed")


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
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "export.json", "model.onnx"]

    import onnx

    model = onnx.load(output / "model.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["blue", "green", "red"]
    assert json.loads(metadata["method"])["name"] == method
    assert {item.domain: item.version for item in model.opset_import}[""] == 18

    card = (output / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 20
    blocked = "import sys\nfor name in ('remap', 'torch', 'timm'): sys.modules[name] = None\n"
    pictures = sorted(Path(tiny.data, "val").rglob("*.png"))
    expected = [name for name, _ in remap.load_student(run, "cpu").predict(pictures)]
    loop = f"{blocked}for name in sys.argv[1:]:\n    sys.argv[1] = name\n    exec({code!r})"
    words = [sys.executable, "-c", loop, *map(str, pictures)]
    ran = subprocess.run(words, cwd=output, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == expected


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


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_peft_loads_the_adapter_with_its_classifier(finished: Finished, tmp_path: Path, method: str) -> None:
    """Source: peft's own forward on timm's own model; the check of the export compares with the student."""
    found = export_student(finished(method), "peft", tmp_path / "out")
    config = json.loads((found.output / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"] and config["base_model_name_or_path"].startswith("local-dir:")
    assert found.comparison is not None and found.comparison.same_labels == 9


def test_task_is_copied_as_it_was_sealed(finished: Finished, tmp_path: Path) -> None:
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
    assert student.save(tmp_path / "out", force=True).comparison.images.startswith("9 validation images")
    copied = export_student(tmp_path / "out", "task", tmp_path / "copy")
    assert copied.comparison.images.startswith("random pixels"), "a task folder does not say where its images are"


@pytest.mark.parametrize(
    ("method", "to", "options", "says"),
    [
        ("vpt_deep", "timm", {}, "allowed: --to onnx, torch, task"),
        ("vpt_deep", "peft", {}, "vpt_deep is not a method of PEFT"),
        ("vpt_deep", "openvino", {}, "timmx"),
        ("vpt_deep", "tflite", {}, "unknown format 'tflite'"),
        ("lora", "timm", {"softmax": True}, "allowed: onnx, torch"),
        ("lora", "torch", {"input": "int4"}, "there is no such input"),
        ("lora", "onnx", {"max_drop": 3.0}, "add --int8 static"),
        ("lora", "onnx", {"max_drop": float("nan"), "int8": "static"}, "allowed: 0 to 100"),
    ],
)
def test_what_cannot_be_is_one_error(
    finished: Finished, tmp_path: Path, method: str, to: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RemapError) as caught:
        export_student(finished(method), to, tmp_path / "out", **options)
    assert says in str(caught.value) and not list(tmp_path.iterdir())


def test_an_export_that_answers_otherwise_is_removed(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = check.student_answer
    monkeypatch.setattr(check, "student_answer", lambda *given: lambda views: right(*given)(views) + 2e-3)
    with pytest.raises(RunError, match="answers otherwise"):
        export_student(finished("vpt_deep"), "task", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_force_replaces_nothing_but_an_export(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="is there already"):
        export_student(finished("vpt_deep"), "task", tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


@needs_onnx
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_is_smaller_products_of_bytes(finished: Finished, tmp_path: Path, kind: str) -> None:
    """Source: the types in the file, and the labels of the 9 images (all of which the float student need not know)."""
    found = export_student(finished("vpt_deep"), "onnx", tmp_path / "out", int8=kind, max_drop=100.0)

    import onnx

    model = onnx.load(found.file)
    weights = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8]
    products = {node.op_type for node in model.graph.node}
    assert len(weights) >= 8, "two blocks of four layers each"
    if kind == "static":
        made = {name: node.op_type for node in model.graph.node for name in node.output}
        floats = [n for n in model.graph.node if n.op_type == "MatMul" and made.get(n.input[1]) != "DequantizeLinear"]
        assert len(floats) == 4, "two products of activations in each block's attention"
    assert ("QuantizeLinear" if kind == "static" else "MatMulInteger") in products
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
