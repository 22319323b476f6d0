"""Many tasks in one ONNX file: each output is what the task answers alone, and the backbone is there once."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from remap.errors import RunError
from remap.exporting.task_source import DRAWN
from remap.pipeline.student_api import load_student
from remap.tasks.one_file import FILE, export_tasks
from remap.tasks.shelf import Shelf

MakeTask = Callable[..., Path]
HAS_ONNX = all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))
pytestmark = pytest.mark.skipif(not HAS_ONNX, reason="the extra 'onnx' is not installed")
TASKS = {"birds": "linear", "cars": "linear", "leaves.v2": "lora", "shoes": "vpt_deep"}


def shelf_of(make_task: MakeTask, folder: Path, tasks: dict[str, str]) -> Path:
    for number, (name, method) in enumerate(tasks.items()):
        task = "multilabel" if name == "cars" else "classes"
        Shelf.with_task(folder, name, make_task(name, method, tuple("abcdefg"[: 2 + number]), task=task))
    return folder


@pytest.mark.slow
def test_each_output_is_the_task_alone(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Expected: each task folder by itself, on a backbone of its own (within 1e-5)."""
    shelf = shelf_of(make_task, tmp_path / "shelf", TASKS)
    export_tasks(shelf, tmp_path / "out", input="uint8")

    import onnx
    import onnxruntime

    file = tmp_path / "out" / FILE
    session = onnxruntime.InferenceSession(file)
    views = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    answers = dict(zip(TASKS, session.run(list(TASKS), {"images": views.numpy()}), strict=True))
    for name in TASKS:
        expected = load_student(tmp_path / name, "cpu").logits_of_views(views)
        torch.testing.assert_close(torch.from_numpy(answers[name]), expected, rtol=1e-5, atol=1e-5)
    # Three different networks on the weights of one, and one embedding of patches for all.
    graph = onnx.load(file).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == 1
    backbone = sum(p.numel() for p in load_student(tmp_path / "birds", "cpu").model.parameters())
    assert sum(int(np.prod(one.dims)) for one in graph.initializer) < 1.6 * backbone
    card = (tmp_path / "out" / "README.md").read_text()
    assert "licence: unknown, check" in card and f"{DRAWN} random images" in card
    for name, method in TASKS.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} "))
        assert f'"name": "{method}"' in row and f"{DRAWN} of {DRAWN} labels equal" in row
    # The card's own Python, on a picture.
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    picture = tmp_path / "picture.png"
    named = [name for name, _ in load_student(tmp_path / "cars", "cpu").predict_all([picture])[0]]
    likeliest = load_student(tmp_path / "shoes", "cpu").predict([picture])[0][0]
    for task, said in {"shoes": likeliest, "cars": str(named)}.items():
        monkeypatch.setattr(sys, "argv", ["classify.py", str(picture), task])
        exec(code, {})
        assert capsys.readouterr().out.strip() == said
    assert json.loads((tmp_path / "out" / "export.json").read_text())["tasks"] == list(TASKS)


def test_what_would_share_little_is_refused(make_task: MakeTask, tmp_path: Path) -> None:
    shelf = shelf_of(make_task, tmp_path / "shelf", {"birds": "linear", "cars": "full"})
    with pytest.raises(RunError, match="cars tunes most of the backbone itself"):
        export_tasks(shelf, tmp_path / "out")
    Shelf.with_task(shelf, "near", make_task("near", "linear", crop=0.5))
    with pytest.raises(RunError, match="near takes other images than birds"):
        export_tasks(shelf, tmp_path / "out", tasks=["birds", "near"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [{"softmax": True}, {"int8": "dynamic"}, {"images": 8}])
def test_an_option_of_one_network_s_file_is_refused(make_task: MakeTask, tmp_path: Path, option: dict) -> None:
    shelf = shelf_of(make_task, tmp_path / "shelf", {"birds": "linear"})
    with pytest.raises(RunError, match=f"given:   {next(iter(option))}\n  allowed: input, layout"):
        export_tasks(shelf, tmp_path / "out", input="uint8", **option)
    assert not (tmp_path / "out").exists()
