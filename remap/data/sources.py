"""Open images by a word: the name of a source, or a path. Adding a source: its file, a row in SOURCES, its test."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from remap.data import CLASSES, MULTILABEL, SOURCES, is_source
from remap.data.file_listing import Listing, list_folder
from remap.data.image_files import Skipped, also_left_out
from remap.data.images import SUFFIXES
from remap.data.shards import Shard
from remap.data.splits import NO_LABEL, ImageData, Split
from remap.data.tar_listing import list_tar
from remap.data.words import of_images, parsed, place_of
from remap.data.zip_listing import list_zip
from remap.errors import DataError, MissingData
from remap.io.checked_read import open_regular
from remap.io.human_size import number_of
from remap.io.names import look_alike, plain
from remap.io.paths import absolute, expanded

# First bytes of files that data sets come in, too, but which no reader of paths reads.
_OTHER_FILES = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PAR1": "a Parquet file",
}
TABLES, LISTS = (".csv", ".tsv"), (".txt",)
# What may lie at a path.
PATHS = "a folder of class folders, a tar or zip of one, a CSV of labels, or a Parquet file"


class Source(ABC):
    """Where labelled images come from. The class behind a row of ``SOURCES``; it is made without arguments.

    Attributes:
        depth: The recipe's ``data.depth``, for sources by path.
        least_classes: How few classes of images there may be, for sources of files.
        task: The recipe's ``task``: what a label is.
        several_labels: Whether an image of it can have several labels.
        by_folders: Whether the class of an image is a folder, so that ``depth`` counts.
    """

    task: str = CLASSES
    several_labels: bool = False
    by_folders: bool = False
    depth: int | None = None
    least_classes: int = 2

    @abstractmethod
    def open(self, word: str, val_source: str | None, val_fraction: float) -> ImageData:
        """Return the images to learn from and those to evaluate on.

        Args:
            word: What the user wrote, NAME or NAME:REST; for a row with ``by_path`` a path.
            val_source: Another word for the images to evaluate on.
            val_fraction: Share of each class to hold out where the source has no such images.

        Raises:
            DataError: There are no such images, or they do not fit together.
        """

    def read_all(self, word: str, classes: Sequence[str]) -> tuple[Split, Skipped]:
        """Return all images, of all splits, labelled by a task's class names, and what was left out."""
        data = self.open(word, None, 0.5)
        if unknown := sorted(set(data.classes) - set(classes)):
            raise unknown_classes(unknown, classes)
        return data.with_classes(classes).everything, data.skipped

    def images(self, word: str) -> tuple[Sequence[tuple[str, Listing]], Skipped]:
        """Return all images of all splits, whatever their labels, each with what reads it; and what was left out."""
        data = self.open(word, None, 0.5)
        everything = data.everything
        index = {name: i for i, name in enumerate(everything.names)}
        listing = Listing(everything.names, (), lambda name: everything.read(index[name]), lambda _name: -1)
        return [(name, listing) for name in everything.names], data.skipped

    def around(self, word: str) -> str:
        """Return the folder around all images, which their names leave out, as "photos/"; empty without one."""
        return ""

    def shards(self, word: str) -> list[Shard]:
        """Return the files that a word names, in whose names those of the images begin; none of other sources."""
        return []

    def by_shard(self, word: str) -> "list[Source]":
        """Return a source for each shard of the word that can be listed by itself; none where there are no shards."""
        return []

    def recognises(self, path: Path) -> bool:
        """Return whether a source with ``by_path`` reads what lies at this path."""
        return False


def find_source(word: str, depth: int | None = None, task: str = CLASSES) -> Source:
    """Return the source that a word names, or the one that reads what lies at the path it is.

    Raises:
        MissingData: There is nothing at the path.
        DataError: A ``depth`` for a source that has no folders, or several labels of one whose images have one each.
    """
    source = _find_source(word, depth)
    source.task = task
    if task == MULTILABEL and not source.several_labels:
        raise DataError(
            "images of this source have one class each, and task: multilabel learns any number of them",
            given=word,
            allowed="a CSV or TSV, a data set of Hugging Face, Parquet files, or WebDataset shards with JSON",
            do="list the images with their labels in a CSV, or leave task out",
        )
    return source


