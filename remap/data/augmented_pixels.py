"""Augmentation of raw pixels: what is done to an image in each of its views.

Pillow makes the pixels, one image at a time, so that they depend on no other image and on no number of threads. The
draws of a view decide them, and are part of the key of a cached teacher output (``remap.cache``).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from remap.data import keyed_random
from remap.data.augmentation import (
    COLOURED,
    CROP,
    ERASE,
    FLIP,
    JITTER,
    POLICY,
    POLICY_DRAWS,
    SHIFT,
    Augmentation,
    Crop,
    Erasing,
    Jitter,
)
from remap.data.thread_pool import threads
from remap.data.views import ViewSource
from remap.errors import DataError
from remap.io.human_size import number_of

Raw = NDArray[np.uint8]
Draws = NDArray[np.float64]
# Below so many pixels of an image threads cost more than they save: Python holds them up.
SMALL = 96 * 96
# What an operation of RandAugment moves into the image.
GREY = (128, 128, 128)
# RandAugment's and TrivialAugment's largest value of what is moved and of what is turned up or down, as in torchvision;
# TrivialAugment's shift is 32 pixels of 224.
_MOVES = {
    "shear_x": (0.3, 0.99),
    "shear_y": (0.3, 0.99),
    "translate_x": (150 / 331, 1 / 7),
    "translate_y": (150 / 331, 1 / 7),
    "rotate": (30.0, 135.0),
}
_FACTORS: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
_POINTS: dict[str, Callable[[Image.Image, float, bool], Image.Image]] = {
    "posterize": lambda image, level, wide: ImageOps.posterize(image, 8 - round(level * (6 if wide else 4))),
    "solarize": lambda image, level, _: ImageOps.solarize(image, round(256 * (1 - level))),
    "auto_contrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "identity": lambda image, *_: image,
}
POLICIES = (*_MOVES, *_FACTORS, *_POINTS)


def draws(augmentation: Augmentation, seed: int, view: int, indices_B: NDArray[np.int64]) -> Draws:
    """Return the numbers in [0, 1) behind a view of some images, (B, ``augmentation.draws``)."""
    return keyed_random.uniform(seed, view, indices_B, augmentation.draws)


def augmented_view(
    source: ViewSource, augmentation: Augmentation, seed: int, view: int, indices: Sequence[int] | NDArray[np.int64]
) -> tuple[Tensor, NDArray[np.int64]]:
    """Return the images that training sees in view number ``view``, and the indices that could be read.

    Shapes as ``ViewSource.batch``.
    """
    images, readable = source.batch(indices)
    return seen(images, readable, source, augmentation, seed, view), readable


def seen(
    images_BCHW: Tensor,
    indices_B: NDArray[np.int64],
    source: ViewSource,
    augmentation: Augmentation,
    seed: int,
    view: int,
) -> Tensor:
    """Return images of a source, read already, as training sees them in view number ``view``."""
    if not augmentation.on:  # frozen features that stand in for a source have nothing but its batches
        return images_BCHW
    return augmented(images_BCHW, augmentation, draws(augmentation, seed, view, indices_B), source.workers)


def require_colours(augmentation: Augmentation, channels: int) -> None:
    """Refuse to change the colours of images that have none.

    Raises:
        DataError: An operation is for three channels.
    """
    coloured = [f"data.{name}" for name in augmentation.on if name in COLOURED]
    if coloured and channels != 3:
        raise DataError(
            f"what changes colours ({', '.join(coloured)}) is for images of red, green and blue",
            given=number_of(channels, "channel"),
            do="set data.augment=light, or leave it out",
        )


def augmented(images_BCHW: Tensor, augmentation: Augmentation, draws_BN: Draws, workers: int = 1) -> Tensor:
    """Return augmented images.

    Args:
        images_BCHW: uint8.
        draws_BN: ``draws``.
        workers: Threads, for images that are worth it; the pixels are the same for any number.

    Raises:
        DataError: As ``require_colours``.
    """
    on = frozenset(augmentation.on)
    if not on or not len(images_BCHW):
        return images_BCHW
    require_colours(augmentation, images_BCHW.shape[1])
    images, result = images_BCHW.numpy(), torch.empty_like(images_BCHW)
    made = result.numpy()

    def make(part: NDArray[np.int64]) -> None:
        for index in part:
            made[index] = _augmented(images[index], augmentation, on, draws_BN[index])

    parts = np.array_split(np.arange(len(images)), workers if images[0, 0].size >= SMALL else 1)
    if len(parts) == 1:
        make(parts[0])
    else:
        with threads(workers) as pool:
            list(pool.map(make, parts))
    return result


def _augmented(image_CHW: Raw, augmentation: Augmentation, on: frozenset[str], draws_N: Draws) -> Raw:
    if "shift" in on or "flip" in on:
        image_CHW = _moved(image_CHW, augmentation, draws_N)
    if "crop" in on or not on.isdisjoint(COLOURED):
        pictures = [Image.fromarray(channel) for channel in image_CHW]
        if len(pictures) == 3:  # else one by one: Pillow has pictures of one channel, or of three
            pictures = [Image.merge("RGB", pictures)]
        if "crop" in on:
            pictures = _cropped(pictures, augmentation.crop, draws_N[CROP:])
        for step in range(augmentation.steps):
            pictures[0] = _policy(pictures[0], augmentation, draws_N[POLICY + POLICY_DRAWS * step :])
        if "jitter" in on:
            pictures[0] = _jittered(pictures[0], augmentation.jitter, draws_N[JITTER:])
        image_CHW = np.dstack([np.asarray(one) for one in pictures]).transpose(2, 0, 1)
    if "erasing" in on and draws_N[ERASE] < augmentation.erasing.chance:
        image_CHW = _erased(image_CHW, augmentation.erasing, draws_N[ERASE + 1 :])
    return image_CHW


def _box(scale: list[float], ratio: list[float], draws_N: Draws) -> tuple[float, float, float, float]:
    """Return the top, left, height and width of a rectangle, as shares of the image's sides.

    Area uniform, log of the shape uniform; a side that would be longer than the image's is as long.
    """
    area = scale[0] + draws_N[0] * (scale[1] - scale[0])
    shape = ratio[0] * (ratio[1] / ratio[0]) ** draws_N[1]
    height, width = min(1.0, (area / shape) ** 0.5), min(1.0, (area * shape) ** 0.5)
    return draws_N[2] * (1 - height), draws_N[3] * (1 - width), height, width


def _cropped(pictures: list[Image.Image], crop: Crop, draws_N: Draws) -> list[Image.Image]:
    top, left, height, width = _box(crop.scale, crop.ratio, draws_N)
    size = columns, rows = pictures[0].size
    box = (left * columns, top * rows, (left + width) * columns, (top + height) * rows)
    return [one.resize(size, Image.Resampling.BILINEAR, box=box) for one in pictures]


def _moved(image_CHW: Raw, augmentation: Augmentation, draws_N: Draws) -> Raw:
    """Mirror, and shift by up to a share of each side; what comes in is black."""
    channels, height, width = image_CHW.shape
    pad = (np.array([height, width]) * augmentation.shift).astype(np.int64)
    row, column = (draws_N[SHIFT : SHIFT + 2] * (2 * pad + 1)).astype(np.int64)
    framed = np.zeros((channels, height + 2 * pad[0], width + 2 * pad[1]), dtype=np.uint8)
    mirrored = draws_N[FLIP] < augmentation.flip
    framed[:, pad[0] : pad[0] + height, pad[1] : pad[1] + width] = image_CHW[:, :, :: -1 if mirrored else 1]
    return framed[:, row : row + height, column : column + width]


def _policy(picture: Image.Image, augmentation: Augmentation, draws_N: Draws) -> Image.Image:
    """Do one operation of RandAugment or TrivialAugment; the latter draws its magnitude too."""
    wide = augmentation.trivial_augment
    name, sign = POLICIES[int(draws_N[0] * len(POLICIES))], -1 if draws_N[1] < 0.5 else 1
    return apply_policy(picture, name, sign, draws_N[2] if wide else augmentation.rand_augment.magnitude / 30, wide)


def apply_policy(picture: Image.Image, name: str, sign: int, level: float, wide: bool) -> Image.Image:
    """Do an operation of ``POLICIES`` at a level from 0 to 1 of its range; ``wide`` is TrivialAugment's."""
    if name in _POINTS:
        return _POINTS[name](picture, level, wide)
    if name in _FACTORS:
        return _FACTORS[name](picture).enhance(1 + sign * level * (0.99 if wide else 0.9))
    value = sign * level * _MOVES[name][wide]
    if name == "rotate":
        return picture.rotate(value, Image.Resampling.BILINEAR, fillcolor=GREY)
    matrix = {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, round(value * picture.width), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, round(value * picture.height)),
    }[name]
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _jittered(picture: Image.Image, jitter: Jitter, draws_N: Draws) -> Image.Image:
    factors = 2 * draws_N[:4] - 1
    ranges = (("brightness", jitter.brightness), ("contrast", jitter.contrast), ("color", jitter.saturation))
    for (name, most), factor in zip(ranges, factors, strict=False):
        if most:
            picture = _FACTORS[name](picture).enhance(1 + most * factor)
    if jitter.hue:
        from torchvision.transforms.functional import adjust_hue

        picture = adjust_hue(picture, jitter.hue * factors[3])
    return picture


def _erased(image_CHW: Raw, erasing: Erasing, draws_N: Draws) -> Raw:
    top, left, height, width = _box(erasing.scale, erasing.ratio, draws_N)
    size = np.array(image_CHW.shape[1:])
    first = np.rint(size * (top, left)).astype(int)
    last = np.rint(size * (top + height, left + width)).astype(int)
    mean = image_CHW.sum(axis=(1, 2), dtype=np.int64) // size.prod()
    image_CHW = image_CHW.copy()
    image_CHW[:, first[0] : last[0], first[1] : last[1]] = mean[:, None, None]
    return image_CHW
