"""Sources that list their images one by one, each with its label and split: tables, lists, shards."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from remap.data import MULTILABEL
from remap.data.file_listing import Listing
from remap.data.folder_layout import split_named
from remap.data.image_files import Skipped
from remap.data.label_sets import BySplit as SetsBySplit
from remap.data.label_sets import divided, multi_hot
from remap.data.labeled_files import BySplit, LabeledFiles, merged, to_evaluate_on
from remap.data.sources import PATHS, find_source
from remap.data.splits import ImageData, Split
from remap.data.words import Word, parsed
from remap.errors import DataError
from remap.io.names import plain
from remap.io.versions import install_command

# Names of columns and keys that hold a label, in lower case; of several labels an image.
LABEL = ("label", "class", "category", "target", "class_name", "label_name")
LABELS = ("labels", "tags", "classes", "categories")
# Why a row is left out whose file has a row with the same label, in the same split.
REPEATED = "in a row above already"


class Row(NamedTuple):
    """One image.

    Attributes:
        name: Different for each image of the source; ``listing.read(name)`` gives its encoded bytes.
        label: Empty where it has none; of a source that holds several labels an image, all of them.
        split: What the source calls its split; None where it has no splits.
        reason: Why it is left out; None where it is not.
    """

    name: str
    listing: Listing
    label: str | tuple[str, ...]
    split: str | None = None
    reason: str | None = None


class Rows(LabeledFiles):
    """A source by rows. Its option ``split=NAME`` takes one split as if it were everything."""

    def open(self, word: str, val_source: str | None, val_fraction: float) -> ImageData:
        if self.task != MULTILABEL:
            return super().open(word, val_source, val_fraction)
        splits, skipped = self._read_sets(word)
        if val_source is not None:
            other = find_source(val_source, task=MULTILABEL)
            if not isinstance(other, Rows):
                raise DataError("images to evaluate on come from a path", given=val_source, allowed=PATHS)
            val, more = other._read_sets(val_source)
            splits = {"train": splits.get("train") or splits.get("all", []), "val": to_evaluate_on(val, val_source)}
            skipped = [*skipped, *more]
        return divided(word, splits, skipped, val_fraction)

    def read_all(self, word: str, classes: Sequence[str]) -> tuple[Split, Skipped]:
        if self.task != MULTILABEL:
            return super().read_all(word, classes)
        splits, skipped = self._read_sets(word)
        return multi_hot([image for images in splits.values() for image in images], classes), skipped

    def _read_sets(self, word: str) -> tuple[SetsBySplit, Skipped]:
        """Return the images by split, each with all of its labels, and what was left out."""
        splits: SetsBySplit = {}
        skipped: list[tuple[str, str]] = []
        seen: dict[str, frozenset[str]] = {}
        taken: set[tuple[str, str]] = set()
        for row in self._chosen(word, labeled=True):
            split = "all" if row.split is None else split_named(row.split)
            labels = (row.label,) if isinstance(row.label, str) else row.label
            reason = (
                row.reason or ("without a label" if labels == ("",) else None) or (None if split else "in no split")
            )
            if split is None or reason is not None:
                skipped.append((plain(row.name), reason or ""))
            elif seen.get(row.name, frozenset(labels)) != frozenset(labels):
                do = "write all labels of a file into one row"
                raise DataError("a file stands in several rows", given=plain(row.name), do=do)
            elif (split, row.name) in taken:
                skipped.append((plain(row.name), REPEATED))
            else:
                taken.add((split, row.name))
                splits.setdefault(split, []).append((row.name, row.listing, labels))
            seen.setdefault(row.name, frozenset(labels))
        return splits, skipped

    @abstractmethod
    def rows(self, word: Word, labeled: bool) -> Iterator[Row]:
        """Yield the images, in the same order every time.

        Args:
            labeled: The labels are needed; without, they may be missing or of any form.
        """

    def read(self, word: str, depth: int | None) -> tuple[BySplit, Skipped]:
        if depth not in (None, 1):
            raise DataError("data.depth is for folders of class folders", given=f"data.depth={depth}, {word}")
        splits: BySplit = {}
        skipped: list[tuple[str, str]] = []
        labels: dict[str, str] = {}
        taken: set[tuple[str, str]] = set()
        for row in self._chosen(word, labeled=True):
            split = "all" if row.split is None else split_named(row.split)
            label = one_label(row)
            reason = row.reason or (None if label else "without a label") or (None if split else "in no split")
            if split is None or reason is not None:
                skipped.append((plain(row.name), reason or ""))
            elif labels.setdefault(row.name, label) != label:
                given = f"{plain(row.name)}: {plain(labels[row.name])}, {plain(label)}"
                several = "set task=multilabel (data check and init: --multilabel)"
                do = f"write each file once, with one label; to learn several labels an image, {several}"
                raise DataError("a file has two labels", given=given, do=do)
            elif (split, row.name) in taken:  # it would count twice
                skipped.append((plain(row.name), REPEATED))
            else:
                taken.add((split, row.name))
                splits.setdefault(split, {}).setdefault(label, []).append((row.name, row.listing))
        return {split: merged(by_class) for split, by_class in splits.items()}, skipped

    def images(self, word: str) -> tuple[list[tuple[str, Listing]], Skipped]:
        chosen = {row.name: row for row in self._chosen(word, labeled=False)}.values()  # a table may repeat a file
        skipped = [(row.name, row.reason) for row in chosen if row.reason is not None]
        return [(row.name, row.listing) for row in chosen if row.reason is None], skipped

    def _chosen(self, word: str, labeled: bool) -> Iterator[Row]:
        """Yield the rows of the split that the word names, as rows without splits; all rows without one."""
        found = parsed(word)
        chosen = found.options.get("split")
        names: set[str] = set()
        for row in self.rows(found, labeled):
            names.add(row.split or "none")
            if chosen is None or row.split == chosen:
                yield row if chosen is None else row._replace(split=None)
        if chosen is not None and chosen not in names:
            raise DataError("no such split", given=word, allowed=sorted(names))


def labels_of(cell: str, separator: str | None) -> tuple[str, ...]:
    """Return the labels that a cell holds; all of it is one label where no separator is stated."""
    parts = [cell] if separator is None else cell.split(separator)
    return tuple(part.strip() for part in parts if part.strip())


def one_label(row: Row) -> str:
    """Return the label of an image; empty where it has none.

    Raises:
        DataError: It has several.
    """
    labels = (row.label,) if isinstance(row.label, str) else row.label
    if len(labels) > 1:
        given = plain(f"{row.name}: {', '.join(labels)}")[:200]
        do = (
            "learn all of them (task: multilabel in the recipe, --set task=multilabel; remap data check and init:"
            " --multilabel), or give each image one label"
        )
        raise DataError("an image has several labels; one is learned", given=given, do=do)
    return labels[0] if labels else ""


def require_package(package: str, extra: str, what: str) -> None:
    """Raise a DataError where a package is not installed that reads ``what``."""
    if find_spec(package) is None:
        raise DataError(f"{what} needs {package}, which is not installed", do=install_command(extra))
