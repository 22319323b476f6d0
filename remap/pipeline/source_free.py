"""Ways to adapt a tuned student to images of another domain, without labels and without the images it learned from.

Letters: N images of the domain, C classes, D width of the pooled features.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from remap.data.views import ViewSource
from remap.distributed.collectives import index_chunks
from remap.distributed.launch import accelerator, use_bf16
from remap.engine.job import Job
from remap.engine.loop import train
from remap.errors import Interrupted, RunError
from remap.network import Network, Runner
from remap.pipeline.epoch_recorder import epoch_line
from remap.pipeline.frozen_check import FrozenWeights, trained_text
from remap.progress import Progress
from remap.recipe import Recipe
from remap.remapping.knowledge.domains.infomax import InformationMaximization
from remap.remapping.knowledge.logits.distillation import CrossEntropy
from remap.remapping.labels import Labels
from remap.remapping.objective import Objective, Pair
from remap.remapping.signals import Needs
from remap.tuning.parameter.clip_lora import TOWER
from remap.tuning.words import PATH

# Of the cross-entropy with the pseudo-labels, beside 1 of the information (the paper's beta).
PSEUDO_LABELS = 0.3


class _HeadFrozen(Network):
    """A network whose method is trained and whose classifier is not."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: tensor for name, tensor in super().trained.items() if not self.anatomy.is_head(name)}


class _OfAll(InformationMaximization):
    """Its images have pseudo-labels, and are of the other domain all the same."""

    def chosen(self, logits_BC: Tensor, labels: Labels) -> Tensor:
        return logits_BC


def by_information(
    network: Network, source: ViewSource, recipe: Recipe, run: Path, progress: Progress
) -> dict[str, Any]:
    """Train what the method tuned, with the classifier frozen; return what the summary says of it.

    Raises:
        RunError: The method tunes no more than the classifier, or chooses in training what it keeps.
    """
    # Of the same model and tensors: what is trained here is what the caller saves of `network`.
    student = _HeadFrozen(**vars(network))
    attached = student.attached
    # Learned words were written into the classifier.
    written = attached.mergeable and all(name.startswith((f"{PATH}.", f"{TOWER}.")) for name in student.trained)
    if written or not student.trained:
        raise RunError(
            f"nothing to adapt: {recipe.method.name} trained the classifier of {run} alone, which stays as it is",
            do="adapt a run of a method that changes the features, such as lora",
        )
    if attached.finishing:
        # Steps would train by a classifier that is not the one that answers.
        raise RunError(
            f"the student in {run} answers by what {recipe.method.name} saw of its labelled images after the last step",
            do="adapt a run of another method, such as lora",
        )
    if attached.pruning:
        raise RunError(f"{' and '.join(attached.pruning)} chose in training what it keeps, and would choose again")
    attached.wants_sample = False  # what it decided by training images is in the task
    for parameter in network.head.values():
        parameter.requires_grad_(False)
    pair, weights = Pair(student.anatomy, None, len(student.classes or ())), {"infomax": 1.0, "ce": PSEUDO_LABELS}
    terms = {"infomax": _OfAll(pair, _OfAll.Config()), "ce": CrossEntropy(pair, CrossEntropy.Config())}

    def relabel() -> dict[str, float]:
        """Give the images their pseudo-labels; return the share that has others than before."""
        indices_N, features_ND, probabilities_NC = _answers(network, source, recipe, progress)
        labels_N = pseudo_labels(features_ND, probabilities_NC).numpy()
        changed = float((source.split.labels[indices_N] != labels_N).mean())
        # In place: training reads the labels of this very source.
        source.split.labels[indices_N] = labels_N
        return {"relabeled": changed}

    frozen = FrozenWeights.of(student)
    job = Job(
        recipe=recipe,
        student=student,
        objective=Objective(terms, weights, over_batch=["infomax"]).to(accelerator().device),
        teachers=(),
        source=source,
        accelerator=accelerator(),
        bf16=use_bf16(recipe.train.precision, accelerator().device),
        progress=progress,
        evaluate=relabel,
        on_epoch=lambda _step, history: progress.say(epoch_line(history, recipe.train.epochs)),
    )
    progress.say(trained_text(job.parameters(), student))
    # For the first epoch; after each epoch the job's `evaluate` gives new ones.
    relabel()
    try:
        state = train(job)
    except Interrupted as error:  # which says that the state is saved, as that of a run is
        what = f"stopped; {run} is as it was, and nothing else was written"
        raise Interrupted(what, exit_code=error.exit_code, do="give the command again") from error
    student.model.eval()
    return {
        "losses": weights,
        "learning_rate": recipe.train.lr,
        "epochs": recipe.train.epochs,
        "train_seconds": round(state.seconds, 2),
        "frozen": frozen.require_unchanged(student),
        "trainable_parameters": student.num_trainable,
        "history": state.history,
    }


