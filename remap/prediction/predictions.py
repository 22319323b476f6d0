"""What one or several tuned students make of images, while threads decode the next ones.

Letters: B images, C classes, D width of the pooled features.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remap.backbones.anatomy import set_fused_attention
from remap.data import MULTILABEL
from remap.data.image_files import why_not_read
from remap.data.images import BadImage, reason_of
from remap.data.thread_pool import AHEAD, map_ahead, threads
from remap.data.views import View
from remap.distributed.launch import use_bf16
from remap.errors import RecipeError, RunError
from remap.network import Runner
from remap.pipeline.student_api import Student, require_share
from remap.prediction.inputs import Item
from remap.prediction.lanes import lanes, most_lanes, side_by_side
from remap.prediction.tent import Tent, adapting
from remap.remapping.signals import Needs, Signals
from remap.tuning.seam import FeatureSeam

PRECISIONS = ("auto", "fp32", "bf16")
# Images, each in every view, or why it cannot be read.
Batch = tuple[tuple[Item, list[NDArray[np.uint8]] | str], ...]


@dataclass(frozen=True)
class Prediction:
    """What one student says of one image.

    Attributes:
        path: The file, as it was named; a member of an archive as ARCHIVE/MEMBER.
        top: The likeliest classes with their probabilities, the likeliest first; of a student of task multilabel those
            that are as likely as the threshold, where no number of them is wanted.
        error: Why there are none; empty where there are.
        task: The name of the task, where there are several.
        indices: Positions of the classes in ``top`` among the student's classes.
        probabilities: Of all classes, in their order, where wanted.
        embedding: Pooled features, what the classifier is given, where wanted.
    """

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""
    task: str = ""
    indices: tuple[int, ...] = ()
    probabilities: tuple[float, ...] | None = None
    embedding: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a JSON row holds."""
        top = zip(self.top, self.indices, strict=True)
        row: dict[str, Any] = {"path": self.path, "task": self.task}
        row["top"] = [{"class": c, "index": i, "probability": p} for (c, p), i in top]
        row |= {"probabilities": self.probabilities, "embedding": self.embedding, "error": self.error or None}
        optional = ("task", "probabilities", "embedding")
        return {name: value for name, value in row.items() if name not in optional or value}


