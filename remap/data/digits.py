"""The digits that come with scikit-learn."""

import io

import numpy as np
from PIL import Image

from remap.data.sources import Source
from remap.data.splits import ImageData, Split, stratified
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

        def read(index: int) -> bytes:
            buffer = io.BytesIO()
            Image.fromarray(images[index]).save(buffer, format="PPM")  # the same bytes from every version of Pillow
            return buffer.getvalue()

        everything = Split(tuple(f"{name}/{i:04d}" for i in range(len(labels))), labels, read)
        train, val = stratified(labels, 1000)
        rule = "fixed stratified split of the 1,797 digits"
        return ImageData(name, tuple("0123456789"), everything.take(train), everything.take(val), split_rule=rule)
