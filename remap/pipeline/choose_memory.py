"""Choose a memory of old images for a run that is extended: a few of each class, by herding or at random."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from remap.data import keyed_random
from remap.data.memory import Memory, MemoryImage, MemoryPart, digest_of, read_memory
from remap.data.splits import Split
from remap.data.views import ViewSource
from remap.distributed.launch import accelerator
from remap.io.human_size import number_of
from remap.io.paths import expanded
from remap.pipeline.probe import pooled_features
from remap.pipeline.sessions import Session
from remap.pipeline.shared import SharedResources
from remap.progress import Progress
from remap.runs.task import load_task

Choice = Literal["herding", "random"]
_BATCH = 64


def choose_memory(sessions: Sequence[Session], per_class: int, by: Choice, progress: Progress) -> Memory:
    """Return so many images of each class that the last session knows.

    What the memory of the last session has is taken from it, even if it is fewer; images of other classes are chosen
    from the training images of the session that brought them.

    Raises:
        MissingData: Images to choose from are not at hand.
    """
    before = sessions[-1].run.recipe().data.memory
    # A smaller memory has the first images of each class: herding puts the best first (iCaRL, algorithm 5).
    memory = read_memory(expanded(before)).at_most(per_class) if before is not None else Memory()
    if short := memory.classes_below(per_class):
        what = f"the memory of {sessions[-1].run.path} has fewer images of {number_of(len(short), 'class')}"
        progress.say(f"{what} ({', '.join(short[:3])}{' ...' if len(short) > 3 else ''}): these stay as they are")
    known, parts, shared = set(memory.classes), list(memory.parts), SharedResources()
    for session in sessions:
        # Without the memory of that session: its images are those of sessions before, which are looked at themselves.
        spec = session.run.recipe().data.labeled_part().model_copy(update={"memory": None})
        data = shared.index(spec)
        # Of a class that several sessions show, the first of them gives the images.
        missing = [name for name in data.classes if name not in known and name in session.classes]
        images = data.train.take(np.flatnonzero(np.isin(data.train.labels, [data.classes.index(n) for n in missing])))
        if not len(images):
            continue
        known |= set(missing)
        order = _herded(session.run.path, images, per_class, progress) if by == "herding" else _drawn(images, per_class)
        chosen = tuple(
            # The hash lets a later run refuse an image that has changed since (`open_memory`).
            MemoryImage(name=images.names[i], label=data.classes[images.labels[i]], sha256=digest_of(images, int(i)))
            for i in order
        )
        parts.append(
            MemoryPart(
                source=spec.source or "",
                val_source=spec.val_source,
                val_fraction=spec.val_fraction,
                depth=spec.depth,
                images=chosen,
            )
        )
    return Memory(parts=tuple(parts))


def _drawn(images: Split, per_class: int) -> list[int]:
    # The same seed for every run: a command that is given again chooses the same images.
    order = np.argsort(keyed_random.keys(0, 0, np.arange(len(images)), keyed_random.SPLIT), kind="stable")
    return [int(i) for label in np.unique(images.labels) for i in order[images.labels[order] == label][:per_class]]


def _herded(run: Path, images: Split, per_class: int, progress: Progress) -> list[int]:
    network, view = load_task(run)
    network.model.to(accelerator().device)
    # Nothing is held in memory: each image is read once.
    source, what = ViewSource(images, view, memory_bytes=0.0), "features to choose a memory by"
    features_ND, labels_N = pooled_features(network, source, _BATCH, progress, what)
    # Rows are those of readable images; `bad` is complete now that all were read.
    at_N = np.array([index for index in range(len(images)) if index not in source.bad])
    return [
        int(at_N[i])
        for label in np.unique(labels_N)
        for i in np.flatnonzero(labels_N == label)[herding(features_ND[labels_N == label], per_class)]
    ]


def herding(features_ND: np.ndarray, count: int) -> np.ndarray:
    """Return at most ``count`` rows, each the one whose mean with those before is nearest to the mean of all.

    iCaRL (Rebuffi et al. 2017, arXiv 1611.07725, algorithm 4), on features of length 1.
    """
    x_ND = features_ND / np.maximum(np.linalg.norm(features_ND, axis=1, keepdims=True), 1e-300)
    mean_D, total_D, chosen = x_ND.mean(0), np.zeros(x_ND.shape[1]), list[int]()
    for step in range(1, min(count, len(x_ND)) + 1):
        distance_N = np.linalg.norm(mean_D - (total_D + x_ND) / step, axis=1)
        # Each image is taken once.
        distance_N[chosen] = np.inf
        chosen.append(int(distance_N.argmin()))
        total_D = total_D + x_ND[chosen[-1]]
    return np.array(chosen, dtype=np.int64)
