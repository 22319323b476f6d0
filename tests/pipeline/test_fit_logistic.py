"""``train.fit=logistic``: a student's classifier by logistic regression, without a step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from remap.errors import RecipeError
from remap.pipeline.data_views import DataViews
from remap.pipeline.logistic import STRENGTHS
from remap.pipeline.repeat import repeat
from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task

LOGISTIC = {"method": "linear", "teacher": None, "losses": "ce"}


def _features(views: DataViews, model: Any) -> np.ndarray:
    """By timm's own forward; the student's normalisation is (x / 255 - 0.5) / 0.5."""
    images, _ = views.train.batch(np.arange(len(views.train.split)))
    with torch.no_grad():
        seen = model.forward_head(model.forward_features((images / 255 - 0.5) / 0.5), pre_logits=True)
    return seen.double().numpy()


def test_answers_are_those_of_scikit_learn(tiny: Any, tmp_path: Path) -> None:
    """Expected: the same penalised problem by Newton's method, on standardised features of timm's forward."""
    summary = start(tiny.recipe("train.fit=logistic", **LOGISTIC), tmp_path / "run").summary
    assert summary["epochs"] == 1 and summary["student"]["accuracy"] > 0.9
    network, view = load_task(tmp_path / "run")
    assert network.preprocess.mean == (0.5,) * 3 == network.preprocess.std
    views = SharedResources().open(tiny.recipe(**LOGISTIC).data, view, Silent())
    features, labels = _features(views, network.model.eval()), views.train.split.labels
    standard = (features - features.mean(0)) / features.std(0)
    with torch.no_grad():
        ours = network.model.head(torch.from_numpy(features).float()).double().softmax(-1).numpy()
    solver = {"solver": "newton-cholesky", "tol": 1e-10, "max_iter": 10_000}
    apart = {
        strength: np.abs(LogisticRegression(C=strength, **solver).fit(standard, labels).predict_proba(standard) - ours)
        for strength in STRENGTHS
    }
    assert min(each.max() for each in apart.values()) < 2e-3  # L-BFGS stops at a gradient of 1e-4


def test_the_frozen_rest_stays_and_it_is_repeated_to_the_bit(tiny: Any, tmp_path: Path) -> None:
    start(tiny.recipe("train.fit=logistic", **LOGISTIC), tmp_path / "run")
    assert set(load_file(tmp_path / "run" / "task" / "task.safetensors")) == {"head.weight", "head.bias"}
    assert len(RunDir(tmp_path / "run").metrics()) == 1
    assert repeat(tmp_path / "run", tmp_path / "again", progress=Silent())["equal"]


def test_images_of_several_classes_have_a_regression_each(tiny: Any, tmp_path: Path) -> None:
    rows = [f"{path},{path.parent.name}" for path in sorted((Path(tiny.data) / "train").glob("*/*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["file,labels", *rows]))
    words = {**LOGISTIC, "data": f"csv:{tmp_path / 'labels.csv'},separator=|,folder=/"}
    summary = start(tiny.recipe("train.fit=logistic", "task=multilabel", **words), tmp_path / "run").summary
    assert summary["metric"] == "mAP" and summary["student"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("settings", "more", "says"),
    [
        ((), {"losses": "ce,kd", "teacher": "self"}, "logistic learns from labels alone"),
        (("data.augment=light",), {}, "sees each labelled image once, as it is"),
        (("train.keep=best", "data.selection=0.25"), {}, "no epochs to choose or average"),
        (("student.extends=run",), {}, "knows the new images alone"),
    ],
)
def test_what_it_cannot_follow_is_refused(tiny: Any, settings: tuple[str, ...], more: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        tiny.recipe("train.fit=logistic", *settings, **{**LOGISTIC, **more})
