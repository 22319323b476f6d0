"""A teacher whose answers are made less sure, and where that is the default."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remap.errors import RecipeError
from remap.pipeline.adjusting import soften
from remap.pipeline.run import start
from remap.pipeline.student_api import load_student
from remap.progress import Silent
from remap.recipe import load, resolve


@pytest.fixture(scope="module")
def teacher(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classifier is as sure as one of many steps."""
    path = tmp_path_factory.mktemp("softening") / "teacher"
    start(tiny.recipe("train.epochs=4", "train.lr=0.3", method="linear", losses="ce", teacher=None), path)
    return path


def test_logits_are_divided_down_to_the_limit_and_no_further(teacher: Path, tiny: Any) -> None:
    """Source: the standard deviations from the student's own logits, by numpy."""
    from remap.data.sources import open_data
    from remap.data.views import ViewSource

    student = load_student(teacher, "cpu")
    data = open_data(load(teacher / "recipe.yaml").data.source, None, 0.2)
    source = ViewSource(data.train, student.view, memory_bytes=0.0)
    views = torch.stack([torch.from_numpy(student.view.read(data.train.read(i))) for i in range(len(data.train))])
    before = student.logits_of_views(views).double().numpy()
    expected = before.std(axis=1, ddof=1).mean()
    assert soften(student.network, source, 2 * expected, 8, Silent()) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(student.logits_of_views(views).double().numpy(), before)
    assert soften(student.network, source, expected / 4, 8, Silent()) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(student.logits_of_views(views).double().numpy(), before / 4, rtol=1e-4, atol=1e-5)


def test_it_is_the_default_of_runs_where_all_images_have_labels(teacher: Path, tmp_path: Path) -> None:
    data = {"source": str(tmp_path)}

    def softened(settings: tuple[str, ...] = (), **words: Any) -> float | None:
        return resolve(
            None, {"data": data, "teacher": str(teacher), "method": "lora", **words}, settings
        ).teacher.soften

    assert softened() == 2.5 and softened(("teacher.soften=null",)) is None and softened(("teacher.soften=4",)) == 4.0
    assert softened(losses="ce,kd") is None and softened(losses="auto") is None
    assert softened(("data.labels=20",)) is None and softened(unlabeled=str(tmp_path)) is None
    assert softened(teacher="mini_teacher") is None


def test_a_run_says_what_it_did_and_its_recipe_has_it(teacher: Path, tiny: Any, tmp_path: Path, watch: Any) -> None:
    said = watch(lambda done: None)
    settings = ("teacher.soften=0.01", "teacher.allow_weak=true", "train.epochs=1")
    start(tiny.recipe(*settings, teacher=str(teacher)), tmp_path / "run", said)
    (line,) = [text for text in said.said if "softened" in text]
    assert "the standard deviation of its logits over the classes was" in line and line.endswith("now 0.01")
    assert load(tmp_path / "run" / "recipe.yaml").teacher.soften == 0.01


def test_it_is_refused_where_nothing_reads_logits(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="teacher.soften: is for the logits of a teacher"):
        start(tiny.recipe("teacher.soften=2.5", "losses=ce,feature"), tmp_path / "run", Silent())
