"""Images, labelled or not, and how they are divided into those to learn from and those to check on."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remap.data.stratify import few_of_each, stratified, without_fold
from remap.errors import DataError
from remap.io.names import same_name

# The label of an image without one.
NO_LABEL = -1


@dataclass(frozen=True)
class Split:
    """Images with labels. ``read(i)`` gives encoded bytes of image i; ``names[i]`` is what messages call it.

    Labels are classes, int64 (N,), or where an image has any number of them multi-hot, int8 (N, C). That of an image
    without one is -1.
    """

    names: tuple[str, ...]
    labels: NDArray[Any]
    read: Callable[[int], bytes]

    @classmethod
    def empty(cls) -> "Split":
        """Return a split without images."""
        return cls((), np.zeros(0, dtype=np.int64), lambda _index: b"")

    def __len__(self) -> int:
        return len(self.names)

    def described(self) -> bytes:
        """Return names and labels in their order, for digests."""
        return _bytes_of(self.names) + self.labels.tobytes()

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "Split":
        """Return the split of some of its images."""
        chosen = np.asarray(indices, dtype=np.int64)
        read = self.read
        return Split(tuple(self.names[i] for i in chosen), self.labels[chosen], lambda i: read(int(chosen[i])))

    def without_labels(self) -> "Split":
        return replace(self, labels=np.full_like(self.labels, NO_LABEL))

    def joined(self, other: "Split") -> "Split":
        """Return the images of both, this one's first."""
        count, first, second = len(self), self.read, other.read
        return Split(
            self.names + other.names,
            np.concatenate([self.labels, other.labels]),
            lambda i: first(i) if i < count else second(i - count),
        )


