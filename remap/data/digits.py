"""The digits that come with scikit-learn."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from remap.data.images import encoded
from remap.data.sources import Source
from remap.data.splits import ImageData, Split
from remap.data.stratify import stratified
from remap.errors import DataError


class Digits(Source):
    """The 1,797 scanned digits of scikit-learn (UCI optdigits test set), 8x8 greys; 1,000 train, 797 to evaluate on."""

    def open(self, word: str, val_source: str | None, val_fraction: float) -> ImageData:
        name, colon, _ = word.partition(":")
        if val_source is not None:
            raise DataError("the embedded digits bring their own test split", given=f"data.val_source={val_source}")
        if colon:
            raise DataError("there is nothing to choose among the embedded digits", given=word, allowed=name)
        rows = _table()
        images = np.rint(rows[:, :-1].reshape(-1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
        labels = rows[:, -1].astype(np.int64)

        names = tuple(f"{name}/{i:04d}" for i in range(len(labels)))
        everything = Split(names, labels, lambda index: encoded(Image.fromarray(images[index])))
        train, val = stratified(labels, 1000)
        rule = "fixed stratified split of the 1,797 digits"
        return ImageData(name, tuple("0123456789"), everything.take(train), everything.take(val), split_rule=rule)


def _table() -> NDArray[np.float64]:
    """Return 64 greys from 0 to 16 and the digit of each image (1797, 65); scikit-learn takes 1.5 s to be imported."""
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None, "scikit-learn is not installed"
    return np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
