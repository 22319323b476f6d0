"""The embedded images: scanned digits that scikit-learn brings along."""

import io

import numpy as np
from PIL import Image

from remap.data.splits import ImageData, Split, stratified


def open_digits() -> ImageData:
    """The 1,797 scanned digits of scikit-learn (UCI optdigits test set), 8x8 greys; 1,000 train, 797 to test on."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.rint(bundle.images * (255.0 / 16.0)).astype(np.uint8)
    labels = bundle.target.astype(np.int64)

    def read(index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(images[index]).save(buffer, format="PPM")  # the same bytes from every version of Pillow
        return buffer.getvalue()

    everything = Split(tuple(f"digits/{i:04d}" for i in range(len(labels))), labels, read)
    train, val = stratified(labels, 1000)
    rule = "fixed stratified split of the 1,797 digits"
    return ImageData("digits", tuple("0123456789"), everything.take(train), everything.take(val), split_rule=rule)
