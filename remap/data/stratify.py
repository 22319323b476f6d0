"""Which images are taken of each class: functions of the labels and a number, the same every time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from remap.data import keyed_random


def stratified(labels: NDArray[Any], first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide into ``first`` images and the rest, each class in proportion (largest remainder), the same every time.

    Each class is on the first side, and one of two images or more is on both, as far as ``first`` allows. Of multi-hot
    labels (N, C) see ``_iterative``.
    """
    if labels.ndim == 2:
        return _iterative(labels, first)
    if not len(labels):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    counts = np.bincount(labels)
    exact = counts * (first / len(labels))
    low = np.minimum(counts, 1)
    high = np.maximum(counts - 1, low)
    if first < low.sum():
        low = np.zeros_like(counts)
    if first > high.sum():
        high = counts
    share = np.clip(np.floor(exact).astype(int), low, high)
    while (step := int(np.sign(first - share.sum()))) != 0:
        room = share < high if step > 0 else share > low
        share[np.argmax(np.where(room, (exact - share) * step, -np.inf))] += step
    order = _drawn(len(labels), 0)
    chosen = np.concatenate([order[labels[order] == label][: share[label]] for label in range(len(counts))])
    return np.sort(chosen), np.setdiff1d(np.arange(len(labels)), chosen)


def _iterative(labels_NC: NDArray[Any], first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide images of several labels (iterative stratification, Sechidis et al. 2011, ECML PKDD, algorithm 1).

    The images of the rarest class that is left go one by one to the side that still wants most of that class, then to
    the one with more room, then to the first. Sides have their exact sizes; the first wants one image of each class
    at least. Images without a class come last.
    """
    room = np.array([first, len(labels_NC) - first])
    counts_C = labels_NC.sum(axis=0, dtype=np.int64)
    wanted_2C = counts_C * (room / max(1, len(labels_NC)))[:, None]
    wanted_2C[0] = np.maximum(wanted_2C[0], np.minimum(counts_C, 1))
    order, side_N = _drawn(len(labels_NC), 0), np.full(len(labels_NC), -1)
    while (side_N < 0).any():
        left_C = labels_NC[side_N < 0].sum(axis=0, dtype=np.int64)
        some = np.flatnonzero(left_C)
        rarest = some[np.argmin(left_C[some])] if len(some) else None
        has_N = np.ones(len(labels_NC), bool) if rarest is None else labels_NC[:, rarest] == 1
        for index in order[(has_N & (side_N < 0))[order]]:
            wants = (0.0, 0.0) if rarest is None else wanted_2C[:, rarest]
            side = max((0, 1), key=lambda one: (room[one] > 0, wants[one], room[one]))
            side_N[index] = side
            room[side] -= 1
            wanted_2C[side] -= labels_NC[index]
    return np.flatnonzero(side_N == 0), np.flatnonzero(side_N == 1)


def folds(labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Divide into ``count`` folds, each class in proportion, the same every time; return the fold of each image, (N,).

    Of one class an image, the sizes of two folds, and how many images of a class they hold, differ by one at most. Of
    multi-hot labels (N, C) fold after fold is taken by ``stratified``.
    """
    fold_N = np.full(len(labels), count - 1, dtype=np.int64)
    if labels.ndim == 1:
        order = _drawn(len(labels), 0)
        # Dealt out class after class, so that the remainders of classes do not all go to the first folds.
        fold_N[order[np.argsort(labels[order], kind="stable")]] = np.arange(len(labels)) % count
        return fold_N
    left = np.arange(len(labels))
    for fold in range(count - 1):
        chosen, rest = stratified(labels[left], round(len(left) / (count - fold)))
        fold_N[left[chosen]], left = fold, left[rest]
    return fold_N


def without_fold(
    labels: NDArray[Any], fold: int, count: int, held_out: float | None, judges: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the images outside of one of ``count`` folds, and those to evaluate on.

    Args:
        held_out: Share of the images outside to evaluate on, which is taken from the first; None is none.
        judges: Whether the fold itself is to evaluate on.
    """
    fold_N = folds(labels, count)
    left = np.flatnonzero(fold_N != fold)
    if held_out is None:
        return left, np.flatnonzero(fold_N == fold) if judges else left[:0]
    fit, check = stratified(labels[left], round((1.0 - held_out) * len(left)))
    return left[fit], left[check]


def few_of_each(labels: NDArray[Any], count: int, draw: int) -> NDArray[np.int64]:
    """Return at most ``count`` images of each class, the same ones for the same ``draw``.

    Of multi-hot labels (N, C), an image is taken in its turn if one of its classes has fewer so far: each class gets
    ``count`` where it has as many, and one that comes with others gets more. No class counts as one more: without such
    images, networks would learn that every image has one.
    """
    order = _drawn(len(labels), draw)
    if not len(labels):
        return order
    if labels.ndim == 1:
        return np.sort(np.concatenate([order[labels[order] == label][:count] for label in np.unique(labels)]))
    groups_NG, chosen = np.column_stack([labels, ~labels.any(axis=1)]), []
    taken_G = np.zeros(groups_NG.shape[1], np.int64)
    for index in order:
        if (taken_G[groups_NG[index] == 1] < count).any():
            chosen.append(index)
            taken_G += groups_NG[index]
    return np.sort(np.array(chosen, dtype=np.int64))


def _drawn(images: int, draw: int) -> NDArray[np.int64]:
    return np.argsort(keyed_random.keys(draw, 0, np.arange(images), keyed_random.SPLIT), kind="stable")
