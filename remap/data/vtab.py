"""VTAB-1k (Zhai et al. 2019, arXiv 1910.04867): lists of images and integer classes, beside a folder of images."""

import os
from collections.abc import Iterator
from pathlib import Path

from remap.data.label_table import LabelTable
from remap.data.rows import Row
from remap.data.words import Word

# The lists of the final protocol. train800.txt and val200.txt, to choose settings with, can be named one by one.
LISTS = {"train": "train800val200.txt", "test": "test.txt"}


class Vtab(LabelTable):
    """A folder with the lists of one task. Their paths are relative to it."""

    several_labels = False

    def recognises(self, path: Path) -> bool:
        return all(os.path.isfile(path / name) for name in LISTS.values())

    def rows(self, word: Word, labeled: bool) -> Iterator[Row]:
        for split, name in LISTS.items():
            for row in super().rows(Word("", str(Path(word.rest, name)), {}), labeled):
                yield row._replace(split=split)
