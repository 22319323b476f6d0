"""A memory of images of earlier sessions: names and hashes in a sealed JSON file; the images stay where they are."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from remap.data.sources import open_labeled, unknown_classes
from remap.data.splits import ImageData, Split, stratified
from remap.errors import DataError, MissingData
from remap.io import atomic_write
from remap.io.checked_json import MOST_JSON_BYTES
from remap.io.checked_read import read_regular
from remap.io.names import plain
from remap.io.sealed_json import parse_sealed, sealed_text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MemoryImage(_Strict):
    """One image: what its source calls it, its class, and the SHA-256 of its file."""

    name: str
    label: str
    sha256: str


class MemoryPart(_Strict):
    """Images of one session, and where its training images are."""

    source: str
    val_source: str | None
    val_fraction: float
    depth: int | None
    images: tuple[MemoryImage, ...]


class Memory(_Strict):
    """The content of a memory file."""

    parts: tuple[MemoryPart, ...] = ()

    @property
    def classes(self) -> frozenset[str]:
        """The classes it has images of."""
        return frozenset(image.label for part in self.parts for image in part.images)

    def classes_below(self, per_class: int) -> list[str]:
        """Return the classes that it has fewer images of, in order."""
        counts = Counter(image.label for part in self.parts for image in part.images)
        return sorted(name for name, count in counts.items() if count < per_class)

    def at_most(self, per_class: int) -> "Memory":
        """Return the first images of each class."""
        seen: dict[str, int] = {}

        def is_kept(image: MemoryImage) -> bool:
            seen[image.label] = seen.get(image.label, 0) + 1
            return seen[image.label] <= per_class

        kept = (part.model_copy(update={"images": tuple(filter(is_kept, part.images))}) for part in self.parts)
        return Memory(parts=tuple(kept))

    def write(self, path: Path) -> None:
        """Write the file."""
        atomic_write.write_text(path, sealed_text(self.model_dump(mode="json")))


def read_memory(path: Path) -> Memory:
    """Read a memory file.

    Raises:
        DataError: It is missing, damaged, or was changed.
    """
    try:
        values, sealed = parse_sealed(read_regular(path, MOST_JSON_BYTES))
        if not sealed:
            raise ValueError("it is not sealed")
        return Memory.model_validate(values)
    except (OSError, ValueError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else plain(str(error)).splitlines()[0]
        raise DataError(f"{path} is not a memory of images: {reason}", do="extend the run again") from error


def open_memory(path: Path, classes: Sequence[str]) -> Split:
    """Return the images of a memory, with labels by class names.

    Raises:
        DataError: An image is gone or has changed, or is of another class.
    """
    together = Split.empty()
    for part in read_memory(path).parts:
        names = sorted({image.label for image in part.images})
        if unknown := sorted(set(names) - set(classes)):
            raise unknown_classes(unknown, classes)
        train = open_labeled(part.source, part.val_source, part.val_fraction, part.depth, names, least=1).train
        index = {name: number for number, name in enumerate(train.names)}
        gone = [image.name for image in part.images if image.name not in index]
        if gone:
            raise MissingData(f"{len(gone)} images of {path} are not in {part.source} any more", given=gone[0])
        chosen = train.take([index[image.name] for image in part.images])
        for number, image in enumerate(part.images):
            if digest_of(chosen, number) != image.sha256:
                raise DataError(f"an image of {path} has changed", given=image.name, do="bring the old one back")
        labels = np.array([classes.index(image.label) for image in part.images], dtype=np.int64)
        together = together.joined(Split(chosen.names, labels, chosen.read))
    return together


def with_memory(data: ImageData, path: Path, share: float | None) -> ImageData:
    """Return data with the images of a memory to learn from; where a share is held out for selection, of these too."""
    more = open_memory(path, data.classes)
    if share is None or data.selection is None:
        return replace(data, train=data.train.joined(more))
    fit, check = stratified(more.labels, round((1.0 - share) * len(more)))
    return replace(data, train=data.train.joined(more.take(fit)), selection=data.selection.joined(more.take(check)))


def digest_of(split: Split, number: int) -> str:
    """Return the SHA-256 of an image's file."""
    return hashlib.sha256(split.read(number)).hexdigest()
