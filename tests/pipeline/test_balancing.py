"""A teacher whose answers are made more even."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from remap.errors import RecipeError
from remap.pipeline.adjusting import shift_of
from remap.pipeline.class_words import probabilities
from remap.pipeline.run import start
from remap.progress import Silent


def test_the_shift_is_a_share_of_the_log_of_the_mean_probability() -> None:
    """Source: the log of the mean probability from log-probabilities, by SciPy."""
    logits_NC = np.random.default_rng(0).normal(0, 3, (50, 4))
    logs_C = logsumexp(log_softmax(logits_NC, axis=1), axis=0) - np.log(50)
    np.testing.assert_allclose(shift_of(logits_NC, 0.5), -0.5 * logs_C, atol=1e-12)
    spread = [probabilities(logits_NC + shift_of(logits_NC, share)).mean(0).std() for share in (0.0, 0.5, 1.0)]
    assert spread == sorted(spread, reverse=True)


def test_a_class_that_is_never_the_answer_is_not_raised_without_bound() -> None:
    logits_NC = np.array([[0.0, 0.0, -1e4]])
    np.testing.assert_allclose(shift_of(logits_NC, 1.0), [np.log(2), np.log(2), np.log(300)])


def test_a_run_says_what_it_did(tiny: Any, tmp_path: Path, watch: Any) -> None:
    said = watch(lambda done: None)
    start(tiny.recipe("teacher.balance=0.5", "teacher.allow_weak=true"), tmp_path / "run", said)
    (line,) = [text for text in said.said if "balanced" in text]
    assert "is balanced on 24 images: the most frequent class had" in line


def test_it_is_refused_where_nothing_reads_logits(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="teacher.balance: is for the logits of a teacher"):
        start(tiny.recipe("teacher.balance=0.5", "losses=ce,feature"), tmp_path / "run", Silent())