def _find_source(word: str, depth: int | None) -> Source:
    if not word.strip():  # as a path it is the current folder
        raise MissingData("no such data", given="an empty word", allowed=PATHS, do="name the images")
    if is_source(word):
        if depth not in (None, 1):
            raise DataError("data.depth is for folders of class folders", given=f"data.depth={depth}, {word}")
        source: Source = SOURCES.load(word.partition(":")[0])()
        parsed(word)  # refuses unknown options
        return source
    # The last row first: the built-in reader of paths takes every file for a tar.
    for row in reversed(list(SOURCES)):
        if row.by_path and (source := row.load()()).recognises(expanded(word)):
            source.depth = depth
            return source
    named = ", ".join(f"{row.name}{':' if row.takes else ''}" for row in SOURCES if row.takes or not row.by_path)
    raise missing(word, f"{named}, {PATHS}")


def open_data(
    source: str | None,
    val_source: str | None,
    val_fraction: float,
    unlabeled: str | None = None,
    labels: int | None = None,
    depth: int | None = None,
    held_out: float | None = None,
    per_class: int | None = None,
    selection: float | None = None,
    only: Sequence[str] | None = None,
    known_classes: Sequence[str] | None = None,
    classes: tuple[str, ...] = (),
    per_class_seed: int = 0,
    subset: str | None = None,
    task: str = CLASSES,
) -> ImageData:
    """Open a data source.

    Args:
        source: The name of a source, or a path; None where no image has a label.
        val_source: Where the images to evaluate on are, if not in ``source``.
        val_fraction: Share of each class to hold out where there are no images to evaluate on.
        unlabeled: A folder or archive of images without labels, in any folders.
        labels: Use the labels of this many training images; the others count as unlabelled.
        depth: Level of folders that are the classes; None is 1, and refuses class folders that hold only folders.
        held_out: Evaluate on this share of the labelled training images, in place of the evaluation images.
        per_class: Learn from at most this many labelled images of each class.
        selection: Hold this share of the other labelled training images out, to choose the epoch by.
        only: The classes whose images are used; None is all.
        known_classes: Names that labels count, of which the images may lack some; None is those of the images.
        classes: What a teacher tells apart, where no image to learn from has a label.
        per_class_seed: Which draw of ``per_class`` images.
        subset: "base" or "new": half of the classes; None is all.
        task: What a label is: one class, or with MULTILABEL any number of them.

    Raises:
        DataError: There is nothing, fewer than two classes, an empty class, classes that differ between splits, or an
            impossible number of labels.
    """
    if source is None:
        assert unlabeled is not None, "a recipe without labelled images names some without labels"
        more, skipped = open_unlabeled(unlabeled)
        val, left_out = (Split.empty(), ()) if val_source is None else read_all(val_source, classes, depth)
        if val_source is not None:
            _require_apart(ImageData(val_source, classes, Split.empty(), val), val_source, unlabeled)
        files = (*skipped, *left_out)
        return ImageData(unlabeled, classes, Split.empty(), val, None, files, "no labels", more)
    words = (source, val_source, val_fraction)
    least = 2 if known_classes is None else 1  # the classifier knows others
    data = open_labeled(*words, depth, only, least, task)
    if subset is not None:
        data = data.with_subset(subset)
    if per_class is not None:
        data = data.with_per_class(per_class, per_class_seed)
    if labels is not None:
        data = data.with_labels(labels)
    if held_out is not None:
        data = data.with_held_out(held_out)
    if not len(data.val):  # of some classes there may be training images alone
        raise DataError(
            "there are no images to evaluate on of these classes",
            given=", ".join(data.classes[:20]),
            do="name some (data.val_source), or hold training images out (data.held_out)",
        )
    if data.test is not None and not len(data.test):
        data = replace(data, test=None)
    if selection is not None:
        data = data.with_selection(selection)
    if known_classes is not None:
        data = data.with_classes(known_classes)
    return data if unlabeled is None else add_unlabeled(data, source, val_source, unlabeled)


