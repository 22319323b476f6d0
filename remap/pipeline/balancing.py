"""Answers of a teacher that favour some classes, made more even (Wang et al. 2022, arXiv 2201.01490, section 3.2).

Letters: N images, C classes.
"""

import numpy as np
import torch

from remap.data.views import ViewSource
from remap.errors import BackboneError
from remap.network import Network
from remap.pipeline.class_matching import GroupedClassifier
from remap.pipeline.class_words import LOOKED_AT, probabilities
from remap.pipeline.probe import last_layers, signals_of
from remap.progress import Progress

# The smallest mean probability that counts, as a part of an even share: a class that the teacher never thinks of would
# else be raised without bound.
LEAST = 0.01


def balance(
    network: Network, source: ViewSource, share: float, batch_size: int, progress: Progress
) -> tuple[str, np.ndarray]:
    """Take ``share`` of log p from the classifier's logits, with p the mean probability of each class.

    The paper's p is a running average over training; here it is that of the teacher on the images before training.

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
    return -share * np.log(np.maximum(mean_C, LEAST / len(mean_C)))