@dataclass(frozen=True)
class Wanted:
    """What rows hold, and how the images are computed.

    Attributes:
        top: Number of likeliest classes; of a student with fewer, all. None is one; of task multilabel all that are as
            likely as ``threshold``.
        batch_size: Images that are computed at once; on a CPU several forward passes share them (``lanes``).
        workers: Threads that decode; None for one a core, at most 8.
        precision: "fp32", "bf16" (autocast), or "auto": bfloat16 where the device computes in it. None is that of the
            run's recipe, and auto for task folders, shelves and several runs.
        adapt: "tent" adapts a single student to the images on the way (``remap.prediction.tent``): rows depend on the
            order of the images and on the batch size.
        threshold: For students of task multilabel alone; None is 0.5.
    """

    top: int | None = None
    probabilities: bool = False
    embeddings: bool = False
    batch_size: int = 64
    workers: int | None = None
    precision: str | None = None
    adapt: str | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.adapt not in (None, "tent"):
            raise RecipeError([f"adapt: '{self.adapt}' is not a way to adapt (allowed: tent)"], "prediction")
        if self.precision not in (None, *PRECISIONS):
            allowed = ", ".join(PRECISIONS)
            raise RecipeError([f"precision: '{self.precision}' is not one (allowed: {allowed})"], "prediction")
        for name in ("top", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise RecipeError([f"{name}: should be a whole number of 1 or more, got {value!r}"], "prediction")
        require_share(self.threshold)
        if self.threshold is not None and self.top is not None:
            raise RecipeError(
                ["threshold, top: both say how many classes a row has (leave one of the two out)"], "prediction"
            )

    def require_fit(self, students: Mapping[str, Student]) -> None:
        """Refuse a threshold for students of one class an image, whose likeliest class is the answer.

        Raises:
            RecipeError: A student is one.
        """
        alone = [name or "this run" for name, one in students.items() if one.network.task != MULTILABEL]
        if self.threshold is not None and alone:
            raise RecipeError(
                [f"threshold: is for task multilabel, and {', '.join(alone)} has one class an image"], "prediction"
            )


def predictions(students: Mapping[str, Student], items: Iterable[Item], wanted: Wanted) -> Iterator[list[Prediction]]:
    """Yield the rows of each image in the order of ``items``, one for each student, or the reason why there are none.

    An image is decoded once for all students with the same view, and the frozen backbone is run once for all whose
    method leaves it as it is.

    Args:
        students: By name of the task; a single one may have the empty name.
    """
    views = list(dict.fromkeys(student.view for student in students.values()))
    wanted.require_fit(students)
    with threads(wanted.workers or min(8, os.cpu_count() or 1)) as pool:
        decoded = map_ahead(pool, partial(_read, views), items, AHEAD * wanted.batch_size)
        most = most_lanes(students, wanted.batch_size) if wanted.adapt is None else 1
        batches = iter(lambda: tuple(islice(decoded, -(-wanted.batch_size // most))), ())
        first = list(islice(batches, most))
        with lanes(students, len(first)) as copies:
            answers = [_Answers(copy, views, wanted) for copy in copies]
            with answers[0].adapting():
                for rows in side_by_side([answer.rows for answer in answers], chain(first, batches)):
                    yield from rows


def _read(views: list[View], item: Item) -> list[NDArray[np.uint8]] | str:
    """Return an image in each view, or the reason why it cannot be read."""
    try:
        if not item.judged and (reason := why_not_read(item.path)):
            return reason
        source = item.read()
        return [view.read(source) for view in views]
    except BadImage as error:
        return error.reason
    except OSError as error:  # of a member of an archive
        return reason_of(error)


class _Answers:
    def __init__(self, students: Mapping[str, Student], views: list[View], wanted: Wanted) -> None:
        self.students, self.views, self.wanted = students, views, wanted
        self._tent: Tent | None = None
        needs = Needs(pooled=wanted.embeddings)
        for student in students.values():  # without a backward pass, the fused kernel is the faster one everywhere
            set_fused_attention(student.network.model, student.network.anatomy, True)
        self.runners = {
            name: Runner(student.network, needs, bf16=use_bf16(wanted.precision or "auto", student.device)).to(
                student.device
            )
            for name, student in students.items()
        }

    @contextmanager
    def adapting(self) -> Iterator[None]:
        """Adapt to the images while the block runs, where that is wanted.

        Raises:
            RunError: There are several tasks, which share the backbone, or nothing of this student can adapt.
        """
        if self.wanted.adapt is None:
            yield
            return
        if len(self.students) > 1:
            raise RunError("several tasks on one backbone cannot adapt, each in its way", do="name one run")
        ((name, student),) = self.students.items()
        with adapting(student.network, self.runners[name]) as tent:
            self._tent = tent
            yield

    @torch.no_grad()
    def rows(self, batch: Batch) -> Iterator[list[Prediction]]:
        readable = [read for _, read in batch if not isinstance(read, str)]
        columns = [self._predictions(name, signals) for name, signals in self._signals(readable)] if readable else []
        by_image = zip(*columns, strict=True)
        for item, read in batch:
            if isinstance(read, str):
                yield [Prediction(item.path, error=read, task=name) for name in self.students]
            else:
                yield [Prediction(item.path, **row) for row in next(by_image)]

    def _signals(self, readable: list[list[NDArray[np.uint8]]]) -> Iterator[tuple[str, Signals]]:
        images = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*readable, strict=True)]
        stems: dict[Any, Mapping[str, Tensor]] = {}
        for name, student in self.students.items():
            runner, network, seam = self.runners[name], student.network, self.runners[name].tap.seam
            images_BCHW = images[self.views.index(student.view)].to(student.device)
            if self._tent is not None:
                yield name, self._tent(images_BCHW)
            elif len(self.students) > 1 and isinstance(seam, FeatureSeam) and seam.plain:
                key = (student.view, network.preprocess, network.identity.sha256)
                stems[key] = stems.get(key) or runner.stem(images_BCHW)
                yield name, runner(images_BCHW, stems[key])
            else:
                yield name, runner(images_BCHW)

    def _predictions(self, name: str, signals: Signals) -> Iterator[dict[str, Any]]:
        classes, wanted, network = self.students[name].classes, self.wanted, self.students[name].network
        probabilities_BC = network.probabilities(signals.logits_BC.detach().float()).cpu()
        # Asking for more classes than there are is not an error worth stopping for.
        count, least = wanted.top or 1, 0.0
        if network.task == MULTILABEL and wanted.top is None:
            count, least = len(classes), 0.5 if wanted.threshold is None else wanted.threshold
        best_BK, indices_BK = probabilities_BC.topk(min(count, len(classes)), dim=-1)
        pooled_BD = signals.pooled_BD.detach().float().cpu() if signals.pooled_BD is not None else None
        finite_B = probabilities_BC.isfinite().all(dim=-1)
        if pooled_BD is not None:
            finite_B &= pooled_BD.isfinite().all(dim=-1)
        for row, found in enumerate(zip(indices_BK.tolist(), best_BK.tolist(), strict=True)):
            if not finite_B[row]:  # no JSON number says so
                yield {"task": name, "error": "the network's answer is not finite"}
                continue
            best = [(i, p) for i, p in zip(*found, strict=True) if p >= least]
            yield {
                "task": name,
                "top": tuple((classes[i], p) for i, p in best),
                "indices": tuple(i for i, _ in best),
                "probabilities": tuple(probabilities_BC[row].tolist()) if wanted.probabilities else None,
                "embedding": tuple(pooled_BD[row].tolist()) if pooled_BD is not None and wanted.embeddings else None,
            }