def add_unlabeled(data: ImageData, source: str, val_source: str | None, unlabeled: str) -> ImageData:
    """Return labelled data with more images without labels.

    Args:
        source, val_source: Where the labelled images come from.

    Raises:
        DataError: There are no more images, or images to evaluate on are among them.
    """
    _require_apart(data, source if val_source is None else val_source, unlabeled)
    more, skipped = open_unlabeled(unlabeled)
    return replace(data.with_unlabeled(more), skipped=(*data.skipped, *skipped))


def open_labeled(
    source: str,
    val_source: str | None,
    val_fraction: float,
    depth: int | None,
    only: Sequence[str] | None,
    least: int,
    task: str = CLASSES,
) -> ImageData:
    """Open the labelled images of a source, of all classes or some: of ``least`` at least."""
    found = find_source(source, depth, task)
    found.least_classes = least
    data = found.open(source, val_source, val_fraction)
    if only is None:
        return data
    data = data.with_only(only)
    if len(data.classes) < least:
        raise DataError("at least two classes are needed", given=f"data.only={', '.join(only)}")
    return data


def read_all(
    source: str, classes: Sequence[str], depth: int | None = None, task: str = CLASSES
) -> tuple[Split, Skipped]:
    """Return all images of a source, of all its splits, labelled by a task's class names; and what was left out.

    Args:
        depth: Of class folders; other sources have none.

    Raises:
        DataError: It has classes the task does not know.
    """
    found = find_source(source, None, task)
    found.depth = depth if found.by_folders else None
    return found.read_all(source, classes)


def open_unlabeled(source: str) -> tuple[Split, Skipped]:
    """Return all images of a source, of any folders and splits, without labels; and what was left out.

    Names begin with the name of the folder or archive, since the labelled data may hold files of the same names.

    Raises:
        DataError: There is nothing, or no images.
    """
    source = of_images(source)
    files, left_out = find_source(source).images(source)
    name = Path(parsed(source).rest).name
    skipped = [(plain(f"{name}/{path}"), reason) for path, reason in left_out]
    if not files:
        raise DataError(
            "no images to learn from without labels",
            given=f"{source} ({number_of(len(skipped), 'file')}{also_left_out(skipped)})",
            allowed=f"files with one of {' '.join(SUFFIXES)}, in any folders",
        )
    names = tuple(plain(f"{name}/{path}") for path, _ in files)
    labels_N = np.full(len(files), NO_LABEL, dtype=np.int64)
    return Split(names, labels_N, lambda i: files[i][1].read(files[i][0])), skipped


def list_files(word: str, allowed: str) -> Listing:
    """Return the files in a folder, a tar or a zip.

    Raises:
        MissingData: There is nothing at this path; the message names what is ``allowed``.
    """
    path = expanded(word)
    if os.path.isdir(path):
        return list_folder(path)
    if os.path.exists(path):
        return _list_file(path)
    raise missing(word, allowed)


def _list_file(path: Path) -> Listing:
    try:
        with open_regular(path) as file:
            start = file.read(8)
    except OSError:
        start = b""  # which ``list_tar`` explains
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return list_zip(path)
    if path.suffix.lower() == ".zip":
        do = "download or copy it again; if it is another kind of file, name the folder of the images"
        raise DataError("this is not a zip archive, or an incomplete one", given=path, do=do)
    if path.suffix.lower() in SUFFIXES:
        do = "name the folder whose sub-folders are the classes, or a table that lists images with their labels"
        raise DataError("this is an image, and not a set of images", given=path, allowed=PATHS, do=do)
    kind = next((kind for magic, kind in _OTHER_FILES.items() if start.startswith(magic)), None)
    if kind is not None:
        do = "name it as parquet:FILE" if start.startswith(b"PAR1") else "unpack it and name the folder"
        raise DataError(f"{kind} is not read", given=path, allowed=PATHS, do=do)
    return list_tar(path)


