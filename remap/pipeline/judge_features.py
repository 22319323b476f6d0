"""What a backbone without a classifier is worth: k nearest neighbours and a linear probe on its frozen features."""

from typing import Any

import numpy as np

from remap.data.views import ViewSource, require_readable
from remap.engine.evaluation_pass import batch_size_of_evaluation
from remap.pipeline.components import RunComponents
from remap.pipeline.logistic import fit_logistic
from remap.pipeline.probe import pooled_features
from remap.progress import Progress

# Neighbours and temperature of Wu et al. 2018, arXiv 1805.01978, as DINO (2104.14294) uses them.
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Test images whose similarities to all training images are held at a time.
CHUNK = 1024
# For "val", and "test" where there is one: images, knn and linear_probe (shares of correct answers).
Judgement = dict[str, dict[str, Any]]


def judge(components: RunComponents, what: str, progress: Progress) -> Judgement | None:
    """Judge the student's frozen pooled features by the labelled images; None where there are none.

    Both judges learn from the labelled training images, as they are, and no image of the other splits decides
    anything.
    """
    views = components.views
    if not views.data.classes:
        return None

    def features(source: ViewSource, name: str) -> tuple[np.ndarray, np.ndarray]:
        batch_size = batch_size_of_evaluation(components.recipe)
        return pooled_features(components.student, source, batch_size, progress, f"the {name} features of {what}")

    train_ND, labels_N = features(views.train, "training")
    with progress.wait(f"fitting a linear probe on {what}"):
        probe = fit_logistic(train_ND, labels_N)
    found: Judgement = {}
    for name, source in (("val", views.val), ("test", views.test)):
        if source is not None:
            x_MD, labels_M = features(source, name)
            # After the pass: where images are not held in memory, only that finds the unreadable ones.
            require_readable(source, name, components.recipe.data.skip_bad)
            answers = {"knn": nearest(train_ND, labels_N, x_MD), "linear_probe": probe.predict(x_MD)}
            found[name] = {"images": len(labels_M)} | {
                key: float((answer_M == labels_M).mean()) for key, answer_M in answers.items()
            }
    return found


def nearest(train_ND: np.ndarray, labels_N: np.ndarray, x_MD: np.ndarray) -> np.ndarray:
    """Return the class of each image (M,) by its nearest training images: votes of exp(cosine / temperature)."""
    # Features of zeros stay zeros: the bound is that of torch.nn.functional.normalize.
    train_ND, x_MD = (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (train_ND, x_MD)
    )
    neighbours, classes = min(NEIGHBOURS, len(train_ND)), int(labels_N.max()) + 1
    answers = []
    for start in range(0, len(x_MD), CHUNK):
        cosines_BN = x_MD[start : start + CHUNK] @ train_ND.T
        # In any order: votes are added up, so sorting the neighbours changes nothing.
        nearest_BK = np.argpartition(-cosines_BN, neighbours - 1, axis=1)[:, :neighbours]
        weight_BK = np.exp(np.take_along_axis(cosines_BN, nearest_BK, axis=1) / TEMPERATURE)
        votes_BC = np.zeros((len(weight_BK), classes))
        # With `votes[...] += weight` a class that several neighbours have would get one vote alone.
        np.add.at(votes_BC, (np.arange(len(weight_BK))[:, None], labels_N[nearest_BK]), weight_BK)
        answers.append(votes_BC.argmax(axis=1))
    return np.concatenate(answers)
