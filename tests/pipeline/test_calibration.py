"""A teacher's temperature: the one of least cross-entropy on images that were left out of preparing it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from remap.errors import RecipeError
from remap.pipeline.adjusting import best_factor
from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_tuning import data_of_teacher


def test_it_is_the_temperature_of_least_cross_entropy() -> None:
    """Source: SciPy's bounded minimiser of the cross-entropy as torch computes it."""
    draws = torch.Generator().manual_seed(0)
    logits_NC = 4 * torch.randn(200, 5, generator=draws, dtype=torch.float64)
    labels_N = torch.where(torch.rand(200, generator=draws) < 0.7, logits_NC.argmax(1), 0)
    found = minimize_scalar(
        lambda b: float(F.cross_entropy(b * logits_NC, labels_N)), bounds=(0.05, 20), method="bounded"
    )
    assert best_factor(logits_NC, labels_N) == pytest.approx(found.x, abs=1e-4)
    assert best_factor(2 * logits_NC, labels_N) == pytest.approx(found.x / 2, abs=1e-4)


@pytest.mark.parametrize("prepare", ["probe", "linear"])
def test_a_run_fits_it_on_images_that_the_teacher_did_not_see(
    tiny: Any, tmp_path: Path, watch: Any, prepare: str
) -> None:
    """A fifth of 24 training images, one or two of each of three classes."""
    said = watch(lambda done: None)
    settings = ("teacher.calibrate=true", f"teacher.prepare={prepare}", "teacher.allow_weak=true")
    start(tiny.recipe(*settings), tmp_path / "run", said)
    (line,) = [text for text in said.said if "calibrated" in text]
    assert "is calibrated on 5 training images: temperature" in line
    assert np.isfinite(float(line.rpartition(" ")[2]))


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_images_that_judge_the_student_are_not_seen(tiny: Any, share: float) -> None:
    """Neither by the teacher, nor by its temperature, fitted on a fifth of the others, nor by the teachers of folds."""
    settings = ("teacher.calibrate=true", "teacher.folds=2", "train.keep=best", f"data.selection={share}")
    recipe, shared = tiny.recipe(*settings, losses="ce,kd"), SharedResources()
    own = shared.index(recipe.data)
    assert own.selection is not None and recipe.teacher is not None
    for fold in (0, 1, 2):
        data = shared.index(data_of_teacher(recipe, recipe.teacher, fold))
        assert not {*data.train.names, *data.val.names} & set(own.selection.names)
        assert len(data.val) and not set(data.train.names) & set(data.val.names)
        assert fold or {*data.train.names, *data.val.names} == set(own.train.names)


def test_a_run_that_chooses_its_epoch_fits_it_on_others(tiny: Any, tmp_path: Path, watch: Any) -> None:
    """7 of 24 images choose the epoch, and a fifth of the other 17 are 4."""
    said = watch(lambda done: None)
    settings = ("teacher.calibrate=true", "teacher.allow_weak=true", "train.keep=best", "data.selection=0.3")
    start(tiny.recipe(*settings, losses="ce,kd"), tmp_path / "run", said)
    assert [text for text in said.said if "is calibrated on 4 training images: temperature" in text]


def test_trials_of_losses_would_be_judged_by_its_images(tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"teacher\.calibrate: losses: auto judges its trials by the images that"):
        tiny.recipe("teacher.calibrate=true", losses="auto")
