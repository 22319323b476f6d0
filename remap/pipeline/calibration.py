"""Temperature scaling of a teacher on images that it was not prepared on (Guo et al. 2017, arXiv 1706.04599)."""

import torch
from torch import Tensor

from remap.data.views import ViewSource
from remap.errors import BackboneError
from remap.network import Network
from remap.pipeline.class_matching import GroupedClassifier
from remap.pipeline.probe import last_layers, signals_of
from remap.progress import Progress

# Inverse temperatures that are looked at.
LEAST, MOST = 0.05, 20.0


def calibrate(network: Network, source: ViewSource, batch_size: int, progress: Progress) -> float:
    """Divide the classifier's logits by the temperature that suits these images best, and return it.

    Raises:
        BackboneError: Its classes are groups of others, whose summed probabilities no common factor gives.
    """
    heads = last_layers(network)
    if any(isinstance(head, GroupedClassifier) for head in heads):
        raise BackboneError(
            "a temperature cannot be fitted to a teacher whose classes are groups of others",
            do="leave teacher.calibrate out, or map each class to one (teacher.classes)",
        )
    logits_NC, readable = signals_of(network, source, batch_size, progress, "teacher logits", pooled=False)
    factor = best_factor(torch.from_numpy(logits_NC), torch.from_numpy(source.split.labels[readable]))
    with torch.no_grad():
        # All of them: logits that are the mean or sum of several classifiers scale with those together.
        for head in heads:
            head.weight.mul_(factor)
            if head.bias is not None:
                head.bias.mul_(factor)
    return 1.0 / factor


def best_factor(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Return the inverse temperature of least cross-entropy, between ``LEAST`` and ``MOST``.

    Cross-entropy is convex in it, and its derivative is the mean of sum_c p_c z_c - z_label: bisection finds its zero.
    """
    low, high = LEAST, MOST
    right_N = logits_NC.gather(1, labels_N[:, None])[:, 0]
    # 60 halvings of a range of 20 end below what float64 tells apart.
    for _ in range(60):
        middle = (low + high) / 2
        expected_N = (torch.softmax(middle * logits_NC, 1) * logits_NC).sum(1)
        low, high = (low, middle) if (expected_N - right_N).mean() > 0 else (middle, high)
    return (low + high) / 2
