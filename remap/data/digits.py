"""The digits that come with scikit-learn."""

import numpy as np
from PIL import Image

from remap.data.images import encoded
from remap.data.sources import Source
from remap.data.splits import ImageData, Split
from remap.data.stratify import stratified
from remap.errors import DataError


class Digits(Source):
    """The 1,797 scanned digits of scikit-learn (UCI optdigits test set), 8x8 greys; 1,000 train, 797 to evaluate on."""

    def open(self, word: str, val_source: str | None, val_fraction: float) -> ImageData:
        from sklearn.datasets import load_digits

        name, colon, _ = word.partition(":")
        if val_source is not None:
            raise DataError("the embedded digits bring their own test split", given=f"data.val_source={val_source}")
        if colon:
            raise DataError("there is nothing to choose among the embedded digits", given=word, allowed=name)
        bundle = load_digits()
        images = np.rint(bundle.images * (255.0 / 16.0)).astype(np.uint8)
        labels = bundle.target.astype(np.int64)

        names = tuple(f"{name}/{i:04d}" for i in range(len(labels)))
        everything = Split(names, labels, lambda index: encoded(Image.fromarray(images[index])))
        train, val = stratified(labels, 1000)
        rule = "fixed stratified split of the 1,797 digits"
        return ImageData(name, tuple("0123456789"), everything.take(train), everything.take(val), split_rule=rule)
