"""Data sets of torchvision that are read without unpickling anything."""

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from posixpath import splitext
from typing import Any

from remap.data.file_listing import Listing, files_of
from remap.data.image_files import why_not_read
from remap.data.images import encoded
from remap.data.rows import Row, Rows
from remap.data.words import Word
from remap.errors import DataError
from remap.io.names import first_line, plain
from remap.io.paths import expanded
from remap.registry import did_you_mean

_DIGITS = ("MNIST", "FashionMNIST", "KMNIST", "USPS")
# The splits of each set, and what its class is called with for them. Their files are arrays without Python objects, or
# images beside lists; CIFAR's are pickles.
SETS: dict[str, dict[str, dict[str, Any]]] = {
    **{name: {"train": {"train": True}, "test": {"train": False}} for name in _DIGITS},
    **{
        name: {split: {"split": split} for split in splits}
        for splits, names in (
            (("train", "test"), ("Food101", "StanfordCars", "STL10", "SVHN")),
            (("train", "val", "test"), ("DTD", "FGVCAircraft", "Flowers102", "RenderedSST2")),
            (("train", "valid", "test"), ("Country211",)),
            (("train", "val"), ("Imagenette",)),
        )
        for name in names
    },
    **{name: {"": {}} for name in ("EuroSAT", "SUN397")},
}


class TorchvisionSet(Rows):
    """A data set by the name of its class, which lies in ``root=FOLDER``; it is not downloaded.

    Image files are decoded as those of a folder; arrays become images without loss.
    """

    def rows(self, word: Word, labeled: bool) -> Iterator[Row]:
        name, root = word.rest, word.options.get("root")
        if name not in SETS:
            pickles = ": its files are pickles, which could run code" if name.startswith("CIFAR") else ""
            text = f"the torchvision set '{name}' is not read{pickles or did_you_mean(name, SETS)}"
            raise DataError(text, allowed=SETS, do="name a folder of its images, or a copy of it on the hub (hf:NAME)")
        if root is None:
            do = f"name the folder that it is in: torchvision:{name},root=FOLDER"
            raise DataError("a torchvision set needs a folder", given=name, do=do)
        chosen = word.options.get("split")
        if chosen not in (None, *SETS[name]):
            raise DataError("no such split", given=chosen, allowed=SETS[name])
        for split, arguments in SETS[name].items():
            if chosen in (None, split):
                yield from _rows_of(_opened(name, str(expanded(root)), arguments), expanded(root), split)


def _opened(name: str, root: str, arguments: dict[str, Any]) -> Any:
    from torchvision import datasets

    kind = getattr(datasets, name)
    if "loader" in inspect.signature(kind).parameters:
        arguments = {**arguments, "loader": os.fspath}  # the path in place of a decoded image
    try:
        return kind(root, download=False, **arguments)
    except Exception as error:  # RuntimeError where it is not there; others where it is damaged
        reason = plain(first_line(error))[:200]
        do = f"check the folder, or download it in Python: torchvision.datasets.{name}({root!r}, download=True)"
        raise DataError(f"cannot open {name} of torchvision: {reason}", given=root, do=do) from error


def _rows_of(dataset: Any, root: Path, split: str) -> Iterator[Row]:
    classes = [one[0] if isinstance(one, tuple) else one for one in getattr(dataset, "classes", ())]
    files, arrays = files_of(root), _arrays(dataset)
    for index in range(len(dataset)):
        image, label = dataset[index]
        if isinstance(image, str):
            name, listing = os.path.relpath(image, root).replace(os.sep, "/"), files
        else:
            name, listing = f"{split or 'all'}/{index:07d}", arrays
        reason = why_not_read(name) if splitext(name)[1] else None
        text = classes[int(label)] if classes else str(int(label))
        yield Row(name, listing, text, split or None, reason)


def _arrays(dataset: Any) -> Listing:
    def read(name: str) -> bytes:
        return encoded(dataset[int(name.rpartition("/")[2])][0])

    # The images of an array have one size; what is equal shows when they are read.
    return Listing((), (), read, lambda _name: 0)
