"""A student from images and words: no label is used, and what comes out is a run like any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pairs import Pair, transformers_clip

from remap.errors import RunError
from remap.pipeline.evaluate_run import evaluate_run
from remap.pipeline.run import start
from remap.pipeline.student_api import load_student
from remap.progress import Silent
from remap.recipe import Recipe, resolve_distill
from remap.report.run_report import report_run
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task
from remap_cli import run_summary

WORDS = "green,red|hat,blue"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return transformers_clip(tmp_path_factory.mktemp("pairs") / "clip")


def recipe(tiny: Any, pair: Pair, *settings: str, **words: object) -> Recipe:
    words = {
        "student": tiny.student, "teacher": pair.word, "unlabeled": f"{tiny.data}/train", "classes": WORDS,
        "method": "lora", **words,
    }  # fmt: skip
    return resolve_distill(None, words, [*tiny.SETTINGS, *settings])


def test_words_alone_make_a_classifier(
    tiny: Any, pair: Pair, tmp_path: Path, watch: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = watch(lambda _step: None)
    result = start(recipe(tiny, pair), tmp_path / "run", seen)
    student, data, teacher = (result.summary[name] for name in ("student", "data", "teacher"))
    assert (student["accuracy"], data["classes"], data["labeled_images"], data["train_images"]) == (None, 3, 0, 24)
    assert set(result.summary["final_losses"]) == {"loss", "kd"} and teacher["head"] == "words"
    assert [name for name, *_ in teacher["answers"]["classes"]] == ["green", "red", "blue"]
    assert np.isclose(sum(share for _, share, _ in teacher["answers"]["classes"]), 1.0, atol=1e-3)
    assert any("the teacher's answers on 24 images without labels" in line for line in seen.said)
    # It is shown, reported, evaluated by labels from elsewhere, and exported, as any run.
    run_summary.show(dict(result.summary))
    assert "24 images without labels" in capsys.readouterr().out
    assert "no evaluation image has a label" in report_run(RunDir(tmp_path / "run"), pngs=False).read_text()
    found = evaluate_run(tmp_path / "run", f"{tiny.data}/val", False, Silent())
    assert found["images"] == 9 and [row["class"] for row in found["classes"]] == ["green", "red", "blue"]
    with pytest.raises(RunError, match="no evaluation images"):
        evaluate_run(tmp_path / "run", None, False, Silent())
    exported = load_student(tmp_path / "run").export("torch", tmp_path / "program", input="uint8")
    assert exported.file.is_file() and exported.comparison is not None


def test_a_student_of_words_starts_as_the_zero_shot_classifier(tiny: Any, pair: Pair, tmp_path: Path) -> None:
    """Labels elsewhere judge it: before training it answers as the teacher, which is the same model."""
    words = {"student": pair.word, "val_data": f"{tiny.data}/val"}
    result = start(recipe(tiny, pair, "teacher.allow_weak=true", "data.templates=clip", **words), tmp_path / "run")
    student, teacher = result.summary["student"], result.summary["teacher"]
    assert student["initial_accuracy"] == teacher["accuracy"] and result.summary["data"]["val_images"] == 9
    assert all(name.startswith(("blocks.", "head.classifier.")) for name in result.summary["trainables"])
    images = torch.randn(3, 3, 32, 32)
    again, _ = load_task(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(again.model.eval()(images), result.student.model.eval()(images))
    assert pair.word == again.identity.model and again.classes == ("green", "red", "blue")


def test_few_labels_and_words_have_a_classifier_each(tiny: Any, pair: Pair, tmp_path: Path) -> None:
    settings = ("data.labels=6", "teacher.allow_weak=true", "baseline=false")
    words = {"data": tiny.data, "unlabeled": None, "method": "lora+dual_head", "losses": "ce,kd"}
    result = start(recipe(tiny, pair, *settings, **words), tmp_path / "run")
    assert result.summary["data"]["labeled_images"] == 6 and result.summary["data"]["train_images"] == 24
    again, _ = load_task(tmp_path / "run")
    model, images = again.model.eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(logits, result.student.model.eval()(images))
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(3))  # probabilities, mixed
    head = model.get_submodule("head")
    assert not torch.equal(head.weight, head.get_submodule("remap_dual_head").weight), "each learned its own"
