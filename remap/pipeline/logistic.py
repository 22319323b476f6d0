"""Logistic regression on features (scikit-learn, L-BFGS), its penalty chosen on a held-out fifth of the images.

Letters: N images, D features, C classes.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from remap.data.stratify import stratified
from remap.engine.multilabel import average_precision
from remap.progress import Step

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

# Inverse strengths of the L2 penalty that are tried on a fifth of the training images.
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
# Of a class that all images have, or none: as sure as a logit of this size.
_SURE = 20.0


@dataclass(frozen=True)
class Probe:
    """A logistic regression on standardised features; ``strength`` is the inverse of its penalty."""

    model: "LogisticRegression"
    mean_D: np.ndarray
    std_D: np.ndarray
    strength: float

    def predict(self, features_ND: np.ndarray) -> np.ndarray:
        """Return the class of each image (N,)."""
        return self.model.predict((features_ND - self.mean_D) / self.std_D)

    def rows(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Return weights (C, D) and constants (C,) on raw features; of two classes one row is worth -z/2 and +z/2."""
        coefficients, intercept = self.model.coef_, self.model.intercept_
        # Of two classes scikit-learn has one logit z; the softmax of -z/2 and z/2 is its sigmoid.
        if len(coefficients) == 1:
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercept = np.concatenate([-intercept, intercept]) / 2
        # Back on raw features. A class without readable training images gets a logit that never wins.
        weight, bias = np.zeros((classes, len(self.mean_D))), np.full(classes, intercept.min() - 20.0)
        weight[self.model.classes_] = coefficients / self.std_D
        bias[self.model.classes_] = intercept - (coefficients / self.std_D) @ self.mean_D
        return weight, bias


def fit_logistic(features_ND: np.ndarray, labels_N: np.ndarray, step: Step | None = None) -> Probe:
    """Fit a probe with the penalty that does best on a held-out fifth of these images.

    Args:
        step: Advanced for each of the fits, one more than ``STRENGTHS``.
    """
    # A feature that is equal in all images has a deviation of 0.
    mean_D, std_D = features_ND.mean(0), features_ND.std(0) + 1e-6
    # L2 penalties compare weights, so features need one scale.
    standard_ND = (features_ND - mean_D) / std_D
    advance = step.advance if step is not None else lambda: None
    best = _choose(standard_ND, labels_N, advance)
    # Once more, on all images: a fifth was held out for the choice alone.
    model = _fit(best, standard_ND, labels_N)
    advance()
    return Probe(model, mean_D, std_D, best)


def _choose(standard_ND: np.ndarray, labels_N: np.ndarray, advance: Callable[[], None]) -> float:
    """Return the inverse strength that does best on a fifth of the images; 1 where a class has a single image."""
    # A class with one image cannot be both fitted and checked.
    if np.unique(labels_N, return_counts=True)[1].min() < 2:
        return 1.0
    # The evaluation split stays unseen: it judges the teacher later.
    fit, check = stratified(labels_N, round(0.8 * len(labels_N)))
    scores = []
    for strength in STRENGTHS:
        model = _fit(strength, standard_ND[fit], labels_N[fit])
        scores.append(model.score(standard_ND[check], labels_N[check]))
        advance()
    # Of equal ones the first, which has the strongest penalty.
    return STRENGTHS[int(np.argmax(scores))]


@dataclass(frozen=True)
class EachClass:
    """A logistic regression for each class against the rest; see ``Probe``."""

    weight_CD: np.ndarray
    bias_C: np.ndarray
    strength: float

    def rows(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Return weights (C, D) and constants (C,) on raw features."""
        assert classes == len(self.bias_C)
        return self.weight_CD, self.bias_C


def fit_each_class(features_ND: np.ndarray, labels_NC: np.ndarray, step: Step | None = None) -> EachClass:
    """Fit one yes or no for each class, all with the penalty whose mean average precision is best on a held-out fifth.

    Args:
        labels_NC: Multi-hot.
        step: As for ``fit_logistic``.
    """
    mean_D, std_D = features_ND.mean(0), features_ND.std(0) + 1e-6
    standard_ND = (features_ND - mean_D) / std_D
    fit, check = stratified(labels_NC, round(0.8 * len(labels_NC)))
    # A class without a held-out image has no average precision.
    known_C = np.flatnonzero(labels_NC[check].any(axis=0))
    best, scores = 1.0, []
    if len(known_C):
        for strength in STRENGTHS:
            weight_CD, bias_C = _each(strength, standard_ND[fit], labels_NC[fit])
            logits_NC = standard_ND[check] @ weight_CD.T + bias_C
            scores.append(np.mean([average_precision(logits_NC[:, c], labels_NC[check, c] == 1) for c in known_C]))
            if step is not None:
                step.advance()
        best = STRENGTHS[int(np.argmax(scores))]
    weight_CD, bias_C = _each(best, standard_ND, labels_NC)
    if step is not None:
        step.advance()
    return EachClass(weight_CD / std_D, bias_C - (weight_CD / std_D) @ mean_D, best)


def _each(strength: float, x_ND: np.ndarray, labels_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weight_CD, bias_C = np.zeros((labels_NC.shape[1], x_ND.shape[1])), np.zeros(labels_NC.shape[1])
    for label, has_N in enumerate(labels_NC.T == 1):
        # scikit-learn refuses labels of one class alone.
        if has_N.all() or not has_N.any():
            bias_C[label] = _SURE if has_N.all() else -_SURE
            continue
        model = _fit(strength, x_ND, has_N)
        weight_CD[label], bias_C[label] = model.coef_[0], model.intercept_[0]
    return weight_CD, bias_C


def _fit(strength: float, x_ND: np.ndarray, labels_N: np.ndarray) -> "LogisticRegression":
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():  # stopping before full convergence is fine for a probe
        warnings.simplefilter("ignore")
        return LogisticRegression(C=strength, max_iter=500).fit(x_ND, labels_N)
