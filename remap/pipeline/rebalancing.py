"""Bring the logits of new classes to the scale of old ones, of which there were few images to learn from.

Letters: N images, C classes.
"""

import numpy as np
import torch

from remap.engine.evaluation_pass import batch_size_of_evaluation
from remap.errors import BackboneError, DataError
from remap.io.paths import expanded
from remap.network import Network
from remap.pipeline.components import RunComponents
from remap.pipeline.probe import last_layers, signals_of
from remap.pipeline.sessions import sessions_of
from remap.progress import Progress


def require_correctable(components: RunComponents) -> None:
    """Refuse a bias that cannot be fitted, before any step is taken.

    Raises:
        DataError: There are no held-out images of some class.
        BackboneError: The classifier has no bias.
    """
    held_out, student = components.views.selection, components.student
    if components.recipe.train.align != "bias" or held_out is None or _known(components) is None:
        return
    _require_each_class(held_out.split.labels, len(student.classes or ()))
    if any(layer.bias is None for layer in last_layers(student)):
        raise BackboneError("the classifier has no bias to correct", do="align its rows (train.align=true)")


def rebalance(components: RunComponents, progress: Progress) -> bool:
    """Change the classifier as ``train.align`` says, and return whether it was: there may be no new class.

    Raises:
        DataError: There are no held-out images of some class to fit the bias on.
    """
    student, known = components.student, _known(components)
    if known is None:
        return False
    if components.recipe.train.align == "bias":
        held_out, batch = components.views.selection, batch_size_of_evaluation(components.recipe)
        assert held_out is not None, "the recipe holds images out"
        what = "logits of held-out images"
        logits_NC, readable = signals_of(student, held_out, batch, progress, what, pooled=False)
        scale, shift = fit_bias(logits_NC, held_out.split.labels[readable], known, len(student.classes or ()))
        _change_rows(student, known, scale, shift)
        progress.say(f"the logits of new classes are corrected to {scale:.3f} x {shift:+.3f}")
    else:
        progress.say(f"the rows of new classes are scaled by {align_classifier(student, known):.3f} to the old norm")
    return True


def _known(components: RunComponents) -> int | None:
    """Return how many classes the run that is extended knows; None where nothing is aligned, or no class is new."""
    run = components.recipe.student.extends
    if not components.recipe.train.align or run is None:
        return None
    # New classes come behind the old ones, so their number tells them apart.
    known = len(sessions_of(expanded(run))[-1].classes)
    return None if known == len(components.student.classes or ()) else known


def align_classifier(network: Network, known: int) -> float:
    """Scale the rows of new classes to the mean norm of the ``known`` first ones, and return the factor.

    Weight alignment (Zhao et al. 2020, arXiv 1911.07053, equations 6 to 8); the bias is scaled with its row.
    """
    # One factor for all classifiers of a network. Flattened, since a layer may be a 1 x 1 convolution.
    norms_C = torch.stack([layer.weight.detach().flatten(1).norm(dim=1) for layer in last_layers(network)]).mean(0)
    factor = float(norms_C[:known].mean() / norms_C[known:].mean())
    _change_rows(network, known, factor, 0.0)
    return factor


def fit_bias(logits_NC: np.ndarray, labels_N: np.ndarray, known: int, classes: int) -> tuple[float, float]:
    """Return a factor and a summand for the logits of new classes, of the least cross-entropy on held-out images.

    Bias correction (BiC, Wu et al. 2019, arXiv 1905.13260, equations 4 and 5). As many images of each class count.

    Raises:
        DataError: There is none of some class.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    counts_C = _require_each_class(labels_N, classes)
    # Else classes with more held-out images would weigh more in the loss.
    rows = np.concatenate([np.flatnonzero(labels_N == label)[: counts_C.min()] for label in range(classes)])
    # float64: SciPy takes the gradient by differences of about 1e-8, which float32 does not resolve.
    logits_NC, labels_N = logits_NC[rows].astype(np.float64), labels_N[rows]

    def loss(parameters: np.ndarray) -> float:
        scale, shift = parameters
        changed_NC = np.concatenate([logits_NC[:, :known], scale * logits_NC[:, known:] + shift], axis=1)
        return float((logsumexp(changed_NC, axis=1) - changed_NC[np.arange(len(rows)), labels_N]).mean())

    # The factor stays positive: a negative one would turn the order of the new classes around.
    found = minimize(loss, [1.0, 0.0], method="L-BFGS-B", bounds=[(0.01, 100.0), (-100.0, 100.0)])
    return float(found.x[0]), float(found.x[1])


def _require_each_class(labels_N: np.ndarray, classes: int) -> np.ndarray:
    """Return how many images there are of each class (C,)."""
    counts_C = np.bincount(labels_N, minlength=classes)
    if not counts_C.min():
        raise DataError(
            "the bias is fitted on held-out images of each class, and some have none",
            given=f"{int((counts_C == 0).sum())} of {classes} classes without",
            do="take a larger --memory, or hold more out (data.selection)",
        )
    return counts_C


@torch.no_grad()
def _change_rows(network: Network, known: int, scale: float, shift: float) -> None:
    """Make logit z of each new class scale * z + shift."""
    for layer in last_layers(network):
        layer.weight[known:] *= scale
        if layer.bias is not None:
            layer.bias[known:] = scale * layer.bias[known:] + shift
