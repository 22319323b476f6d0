"""Changes of a prepared classifier that a recipe asks for: how sure it is, and how even its answers are.

Letters: N images, C classes.
"""

import numpy as np
import torch
from torch import Tensor

from remap.data.views import ViewSource
from remap.errors import BackboneError
from remap.network import Network
from remap.pipeline.class_matching import GroupedClassifier
from remap.pipeline.class_words import LOOKED_AT, probabilities
from remap.pipeline.probe import last_layers, signals_of
from remap.progress import Progress
from remap.recipe.schema import TeacherSpec

# Inverse temperatures that are looked at.
LEAST_FACTOR, MOST_FACTOR = 0.05, 20.0
# The smallest mean probability that counts, as a part of an even share: a class that the teacher never thinks of would
# else be raised without bound.
LEAST_SHARE = 0.01


def adjust_logits(
    network: Network,
    spec: TeacherSpec,
    title: str,
    source: ViewSource,
    held_out: ViewSource,
    batch_size: int,
    progress: Progress,
) -> np.ndarray | None:
    """Change a prepared classifier as the recipe says, in place, and say how.

    Args:
        title: How messages call the teacher.
        source: The images that its answers are balanced on.
        held_out: Labelled images that it was not prepared on, for its temperature.

    Returns:
        Its logits (N, C) on the images that it was balanced on, which nothing has to compute again; else None.
    """
    if spec.calibrate:  # where it brought its head, on images that it may have seen
        temperature = calibrate(network, held_out, batch_size, progress)
        how = f"on {len(held_out.split)} training images: temperature {temperature:.2f}"
        progress.say(f"{title} is calibrated {how}")
    if spec.soften is not None:
        spread = soften(network, source, spec.soften, batch_size, progress)
        if spread > spec.soften:
            why = f"the standard deviation of its logits over the classes was {spread:.1f}"
            progress.say(f"{title} is softened: {why}, now {spec.soften:g}")
    if not spec.balance:
        return None
    how, logits_NC = balance(network, source, spec.balance, batch_size, progress)
    progress.say(f"{title} is balanced {how}")
    return logits_NC


def calibrate(network: Network, source: ViewSource, batch_size: int, progress: Progress) -> float:
    """Divide the classifier's logits by the temperature that suits these images best, and return it.

    Temperature scaling on images that it was not prepared on (Guo et al. 2017, arXiv 1706.04599).

    Raises:
        BackboneError: Its classes are groups of others, whose summed probabilities no common factor gives.
    """
    _require_no_groups(network, "calibrate")
    logits_NC, readable = signals_of(network, source, batch_size, progress, "teacher logits", pooled=False)
    factor = best_factor(torch.from_numpy(logits_NC), torch.from_numpy(source.split.labels[readable]))
    _scale_logits(network, factor)
    return 1.0 / factor


def soften(network: Network, source: ViewSource, limit: float, batch_size: int, progress: Progress) -> float:
    """Divide the classifier's logits so that their standard deviation over the classes is at most ``limit``.

    As a mean over images (``LOOKED_AT`` of them at most): how sure a teacher is at one temperature depends on how far
    it was trained. (``logit_std`` divides the logits of each image by their own deviation, in both networks.)

    Returns:
        The mean standard deviation before.

    Raises:
        BackboneError: Its classes are groups of others, whose summed probabilities no common factor gives.
    """
    _require_no_groups(network, "soften")
    logits_NC, _ = signals_of(
        network, source, batch_size, progress, "the teacher's answers", pooled=False, at_most=LOOKED_AT
    )
    spread = float(logits_NC.std(axis=1, ddof=1).mean())
    if spread > limit:
        _scale_logits(network, limit / spread)
    return spread


def _require_no_groups(network: Network, option: str) -> None:
    if any(isinstance(head, GroupedClassifier) for head in last_layers(network)):
        raise BackboneError(
            "a temperature cannot be fitted to a teacher whose classes are groups of others",
            do=f"leave teacher.{option} out, or map each class to one (teacher.classes)",
        )


@torch.no_grad()
def _scale_logits(network: Network, factor: float) -> None:
    # All heads: logits that are the mean or sum of several classifiers scale with those together.
    for head in last_layers(network):
        head.weight.mul_(factor)
        if head.bias is not None:
            head.bias.mul_(factor)


def best_factor(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Return the inverse temperature of least cross-entropy, between ``LEAST_FACTOR`` and ``MOST_FACTOR``.

    Cross-entropy is convex in it, and its derivative is the mean of sum_c p_c z_c - z_label: bisection finds its zero.
    """
    low, high = LEAST_FACTOR, MOST_FACTOR
    right_N = logits_NC.gather(1, labels_N[:, None])[:, 0]
    # 60 halvings of a range of 20 end below what float64 tells apart.
    for _ in range(60):
        middle = (low + high) / 2
        expected_N = (torch.softmax(middle * logits_NC, 1) * logits_NC).sum(1)
        low, high = (low, middle) if (expected_N - right_N).mean() > 0 else (middle, high)
    return (low + high) / 2


def balance(
    network: Network, source: ViewSource, share: float, batch_size: int, progress: Progress
) -> tuple[str, np.ndarray]:
    """Take ``share`` of log p from the classifier's logits, with p the mean probability of each class.

    Answers that favour some classes become more even (Wang et al. 2022, arXiv 2201.01490, section 3.2). The paper's p
    is a running average over training; here it is that of the teacher on the images before training.

    Returns:
        A note, and the logits (N, C) of the images that were looked at, as they are now.

    Raises:
        BackboneError: The classifier has no bias, or there are several, whose biases add up in ways of their own.
    """
    first, *others = last_layers(network)
    if first.bias is None or others:
        why = "has several classifiers" if others else "has a classifier without bias"
        given = f"{network.identity.model}, which {why}"
        raise BackboneError("the teacher's answers cannot be balanced", given=given, do="leave teacher.balance out")
    logits_NC, _ = signals_of(
        network, source, batch_size, progress, "the teacher's answers", pooled=False, at_most=LOOKED_AT
    )
    shift_C = shift_of(logits_NC, share)
    with torch.no_grad():
        # Of a group of classes every member moves, and so does the log of their summed exponentials.
        sizes = first.sizes if isinstance(first, GroupedClassifier) else 1
        first.bias.add_(torch.from_numpy(np.repeat(shift_C, sizes)).to(first.bias))
    # These are the logits that the changed bias gives: no second pass over the images.
    balanced_NC = logits_NC + shift_C
    before, after = (probabilities(one).mean(axis=0).max() * len(shift_C) for one in (logits_NC, balanced_NC))
    images = f"on {len(logits_NC):,} images"
    return f"{images}: the most frequent class had {before:.1f} times an even share, now {after:.1f}", balanced_NC


def shift_of(logits_NC: np.ndarray, share: float) -> np.ndarray:
    """Return what is added to the logits of each class, (C,)."""
    mean_C = probabilities(logits_NC).mean(axis=0)
    return -share * np.log(np.maximum(mean_C, LEAST_SHARE / len(mean_C)))
