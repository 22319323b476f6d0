"""What several runs can share: open data, decoded views, a prepared teacher and its outputs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remap.data.sources import open_data
from remap.data.splits import ImageData
from remap.data.views import View, ViewSource, require_readable
from remap.errors import DataError
from remap.progress import Progress
from remap.recipe.schema import DataSpec


@dataclass
class Views:
    """A data source seen through one view; unreadable training images are already left out and named."""

    data: ImageData
    view: View
    train: ViewSource
    val: ViewSource
    test: ViewSource | None
    skipped: tuple[tuple[str, str], ...]

    def digest(self) -> str:
        """Which images are learned from: names, labels, order, and how many of them can be read."""
        return f"{self.data.fingerprint()[:16]}-{len(self.train.split)}"

    def require_few_bad(self, share: float) -> None:
        """Look at what training found unreadable on the way, where views are not kept in memory."""
        _require_few_bad(self.train, share)


@dataclass
class Bench:
    """Keeps what was opened or computed, by the values that decide it. One run makes a fresh one.

    Attributes:
        teacher_folder: Where a prepared teacher is kept for all runs; None keeps it with the run.
    """

    data: dict[tuple, ImageData] = field(default_factory=dict)
    views: dict[tuple, Views] = field(default_factory=dict)
    teachers: dict[str, Any] = field(default_factory=dict)
    targets: dict[tuple, Any] = field(default_factory=dict)
    teacher_folder: Path | None = None

    def index(self, spec: DataSpec) -> ImageData:
        """List a data source, once; no image is decoded."""
        key = (spec.source, spec.val_source, spec.val_fraction)
        if key not in self.data:
            self.data[key] = open_data(*key)
        return self.data[key]

    def classes(self, spec: DataSpec) -> tuple[str, ...]:
        return self.index(spec).classes

    def open(self, spec: DataSpec, view: View, progress: Progress) -> Views:
        """Open, decode and check a data source, once."""
        key = (spec.source, spec.val_source, spec.val_fraction, spec.skip_bad, spec.max_bad, view)
        if key not in self.views:
            self.views[key] = _open(self.index(spec), spec, view, progress)
        return self.views[key]


def _open(data: ImageData, spec: DataSpec, view: View, progress: Progress) -> Views:
    budget = spec.memory_gib * 2**30
    sources: dict[str, ViewSource] = {}
    for name, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        if split is not None:
            sources[name] = ViewSource(split, view, memory_bytes=budget, workers=spec.workers)
            budget -= sources[name].kept_bytes
    for name, source in sources.items():
        source.load(progress, {"train": "training images", "val": "evaluation images", "test": "test images"}[name])
    train = sources["train"]
    _require_few_bad(train, spec.max_bad)
    skipped = (*data.skipped, *train.bad_names())
    for name in ("val", "test"):
        if name in sources:
            require_readable(sources[name], name, spec.skip_bad)
            skipped += tuple(sources[name].bad_names())
    return Views(
        data,
        view,
        train.without_bad(),
        sources["val"].without_bad(),
        sources["test"].without_bad() if "test" in sources else None,
        skipped,
    )


def _require_few_bad(train: ViewSource, share: float) -> None:
    if len(train.bad) > share * len(train.split):
        raise DataError(
            f"{len(train.bad)} of {len(train.split)} training images cannot be read",
            given="; ".join(f"{name} ({reason})" for name, reason in train.bad_names()[:5]),
            do="repair them, or allow more with --set data.max_bad=0.5",
        )
