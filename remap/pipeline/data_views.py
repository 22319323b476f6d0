"""Images seen through one view: decoded where they fit in memory, checked, and with their digests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remap.data.composed_sources import JoinedSource
from remap.data.fingerprint import Contents, fingerprint
from remap.data.splits import ImageData
from remap.data.views import View, ViewSource, listed, require_readable
from remap.distributed.launch import accelerator
from remap.distributed.reading import load_together, read_digests
from remap.errors import DataError
from remap.progress import Progress, Silent
from remap.recipe.schema import DataSpec

TITLES = {
    "train": "training images",
    "unlabeled": "images without labels",
    "val": "evaluation images",
    "test": "test images",
    "selection": "selection images",
}


@dataclass
class DataViews:
    """A data source seen through one view; unreadable training images are already left out and named.

    Attributes:
        train: The labelled training images.
        unlabeled: The training images without labels.
        training_source: What the student learns from: ``train`` itself, that and then ``unlabeled``, or ``unlabeled``
            itself. Nothing is decoded or held in memory twice.
        unreadable: Images of all splits that were left out, with the reason.
        contents: What is known of the files' content, unreadable ones included, by split.
        selection: Images held out of the labelled training images, that the epoch is chosen by.
        evaluations: What networks answered on the evaluation images, see ``evaluate_once``; one with other data that
            has the same ones.
        readable: Which of ``data.train`` the images of ``train`` are.
    """

    data: ImageData
    view: View
    train: ViewSource
    val: ViewSource
    test: ViewSource | None
    unreadable: tuple[tuple[str, str], ...]
    unlabeled: ViewSource | None
    training_source: ViewSource
    contents: dict[str, Contents] = field(default_factory=dict)
    selection: ViewSource | None = None
    evaluations: dict[str, Any] = field(default_factory=dict)
    readable: NDArray[np.int64] = field(default_factory=lambda: np.arange(0))
    _fingerprint: str = ""

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """All files that are not used, with the reason."""
        return (*self.data.skipped, *self.unreadable)

    @property
    def used(self) -> dict[str, ViewSource]:
        """The images that are learned from, and those that are evaluated on, by what messages call them."""
        sources = {"training": self.train, "unlabeled": self.unlabeled}
        sources |= {"evaluation": self.val, "test": self.test, "selection": self.selection}
        return {what: source for what, source in sources.items() if source is not None}

    @property
    def unreadable_later(self) -> tuple[tuple[str, str], ...]:
        """Images that were found unreadable after the others had been left out, with the reason."""
        return tuple(item for source in self.used.values() for item in source.bad_names())

    @property
    def labeled_share(self) -> float:
        """Share of ``training_source`` that have a label."""
        return float((self.training_source.split.labels >= 0).mean())

    def fingerprint(self, progress: Progress = Silent()) -> str:
        """Class names, file names, labels, order and content. What was decoded into memory is not read again.

        Every process has to call it when it is called first: each reads a part.
        """
        if not self._fingerprint:
            for name, contents in self.contents.items():
                read_digests(accelerator(), contents, progress, TITLES[name])
            self._fingerprint = fingerprint(self.data, progress, known=self.contents)
        return self._fingerprint

    def digest(self, progress: Progress = Silent()) -> str:
        """Which images are learned from: their fingerprint, and how many of them can be read."""
        more = "" if self.unlabeled is None else f"+{len(self.unlabeled.split)}"
        return f"{self.fingerprint(progress)[:16]}-{len(self.train.split)}{more}"

    def require_few_bad(self, share: float) -> None:
        """Look at what training found unreadable on the way, where views are not held in memory."""
        _require_few_bad(self.train, self.unlabeled, share)


def open_views(
    data: ImageData, spec: DataSpec, view: View, sources: Mapping[str, ViewSource], progress: Progress | None
) -> DataViews:
    """Decode and check the images of each split, and leave unreadable ones out.

    Args:
        progress: None decodes nothing beforehand.

    Raises:
        DataError: Too many cannot be read, or there is nothing to learn from.
    """
    for name, source in sources.items():
        # Decoding everything once finds unreadable images before training, where memory suffices.
        if len(source.split) and progress is not None:
            load_together(accelerator(), source, progress, TITLES[name])
    train, unlabeled = sources["train"], sources.get("unlabeled")
    # A few bad files are normal in a large folder; many mean a wrong path or a damaged disk.
    _require_few_bad(train, unlabeled, spec.max_bad)
    unreadable = (*train.bad_names(), *(unlabeled.bad_names() if unlabeled else ()))
    # An accuracy over fewer images than there are would be a different number: refused unless skip_bad says so.
    for name in ("val", "test", "selection"):
        if name in sources:
            require_readable(sources[name], name, spec.skip_bad)
            unreadable += tuple(sources[name].bad_names())
    # Indices must be stable during training, so bad images leave before the first step.
    good = {name: source.without_bad() for name, source in sources.items()}
    train, unlabeled = good["train"], good.get("unlabeled")
    return DataViews(
        data,
        view,
        train,
        good["val"],
        good.get("test"),
        unreadable,
        unlabeled,
        _training_source(train, unlabeled, spec.unlabeled_only),
        {name: source.contents for name, source in sources.items()},
        good.get("selection"),
        readable=np.delete(np.arange(len(sources["train"].split)), list(sources["train"].bad)),
    )


def _training_source(train: ViewSource, unlabeled: ViewSource | None, unlabeled_only: bool) -> ViewSource:
    if not unlabeled_only:
        # Labelled images come first: their indices are the same with and without unlabelled ones.
        return train if unlabeled is None else JoinedSource(train, unlabeled)
    if unlabeled is None or not len(unlabeled.split):
        raise DataError(
            "there is no image without a label to learn from",
            given="data.unlabeled_only",
            do="name some with --unlabeled, or keep fewer labels (data.labels)",
        )
    return unlabeled


def _require_few_bad(train: ViewSource, unlabeled: ViewSource | None, share: float) -> None:
    for source, called in ((train, TITLES["train"]), (unlabeled, TITLES["unlabeled"])):
        if source is not None and len(source.bad) > share * len(source.split):
            # Rounded up, so that the suggested value really suffices.
            enough = min(0.99, ceil(100 * len(source.bad) / len(source.split)) / 100)
            raise DataError(
                f"{len(source.bad)} of {len(source.split)} {called} cannot be read",
                given=listed(source.bad_names()),
                allowed=f"{share:.0%} of them (data.max_bad={share:g})",
                do="repair or remove them, or allow more in a new run, with another --output:"
                f" --set data.max_bad={enough:g}",
            )
