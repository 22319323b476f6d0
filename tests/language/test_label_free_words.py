"""A student from images and words: no label is used, and what comes out is a run like any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_pairs import Pair, transformers_clip

from remap.pipeline.evaluation import evaluate_run
from remap.pipeline.run import start
from remap.progress import Silent
from remap.recipe import Recipe, resolve_distill
from remap.report.run_report import report_run
from remap.runs.run_dir import RunDir
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