def pseudo_labels(features_ND: Tensor, probabilities_NC: Tensor) -> Tensor:
    """Return the class of the nearest centroid by cosine (N,), SHOT's Eq. 4 to 6.

    Centroids are first the means of all features, weighted by the answers, then those of the images that are nearest
    to them. Classes that are no image's are left out of the second round.
    """
    directions_ND = F.normalize(features_ND, dim=1)
    # The bound keeps the centroid of a class without any probability at 0, where it would be NaN.
    centroids_CD = probabilities_NC.T @ features_ND / probabilities_NC.sum(dim=0)[:, None].clamp_min(1e-30)
    labels_N = (directions_ND @ F.normalize(centroids_CD, dim=1).T).argmax(dim=1)
    members_NC = F.one_hot(labels_N, probabilities_NC.shape[1]).to(features_ND)
    counts_C = members_NC.sum(dim=0)
    centroids_CD = members_NC.T @ features_ND / counts_C.clamp_min(1.0)[:, None]
    cosines_NC = directions_ND @ F.normalize(centroids_CD, dim=1).T
    # Below every cosine, so that no image gets such a class.
    return cosines_NC.masked_fill(counts_C == 0, -2.0).argmax(dim=1)


@torch.no_grad()
def _answers(
    network: Network, source: ViewSource, recipe: Recipe, progress: Progress
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return indices (N,), pooled features (N, D) and probabilities (N, C) of all readable images, on the CPU."""
    network.model.eval()
    parts: list[tuple[np.ndarray, Tensor, Tensor]] = []
    chunks = index_chunks(len(source.split), recipe.train.batch_size)
    for readable, images_BCHW in _batches(source, chunks, "pseudo-labels", progress):
        runner = Runner(network, Needs(pooled=True))
        signals = runner(images_BCHW)
        runner.tap.close()
        assert signals.pooled_BD is not None
        parts.append((readable, signals.pooled_BD.float().cpu(), signals.logits_BC.float().softmax(dim=-1).cpu()))
    indices, features, probabilities = zip(*parts, strict=True)
    return np.concatenate(indices), torch.cat(features), torch.cat(probabilities)


@torch.no_grad()
def by_statistics(
    network: Network, source: ViewSource, batch_size: int, run: Path, progress: Progress
) -> dict[str, Any]:
    """Set the statistics of the batch norms to means over images of the other domain, of batches from all of it.

    Raises:
        RunError: The task stores no batch norm.
    """
    modules = network.model.named_modules()
    norms = [
        module
        for name, module in modules
        # Norms that the task does not store would come back with the old statistics.
        if isinstance(module, _BatchNorm) and f"{name}.running_mean" in network.tensors
    ]
    if not norms:
        raise RunError(
            f"the student in {run} has no batch norm of its own, so no statistics of images",
            given=f"{network.identity.model}; a task stores the batch norms that its method trains",
            do="leave --by out: shot trains what the method tuned, norms included",
        )
    network.model.eval()
    for norm in norms:
        # Else the batches of the old domain would count in the mean too.
        norm.reset_running_stats()
        # The norms alone: everything else, such as dropout, stays in eval.
        norm.train()
    runner = Runner(network)
    # Every n-th image: folders that are sorted by class would make batches of one, whose variances are too small.
    number, seen = -(-len(source.split) // batch_size), 0
    chunks = [np.arange(first, len(source.split), number) for first in range(number)]
    for readable, images_BCHW in _batches(source, chunks, "statistics", progress):
        seen += len(readable)
        for norm in norms:
            norm.momentum = len(readable) / seen  # the mean over all images so far
        runner(images_BCHW)
    runner.tap.close()
    network.model.eval()
    return {
        **{"losses": {}, "learning_rate": 0.0, "epochs": 1, "train_seconds": 0.0},
        **{"trainable_parameters": 0, "history": [], "batch_norms": len(norms)},
    }


def _batches(
    source: ViewSource, chunks: Sequence[np.ndarray], what: str, progress: Progress
) -> Iterator[tuple[np.ndarray, Tensor]]:
    with progress.wait(what, len(source.split)) as step:
        for chunk in chunks:
            images_BCHW, readable = source.batch(chunk)
            if len(readable):
                yield readable, images_BCHW.to(accelerator().device)
            step.advance(len(chunk))