def missing(word: str, allowed: str) -> MissingData:
    """Return the error for a word that is neither a source nor the path of anything."""
    if re.search(r"\b(?:https?|ftp|s3|gs|hf):/", word):
        return MissingData("data is not downloaded", given=word, allowed=allowed, do="download it and name the file")
    from_here = "" if expanded(word).is_absolute() else "; relative paths start at the current folder"
    return MissingData("no such data", given=word, allowed=allowed, do=f"check the path{from_here}")


def unknown_classes(names: Iterable[str], classes: Sequence[str]) -> DataError:
    """Return the error for data with other classes than those a task was tuned for."""
    given, allowed = list(names), list(classes)
    do = next((text for name in given if (text := look_alike(name, allowed))), None)
    text = "classes the task does not know"
    return DataError(text, given=", ".join(given[:10]), allowed=", ".join(allowed[:20]), do=do and f"rename one: {do}")


def _require_apart(data: ImageData, labeled: str, unlabeled: str) -> None:
    """Refuse to learn from images to evaluate on, also without their labels; these come from ``labeled``."""
    splits = [split for split in (data.val, data.test) if split is not None]
    known, others = find_source(labeled), find_source(of_images(unlabeled))
    both = {absolute(shard.path) for shard in others.shards(unlabeled)}
    of_both = tuple(plain(f"{shard.name}/") for shard in known.shards(labeled) if absolute(shard.path) in both)
    if of_both and any(name.startswith(of_both) for split in splits for name in split.names):
        raise _not_apart(labeled, unlabeled)
    (outer, _), (inner, listed) = _root_of(labeled), _root_of(of_images(unlabeled))
    if listed or inner.is_relative_to(outer):
        outer = outer / known.around(labeled)
    if listed:  # a table or an option names single files below a folder
        there = {inner / plain(name) for name, _ in find_source(of_images(unlabeled)).images(of_images(unlabeled))[0]}
        if any(outer / name in there for split in splits for name in split.names):
            raise _not_apart(labeled, unlabeled)
        return
    # One split of a source may be apart from its others.
    if outer.is_relative_to(inner) and "split" not in parsed(unlabeled).options:
        raise DataError(
            "the folder of images without labels holds the labelled ones, and maybe those to evaluate on",
            given=f"{unlabeled} and {labeled}",
            do="name another folder; to learn from this one with the labels of N images only, set data.labels=N",
        )
    if not inner.is_relative_to(outer):
        return
    prefix = "" if inner == outer else plain(f"{inner.relative_to(outer).as_posix()}/")
    names = {name for name, _ in find_source(unlabeled).images(unlabeled)[0]} if not prefix else set()
    if any(name in names if not prefix else name.startswith(prefix) for split in splits for name in split.names):
        raise _not_apart(labeled, unlabeled)


def _not_apart(labeled: str, unlabeled: str) -> DataError:
    return DataError(
        "what is named as images without labels holds images to evaluate on",
        given=f"{unlabeled}, and labelled ones of {labeled}",
        do="name other images; to learn from few labels, set data.labels=N",
    )


def _root_of(word: str) -> tuple[Path, bool]:
    """Return the folder that the names of a word's images are relative to, and whether they are listed one by one."""
    place, options = place_of(word), parsed(word).options
    folder = options.get("folder") or options.get("root")
    if folder is not None:
        return Path(absolute(folder)), True
    is_table = place.suffix.lower() in TABLES + LISTS
    return (place.parent, True) if is_table else (place, False)
