"""What several runs can share: listed data, decoded views, prepared teachers and their outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from remap.backbones.preprocess import PreprocessSpec
from remap.data.composed_sources import PartSource
from remap.data.fingerprint import Contents
from remap.data.memory import with_memory
from remap.data.pixels import Pixels
from remap.data.sources import add_unlabeled, open_data
from remap.data.splits import ImageData
from remap.data.stratify import without_fold
from remap.data.value_range import find_value_range
from remap.data.views import View, ViewSource
from remap.distributed.launch import accelerator
from remap.distributed.reading import listing_together
from remap.io.paths import expanded
from remap.pipeline.data_views import TITLES, DataViews, open_views
from remap.progress import Progress
from remap.recipe.schema import DataSpec, Recipe
from remap.runs.run_images import source_arguments


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
    _evaluations: dict[tuple[int, View, bool], dict[str, Any]] = field(default_factory=dict)

    def say_once(self, progress: Progress, text: str) -> None:
        """Report what is known of the images, unless another run said it."""
        if text not in self.said:
            self.said.add(text)
            progress.say(text)

    def index(self, spec: DataSpec) -> ImageData:
        """List a data source, once; no image is decoded."""
        arguments = source_arguments(spec)
        # The memory is joined after the source is opened, and a fold left out last: neither is one of the arguments.
        key = (*arguments, spec.memory, spec.fold)
        if key not in self.data:
            more = spec.unlabeled or spec.target
            if spec.fold is not None:
                data = self.index(spec.without_folds()).without_fold(*spec.fold.left_out)
            elif spec.source is not None and more is not None:
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
        splits = {name: getattr(data, name) for name in TITLES if getattr(data, name) is not None}
        parts = {}
        if spec.fold is not None:
            whole = self.contents(spec.without_folds())["train"]
            fit, check = without_fold(whole.split.labels, *spec.fold.left_out)
            parts = {"train": whole.taken(fit), "val": whole.taken(check)}
        for name, split in splits.items():
            if id(split) not in self._contents:
                self._contents[id(split)] = parts.get(name) or Contents(split, spec.workers)
        return {name: self._contents[id(split)] for name, split in splits.items()}

    def classes(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the classes that teachers and student answer with; none where no loss is about classes."""
        found = self.index(recipe.data).classes
        return () if recipe.label_free else found

    def training_steps(self, recipe: Recipe) -> int:
        """Return the steps that a run trains its student for, as far as a listing of its images tells."""
        if not recipe.train.by_steps:
            return 0
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
                images = self.index(spec.without_folds()).to_look_at  # the same range for the teacher of each fold
                self.value_ranges[key] = find_value_range(images, pixels, spec.workers)
            pixels = replace(pixels, value_range=self.value_ranges[key])
        return View(size[0] if size[0] == size[1] else size, first.crop_pct, first.interpolation, pixels)

    def open(self, spec: DataSpec, view: View, progress: Progress) -> DataViews:
        """Open, decode and check a data source, once."""
        # Only what changes the views is part of the key; cells of a comparison differ elsewhere.
        some = (spec.memory, spec.fold, spec.unlabeled_only, spec.skip_bad, spec.max_bad)
        key = (*source_arguments(spec), *some, view)
        if key not in self.views:
            if spec.fold is not None:
                self.open(spec.without_folds(), view, progress)  # decoded once, for all folds
            sources, data = self._sources(spec, view), self.index(spec)
            views = open_views(data, spec, view, sources, progress if self.read_ahead else None)
            # Other data may have the same evaluation images: a run with images without labels, and its teacher's.
            views.evaluations = self._evaluations.setdefault((id(data.val), view, spec.skip_bad), views.evaluations)
            self.views[key] = views
        return self.views[key]

    def _sources(self, spec: DataSpec, view: View) -> dict[str, ViewSource]:
        """Return the images of each split; what is held in memory for other data serves again."""
        if spec.fold is not None:
            sources = self._sources(spec.without_folds(), view)
            fit, check = without_fold(sources["train"].split.labels, *spec.fold.left_out)
            parts = {"train": fit, "val": check} if spec.fold.evaluates else {"train": fit}
            named = {name: sources[name] for name in sources if name != "test" or not spec.fold.evaluates}
            return {**named, **{name: PartSource(sources["train"], part) for name, part in parts.items()}}
        # One budget for all splits, in the order in which training reads them most often.
        budget, sources = spec.memory_gib * 2**30, {}
        for name, known in self.contents(spec).items():
            source = self._in_memory.get((id(known.split), view)) or ViewSource(
                known.split, view, memory_bytes=budget, workers=spec.workers, contents=known
            )
            if source.cached_bytes:
                self._in_memory[id(known.split), view] = source
            budget -= source.cached_bytes
            sources[name] = source
        return sources
