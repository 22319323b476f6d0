"""A linear head fitted on cached features: the quickest way to give a teacher these classes."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator

from remap.backbones.typed import layer_at
from remap.data.splits import stratified
from remap.data.views import ViewSource
from remap.distributed.interrupts import defer_signals, raise_if_interrupted
from remap.errors import DataError
from remap.network import Network, Runner
from remap.progress import Progress, Step
from remap.remapping.signals import Needs

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

# Inverse strengths of the L2 penalty that are tried on a fifth of the training images.
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)


def fit_probe(
    network: Network, source: ViewSource, accelerator: Accelerator, batch_size: int, progress: Progress
) -> float:
    """Fit the classifier by logistic regression (scikit-learn, L-BFGS) on standardised pooled features.

    The penalty is chosen on a held-out fifth of the training images; the evaluation split is never looked at.

    Returns:
        The chosen inverse strength of the penalty.

    Raises:
        DataError: Fewer than two classes have readable images.
    """
    features_ND, labels_N = pooled_features(network, source, accelerator, batch_size, progress)
    mean, std = features_ND.mean(0), features_ND.std(0) + 1e-6
    # L2 penalties compare weights, so features need one scale.
    standard = (features_ND - mean) / std
    if len(np.unique(labels_N)) < 2:
        raise DataError("a head needs readable training images of two classes at least", do="repair the images")
    with progress.wait("fitting the teacher's head", len(STRENGTHS) + 1) as step:
        best = _choose(standard, labels_N, step)
        model = _fit(best, standard, labels_N)
        step.advance()
    weight, bias = _all_classes(model, network, mean, std)
    _write_head(network, weight, bias)
    return best


def _choose(standard_ND: np.ndarray, labels_N: np.ndarray, step: Step) -> float:
    """Return the inverse strength that does best on a fifth of the images; 1 where a class has a single image."""
    if np.unique(labels_N, return_counts=True)[1].min() < 2:
        return 1.0
    # The evaluation split stays unseen: it judges the teacher later.
    fit, check = stratified(labels_N, round(0.8 * len(labels_N)))
    scores = []
    for strength in STRENGTHS:
        model = _fit(strength, standard_ND[fit], labels_N[fit])
        scores.append(model.score(standard_ND[check], labels_N[check]))
        step.advance()
    return STRENGTHS[int(np.argmax(scores))]


@torch.no_grad()
def pooled_features(
    network: Network, source: ViewSource, accelerator: Accelerator, batch_size: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features that enter the classifier, float64 (N, D), and labels (N,), of all readable images."""
    network.model.eval()
    runner = Runner(network, Needs(pooled=True))
    rows, readable = [], []
    with defer_signals(), progress.wait("teacher features", len(source.split)) as step:
        for start in range(0, len(source.split), batch_size):
            raise_if_interrupted(accelerator, "the teacher's head was being fitted")
            images, good = source.batch(np.arange(start, min(start + batch_size, len(source.split))))
            if len(good):
                rows.append(runner(images.to(accelerator.device)).pooled_BD.float().cpu().numpy())
                readable.append(good)
            step.advance(len(images))
    runner.tap.close()
    return np.concatenate(rows).astype(np.float64), source.split.labels[np.concatenate(readable)]


def _fit(strength: float, x_ND: np.ndarray, labels_N: np.ndarray) -> "LogisticRegression":
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():  # stopping before full convergence is fine for a probe
        warnings.simplefilter("ignore")
        return LogisticRegression(C=strength, max_iter=500).fit(x_ND, labels_N)


def _all_classes(
    model: "LogisticRegression", network: Network, mean: np.ndarray, std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights on raw features for every class; two-class models have one row, worth -z/2 and +z/2."""
    coefficients, intercept = model.coef_, model.intercept_
    if len(coefficients) == 1:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    classes = len(network.classes or ())
    # Back on raw features. A class without readable training images gets a logit that never wins.
    weight, bias = np.zeros((classes, len(mean))), np.full(classes, intercept.min() - 20.0)
    weight[model.classes_] = coefficients / std
    bias[model.classes_] = intercept - (coefficients / std) @ mean
    return weight, bias


def _write_head(network: Network, weight_CD: np.ndarray, bias_C: np.ndarray) -> None:
    with torch.no_grad():
        for path in network.anatomy.classifier_heads:
            head = layer_at(network.model, path)
            assert head.bias is not None
            head.weight.copy_(torch.from_numpy(weight_CD).view_as(head.weight))
            head.bias.copy_(torch.from_numpy(bias_C))
