"""Labelled images in files: divided into splits by their source, or by remap with all copies of a file on one side."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from remap.data.copies import copies_together, first_copies
from remap.data.file_listing import Listing
from remap.data.image_files import OTHER_TABLES, Skipped, also_left_out
from remap.data.sources import PATHS, TABLES, Source, find_source, unknown_classes
from remap.data.splits import ImageData, Split
from remap.errors import DataError
from remap.io.names import name_problem, plain, same_name

# Files of each class with the listing that reads them: {"ants": [("train/ants/1.png", Listing), ...]}.
ByClass = dict[str, list[tuple[str, Listing]]]
# By "train", "val" and "test"; "all" where there are no splits. A split that holds no image is empty.
BySplit = dict[str, ByClass]
Images = TypeVar("Images")


class LabeledFiles(Source):
    """A source by path. Its own splits are used where there are any; otherwise a share of each class is held out."""

    @abstractmethod
    def read(self, word: str, depth: int | None) -> tuple[BySplit, Skipped]:
        """Return the images by split and class, and what was left out.

        Args:
            depth: Level of folders that are the classes; None is 1, and an error where all images lie deeper.
        """

    def open(self, word: str, val_source: str | None, val_fraction: float) -> ImageData:
        splits, skipped = self.read(word, self.depth)
        if val_source is not None:
            val, more = _to_evaluate_on(val_source, self.depth or 1)
            splits, skipped = {"train": splits.get("train") or splits.get("all", {}), "val": val}, [*skipped, *more]
        elif "val" not in splits and splits.get("test"):
            splits = {"train": splits.get("train", {}), "val": splits["test"]}
        if not (splits.get("train") or splits.get("all")):
            text, given = "there are no labelled images to learn from", word + also_left_out(skipped)
            raise DataError(text, given=given, do=_all_the_same(splits))
        if "val" not in splits:
            return _hold_out(word, splits.get("all") or splits["train"], val_fraction, skipped, self.least_classes)
        if not splits["val"]:
            raise DataError(
                "the folder to evaluate on holds no images in class folders",
                given=word + also_left_out(skipped),
                do="sort its images into class folders, name others with --val-data, or move it elsewhere",
            )
        return _with_splits(word, splits, skipped, self.least_classes)

    def read_all(self, word: str, classes: Sequence[str]) -> tuple[Split, Skipped]:
        splits, skipped = self.read(word, self.depth or 1)
        together: ByClass = {}
        for by_class in splits.values():
            for name, files in by_class.items():
                together.setdefault(name, []).extend(files)
        together = merged(together, classes)
        unknown = sorted(set(together) - set(classes))
        if unknown:
            raise unknown_classes(unknown, classes)
        return _split(together, classes), skipped


def merged(by_class: ByClass, known: Sequence[str] = ()) -> ByClass:
    """Return the images with equal class names together, under the ``known`` name or the first; checks the names."""
    names = {same_name(name): name for name in known}
    together: ByClass = {}
    for name, files in by_class.items():
        together.setdefault(names.setdefault(same_name(name), name), []).extend(files)
    for name in together:  # they go into task files, tables and reports, and are typed on command lines
        problem = name_problem(name) or ("more than 255 letters" if len(name) > 255 else None)
        if problem:
            raise DataError(f"a class name has {problem}", given=plain(name)[:80], do="rename the class")
    return together


def _to_evaluate_on(word: str, depth: int) -> tuple[ByClass, Skipped]:
    source = find_source(word)
    if not isinstance(source, LabeledFiles):
        raise DataError("images to evaluate on come from a path", given=word, allowed=PATHS)
    splits, skipped = source.read(word, depth if source.by_folders else None)
    return to_evaluate_on(splits, word), skipped


def to_evaluate_on(splits: Mapping[str, Images], word: str) -> Images:
    """Return the images of the split of a source that is evaluated on.

    Raises:
        DataError: There are none.
    """
    found = next((splits[name] for name in ("val", "test", "all") if splits.get(name)), None)
    if found is None:
        raise DataError("no images to evaluate on", given=word, do=_all_the_same(splits))
    return found


def _all_the_same(splits: Mapping[str, object]) -> str | None:
    """Return how to take images that are of other splits than is wanted; None where there are none."""
    names = " and ".join(name for name, images in splits.items() if images)
    do = "name their folder, or of tables and shards add ,split=NAME (as NAME:REST,split=NAME)"
    return f"its images are those of {names}; to take them all the same {do}" if names else None


def _split(by_class: ByClass, classes: Sequence[str]) -> Split:
    files = [file for name in classes for file in by_class.get(name, [])]
    labels = np.repeat(np.arange(len(classes)), [len(by_class.get(name, [])) for name in classes])
    return Split(tuple(plain(name) for name, _ in files), labels, lambda i: files[i][1].read(files[i][0]))


def _require_classes(word: str, by_class: ByClass, skipped: Skipped, least: int) -> tuple[str, ...]:
    classes = tuple(sorted(by_class))
    if len(classes) < least:
        raise DataError(
            "at least two classes are needed" if least == 2 else "there are no images of a class",
            given=f"{word} has {', '.join(classes) or 'none'}",
            do=table_hint(word, skipped) or "name the folder whose sub-folders are the classes",
        )
    return classes


def table_hint(word: str, skipped: Skipped) -> str | None:
    """Return what to do where there are no class folders, but a file that may hold the labels."""
    for endings, do in (
        (TABLES, "if {0} holds the labels, name it: --data {1}/{0}"),
        # With all files of the folder, which may be splits.
        ((".parquet",), "if these are Parquet files of images, write parquet: before it: --data parquet:{1}"),
        ((".cls", ".tar"), "if these are WebDataset shards, write webdataset: before it: --data webdataset:{1}"),
        (OTHER_TABLES, "if {0} holds the labels, convert it to a CSV and name that"),
    ):
        table = next((name for name, _ in skipped if name.lower().endswith(endings)), None)
        if table is not None:
            return do.format(table, word)
    return None


def _hold_out(word: str, by_class: ByClass, fraction: float, skipped: Skipped, least: int) -> ImageData:
    """Hold out a share of each class; which images is a function of their number alone, and of which are copies."""
    classes = _require_classes(word, by_class, skipped, least)
    images = _split(by_class, classes)
    small = [classes[label] for label, count in enumerate(np.bincount(images.labels)) if count < 2]
    if small:
        raise DataError(
            "a class needs two images at least, one to learn from and one to check",
            given=", ".join(small[:10]) + (f" and {len(small) - 10} more" if len(small) > 10 else ""),
            do="add images, remove these classes, or name images to evaluate on (--val-data)",
        )
    files = [file for name in classes for file in by_class[name]]
    first_N = first_copies(images, lambda index: files[index][1].size(files[index][0]))
    distinct = len(np.unique(first_N))
    count = distinct - max(len(classes), round(distinct * fraction))
    train, val = copies_together(images, first_N, max(count, len(classes)))
    rule = f"{fraction:.0%} of each class held out for evaluation"
    if distinct < len(images):
        rule += f"; {len(images) - distinct} copies are on the side of the file they equal"
    return ImageData(word, classes, train, val, skipped=tuple(skipped), split_rule=rule)


def _with_splits(word: str, splits: BySplit, skipped: Skipped, least: int) -> ImageData:
    classes = _require_classes(word, splits["train"], skipped, least)
    parts = {name: merged(by_class, classes) for name, by_class in splits.items()}
    for name in ("val", "test"):
        unknown = sorted(set(parts.get(name, {})) - set(classes))
        if unknown:
            error = unknown_classes(unknown, classes)
            do = error.do or f"remove them from {name}, or add training images"
            raise DataError(f"classes in {name} that train lacks", given=error.given, allowed=error.allowed, do=do)
    train, val = _split(parts["train"], classes), _split(parts["val"], classes)
    test = _split(parts["test"], classes) if parts.get("test") else None
    return ImageData(word, classes, train, val, test, tuple(skipped), "the source's own training and evaluation images")
