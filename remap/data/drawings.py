"""The embedded drawings of 16 classes, which clip:mini has not seen; their licences are in ``drawings/README.md``."""

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from remap.data.file_listing import Listing
from remap.data.images import encoded
from remap.data.rows import Row, Rows
from remap.data.words import Word
from remap.errors import DataError
from remap.io.checked_json import read_json

FOLDER = Path(__file__).parent / "drawings"
# One picture holds them all: how many lie beside each other, and the side of one in pixels.
ACROSS, SIDE = 32, 32
SPLITS = ("train", "test", "fluent")


class Drawings(Rows):
    """Emoji of 16 classes: ``drawings`` has train and test; ``drawings:train``, ``:test`` and ``:fluent`` one of them.

    The test names are others than the training names; ``fluent`` has the test names as another vendor draws them.
    """

    def rows(self, word: Word, labeled: bool) -> Iterator[Row]:
        if word.rest and word.rest not in SPLITS:
            raise DataError("the embedded drawings have no such part", given=word.rest, allowed=SPLITS)
        listing = _listing()
        for path, label in zip(listing.paths, _labels(), strict=True):
            split = path.split("/")[0]
            if split == word.rest or (not word.rest and split != "fluent"):
                yield Row(path, listing, label, None if word.rest else split)


@cache
def _table() -> list[tuple[str, str, str]]:
    return [(name, split, kind) for name, split, kind in read_json(FOLDER / "drawings.json", 2**20)]


def _labels() -> list[str]:
    return [kind for _, _, kind in _table()]


@cache
def _listing() -> Listing:
    paths = tuple(f"{split}/{kind}/{name}.png" for name, split, kind in _table())
    index = {path: i for i, path in enumerate(paths)}

    def read(path: str) -> bytes:
        top, left = (SIDE * part for part in divmod(index[path], ACROSS))
        return encoded(_sheet().crop((left, top, left + SIDE, top + SIDE)))

    return Listing(paths, (), read, lambda path: len(read(path)))


@cache
def _sheet() -> Image.Image:
    image = Image.open(io.BytesIO((FOLDER / "drawings.webp").read_bytes()))
    image.load()
    return image