@dataclass(frozen=True)
class ImageData:
    """Images to learn from and to evaluate on.

    Attributes:
        classes: Names in label order (sorted); where no image to learn from has a label, those that a teacher tells
            apart, in its order, or none.
        train: The labelled training images.
        unlabeled: Training images without labels, all of them -1.
        skipped: Files left out before training, with the reason.
        split_rule: How train and val were divided, in words.
        selection: Labelled images held out of the training images, that the epoch is chosen by.
    """

    source: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None = None
    skipped: tuple[tuple[str, str], ...] = field(default=())
    split_rule: str = ""
    unlabeled: Split | None = None
    selection: Split | None = None

    @property
    def to_look_at(self) -> Split:
        """Return the training images that a sample is taken of: those with labels, where there are any."""
        return self.train if self.unlabeled is None or len(self.train) else self.unlabeled

    @property
    def everything(self) -> Split:
        """Return the labelled images of all splits."""
        labeled = self.train.joined(self.val)
        return labeled if self.test is None else labeled.joined(self.test)

    def count(self, split: Split) -> list[int]:
        """Return how many images of a split each class has; an image with several counts for each of them."""
        if split.labels.ndim == 2:
            return list((split.labels == 1).sum(axis=0).tolist())
        return list(np.bincount(split.labels[split.labels >= 0], minlength=len(self.classes)).tolist())

    def fingerprint(self) -> str:
        """Return a hash of class names, file names, labels and order; ``remap.data.fingerprint`` adds the contents."""
        digest = hashlib.sha256(_bytes_of(self.classes))
        for split in (self.train, self.val, self.test, self.selection):
            if split is not None:
                digest.update(split.described())
        if self.unlabeled is not None:
            digest.update(b"without labels" + _bytes_of(self.unlabeled.names))
        return digest.hexdigest()

    def with_unlabeled(self, more: Split) -> "ImageData":
        """Return the same data with more images without labels."""
        shape = (len(more), *self.train.labels.shape[1:])
        more = replace(more, labels=np.full(shape, NO_LABEL, self.train.labels.dtype))
        return replace(self, unlabeled=more if self.unlabeled is None else self.unlabeled.joined(more))

    def with_held_out(self, share: float) -> "ImageData":
        """Return the training images alone: a share of each class to evaluate on, the others to learn from.

        Raises:
            DataError: There are too few for both.
        """
        train, val = self._held_out(share, "held_out")
        rule = f"{self.split_rule}; {len(val)} of {len(self.train)} training images held out"
        return replace(self, train=train, val=val, test=None, split_rule=rule)

    def with_selection(self, share: float) -> "ImageData":
        """Return the same data with a share of each class of the training images held out to choose the epoch by.

        Raises:
            DataError: There are too few for both.
        """
        train, selection = self._held_out(share, "selection")
        rule = f"{self.split_rule}; {len(selection)} of {len(self.train)} training images choose the epoch"
        return replace(self, train=train, selection=selection, split_rule=rule)

    def without_fold(self, fold: int, count: int, held_out: float | None, judges: bool = False) -> "ImageData":
        """Return the same data without one of ``count`` folds of the training images (from 0).

        Args:
            held_out, judges: Which of them to evaluate on instead, as for ``stratify.without_fold``.

        Raises:
            DataError: No image to learn from or to evaluate on is left.
        """
        fit, check = without_fold(self.train.labels, fold, count, held_out, judges)
        if not len(fit) or ((judges or held_out is not None) and not len(check)):
            given = f"{len(self.train)} (fold {fold + 1} of {count})"
            raise DataError("there are too few labelled images to leave a fold out", given=given)
        rule = f"{self.split_rule}; without fold {fold + 1} of {count} of the training images"
        data = replace(self, train=self.train.take(fit), split_rule=rule)
        return replace(data, val=self.train.take(check), test=None) if len(check) else data

    def _held_out(self, share: float, name: str) -> tuple[Split, Split]:
        fit, check = stratified(self.train.labels, round((1.0 - share) * len(self.train)))
        if not len(fit) or not len(check):
            given = f"{len(self.train)} (data.{name}={share:g})"
            raise DataError("there are too few labelled images to hold some out", given=given)
        return self.train.take(fit), self.train.take(check)

    def with_subset(self, subset: str) -> "ImageData":
        """Return the data of the first half of the classes (``base``), or of the others (``new``), as CoCoOp's tables.

        Zhou et al. 2022, arXiv 2203.05557; of an odd number of classes one more is base.

        Raises:
            DataError: There are fewer than four classes.
        """
        count, middle = len(self.classes), (len(self.classes) + 1) // 2
        if count < 4:
            raise DataError("half of the classes is fewer than two", given=f"{count} classes, data.subset={subset}")
        first, last = (0, middle) if subset == "base" else (middle, count)

        def part(split: Split) -> Split:
            taken = split.take(np.flatnonzero((split.labels >= first) & (split.labels < last)))
            return replace(taken, labels=taken.labels - first)

        rule = f"{self.split_rule}; {last - first} of {count} classes ({subset})"
        test = None if self.test is None else part(self.test)
        found = replace(self, classes=self.classes[first:last], split_rule=rule, test=test)
        return replace(found, train=part(self.train), val=part(self.val))

    def with_per_class(self, count: int, draw: int = 0) -> "ImageData":
        """Return the data with at most ``count`` training images of each class, the same ones for the same ``draw``."""
        chosen = few_of_each(self.train.labels, count, draw)
        rule = f"{self.split_rule}; {len(chosen)} of {len(self.train)} training images"
        return replace(self, train=self.train.take(chosen), split_rule=rule)

    def with_only(self, names: Sequence[str]) -> "ImageData":
        """Return the images of some classes alone, named in any Unicode form.

        Raises:
            DataError: There is no such class.
        """
        own = {same_name(name): name for name in self.classes}
        if unknown := sorted(name for name in set(names) if same_name(name) not in own):
            raise DataError("there are no such classes", given=", ".join(unknown), allowed=", ".join(self.classes[:20]))
        chosen = sorted({own[same_name(name)] for name in names})
        rule = f"{self.split_rule}; {len(chosen)} of {len(self.classes)} classes"
        return replace(self._classified(chosen), split_rule=rule)

    def with_classes(self, names: Sequence[str]) -> "ImageData":
        """Return the same images with labels that count these class names, of which the images may lack some.

        Raises:
            DataError: An image is of none of these classes.
        """
        if unknown := sorted(set(self.classes) - set(names)):
            raise DataError(
                "images are of classes that are not listed", given=", ".join(unknown), allowed=", ".join(names[:20])
            )
        return self._classified(names)

    def _classified(self, names: Sequence[str]) -> "ImageData":
        """Return the images of these classes, with labels by these names."""
        numbers = {name: number for number, name in enumerate(names)}
        new_C = np.array([numbers.get(name, NO_LABEL) for name in self.classes], dtype=np.int64)

        def part(split: Split | None) -> Split | None:
            if split is None:
                return None
            chosen = split.take(np.flatnonzero(new_C[split.labels] >= 0))
            return replace(chosen, labels=new_C[chosen.labels])

        parts = {name: part(getattr(self, name)) for name in ("train", "val", "test", "selection")}
        return replace(self, classes=tuple(names), **parts)  # type: ignore[arg-type]

    def with_labels(self, count: int) -> "ImageData":
        """Return the same data with the labels of ``count`` training images only, the same ones every time.

        Raises:
            DataError: Fewer labels than classes, or more than training images.
        """
        if not len(self.classes) <= count <= len(self.train):
            raise DataError(
                "each class keeps one label at least, and there are no more labels than images",
                given=f"data.labels={count}",
                allowed=f"{len(self.classes)} (classes) to {len(self.train)} (training images)",
            )
        labeled, rest = stratified(self.train.labels, count)
        rule = f"{self.split_rule}; labels of {count} of {len(self.train)} training images"
        data = replace(self, train=self.train.take(labeled), split_rule=rule)
        return data.with_unlabeled(self.train.take(rest)) if len(rest) else data


def _bytes_of(names: Iterable[str]) -> bytes:
    """File names need not be UTF-8; Python keeps stray bytes as surrogates."""
    return "\0".join(names).encode(errors="surrogatepass")
