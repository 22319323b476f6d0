"""What several runs can share: listed data, decoded views, prepared teachers and their outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from remap.backbones.preprocess import PreprocessSpec
from remap.data.fingerprint import Contents, fingerprint
from remap.data.memory import with_memory
from remap.data.pixels import Pixels
from remap.data.sources import add_unlabeled, open_data
from remap.data.splits import ImageData
from remap.data.value_range import find_value_range
from remap.data.views import JoinedSource, View, ViewSource, listed, require_readable
from remap.distributed.launch import accelerator
from remap.distributed.reading import listing_together, load_together, read_digests
from remap.errors import DataError
from remap.io.paths import expanded
from remap.language.words import class_words
from remap.progress import Progress, Silent
from remap.recipe.schema import DataSpec, Recipe


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
        evaluations: What networks answered on the evaluation images, see ``evaluate_once``.
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
    _fingerprint: str = ""

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """All files that are not used, with the reason."""
        return (*self.data.skipped, *self.unreadable)

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
                read_digests(accelerator(), contents, progress, _TITLES[name])
            self._fingerprint = fingerprint(self.data, progress, known=self.contents)
        return self._fingerprint

    def digest(self, progress: Progress = Silent()) -> str:
        """Which images are learned from: their fingerprint, and how many of them can be read."""
        more = "" if self.unlabeled is None else f"+{len(self.unlabeled.split)}"
        return f"{self.fingerprint(progress)[:16]}-{len(self.train.split)}{more}"

    def require_few_bad(self, share: float) -> None:
        """Look at what training found unreadable on the way, where views are not held in memory."""
        _require_few_bad(self.train, self.unlabeled, share)


@dataclass
class SharedResources:
    """Memoised datasets, teachers and their outputs, shared by the runs of a comparison; a single run makes its own.

    Attributes:
        features: Frozen features of the newest run that cached any.
        teacher_folder: Where a prepared teacher is stored for all runs; None stores it with the run.
        tuned_teachers: Folder of each teacher that was tuned, by the digest of its recipe.
        read_ahead: Whether images are decoded when they are opened, which finds those that cannot be read; a dry run
            looks at a few alone.
        shapes_only: Whether students with random weights have shapes alone (on the meta device): for counting them.
        said: What was said of the images already.
        use_stored_teachers: Whether tuned teachers are taken from and put into the cache; a repeat tunes its own.
    """

    data: dict[tuple, ImageData] = field(default_factory=dict)
    value_ranges: dict[tuple, tuple[float, float] | None] = field(default_factory=dict)
    views: dict[tuple, DataViews] = field(default_factory=dict)
    teachers: dict[str, Any] = field(default_factory=dict)
    targets: dict[tuple, Any] = field(default_factory=dict)
    tuned_teachers: dict[str, Path] = field(default_factory=dict)
    teacher_folder: Path | None = None
    use_stored_teachers: bool = True
    read_ahead: bool = True
    shapes_only: bool = False
    features: dict[tuple, dict[str, Any]] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    _contents: dict[int, Contents] = field(default_factory=dict)
    _in_memory: dict[tuple[int, View], ViewSource] = field(default_factory=dict)

    def say_once(self, progress: Progress, text: str) -> None:
        """Report what is known of the images, unless another run said it."""
        if text not in self.said:
            self.said.add(text)
            progress.say(text)

    def index(self, spec: DataSpec) -> ImageData:
        """List a data source, once; no image is decoded."""
        arguments = source_arguments(spec)
        # The memory is joined after the source is opened, so it is not one of the arguments.
        key = (*arguments, spec.memory)
        if key not in self.data:
            more = spec.unlabeled or spec.target
            if spec.source is not None and more is not None:
                # The labelled ones by themselves are the images of its teachers and its baseline.
                data = add_unlabeled(self.index(spec.labeled_part()), spec.source, spec.val_source, more)
            else:
                # A folder on a network drive takes minutes to list.
                data = open_data(*arguments)
                if spec.memory is not None:
                    data = with_memory(data, expanded(spec.memory), spec.selection)
            self.data[key] = data
        return self.data[key]

    def list_together(self, spec: DataSpec) -> ImageData:
        """Return ``index``, for which each process lists its part of many shards; every process has to call it."""
        with listing_together(accelerator()):
            return self.index(spec)

    def contents(self, spec: DataSpec) -> dict[str, Contents]:
        """Return what is known of the files of each split, in whatever view and data, so that none is read again."""
        data = self.index(spec)
        splits = {name: getattr(data, name) for name in _TITLES if getattr(data, name) is not None}
        for split in splits.values():
            if id(split) not in self._contents:
                self._contents[id(split)] = Contents(split, spec.workers)
        return {name: self._contents[id(split)] for name, split in splits.items()}

    def classes(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the classes that teachers and student answer with; none where no loss is about classes."""
        found = self.index(recipe.data).classes
        return () if recipe.label_free else found

    def training_steps(self, recipe: Recipe) -> int:
        """Return the steps that a run trains its student for, as far as a listing of its images tells."""
        data = self.index(recipe.data)
        others = 0 if data.unlabeled is None else len(data.unlabeled)
        images = others if recipe.data.unlabeled_only else len(data.train) + others
        return recipe.train.epochs * max(1, images // recipe.train.batch_size)

    def view(self, spec: DataSpec, inputs: Sequence[PreprocessSpec]) -> View:
        """Return the one view that serves all networks: cropped and shaped as for the first, as large as for any.

        Values of more than 8 bits are scaled by the recipe's range, or by that of the training images, looked at once.
        """
        first, (_, height, width) = inputs[0], inputs[0].shape
        factor = max(max(one.shape[1] / height, one.shape[2] / width) for one in inputs)
        size = (round(height * factor), round(width * factor))
        channels = max(one.shape[0] for one in inputs)
        pixels = Pixels(channels, spec.alpha, megapixels=spec.max_megapixels, decode=spec.decode)
        if spec.value_range is not None:
            pixels = replace(pixels, value_range=(spec.value_range[0], spec.value_range[1]))
        else:
            key = (*source_arguments(spec), pixels)
            if key not in self.value_ranges:
                self.value_ranges[key] = find_value_range(self.index(spec).to_look_at, pixels, spec.workers)
            pixels = replace(pixels, value_range=self.value_ranges[key])
        return View(size[0] if size[0] == size[1] else size, first.crop_pct, first.interpolation, pixels)

    def open(self, spec: DataSpec, view: View, progress: Progress) -> DataViews:
        """Open, decode and check a data source, once."""
        # Only what changes the views is part of the key; cells of a comparison differ elsewhere.
        key = (*source_arguments(spec), spec.memory, spec.unlabeled_only, spec.skip_bad, spec.max_bad, view)
        if key not in self.views:
            sources = self._sources(spec, view)
            self.views[key] = _open(self.index(spec), spec, view, sources, progress if self.read_ahead else None)
        return self.views[key]

    def _sources(self, spec: DataSpec, view: View) -> dict[str, ViewSource]:
        """Return the images of each split; what is held in memory for other data serves again."""
        # One budget for all splits, in the order in which training reads them most often.
        budget, sources = spec.memory_gib * 2**30, dict[str, ViewSource]()
        for name, known in self.contents(spec).items():
            source = self._in_memory.get((id(known.split), view)) or ViewSource(
                known.split, view, memory_bytes=budget, workers=spec.workers, contents=known
            )
            if source.cached_bytes:
                self._in_memory[id(known.split), view] = source
            budget -= source.cached_bytes
            sources[name] = source
        return sources


def source_arguments(spec: DataSpec) -> tuple:
    """Return what decides which images there are: the arguments of ``open_data``."""
    images = (spec.source, spec.val_source, spec.val_fraction, spec.unlabeled or spec.target)
    some = (spec.labels, spec.depth, spec.held_out, spec.per_class, spec.selection)
    # Words name the classes only where no labelled image does.
    alone = spec.source is None and spec.classes is not None
    classes = tuple(class_words(spec.classes or ())) if alone else ()
    return (*images, *some, spec.only, spec.known_classes, classes, spec.per_class_seed, spec.subset, spec.task)


_TITLES = {
    "train": "training images",
    "unlabeled": "images without labels",
    "val": "evaluation images",
    "test": "test images",
    "selection": "selection images",
}


def _open(
    data: ImageData, spec: DataSpec, view: View, sources: Mapping[str, ViewSource], progress: Progress | None
) -> DataViews:
    for name, source in sources.items():
        # Decoding everything once finds unreadable images before training, where memory suffices.
        if len(source.split) and progress is not None:
            load_together(accelerator(), source, progress, _TITLES[name])
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
    for source, called in ((train, _TITLES["train"]), (unlabeled, _TITLES["unlabeled"])):
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
