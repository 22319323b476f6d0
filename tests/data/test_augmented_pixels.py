"""Augmentation: the pixels against a second formula, and the draws that caches of teacher outputs are keyed by."""

import hashlib
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from remap.cache.output_store import row_digests
from remap.data import augmented_pixels, keyed_random
from remap.data.augmentation import PRESETS, Augmentation, Crop, Erasing, Jitter, RandAugment
from remap.data.augmented_pixels import POLICIES, apply_policy, augmented
from remap.errors import DataError

BILINEAR = InterpolationMode.BILINEAR
# Recorded by version 0.1: the digests of two images (bytes 0 and 7) in views 0 and 2 of seed 3.
FIXED = ("8350c981b23444dbdc3d0c7a75ba2402", "608c4cff5d23bfc715c7a4dd63313626")
RECORDED = {
    ("none", 0): FIXED,
    ("none", 2): FIXED,
    ("shift", 0): ("09faaa1b518ff2a533db7972b58a4c42", "efbab4d06b0d2333db94e0a22d8d81c7"),
    ("shift", 2): ("b5f6e6f68d6fe56175ac565a02b30e38", "84ecafc96aebdc12a635144bedb83971"),
    ("shift_flip", 0): ("09faaa1b518ff2a533db7972b58a4c42", "efbab4d06b0d2333db94e0a22d8d81c7"),
    ("shift_flip", 2): ("b5f6e6f68d6fe56175ac565a02b30e38", "84ecafc96aebdc12a635144bedb83971"),
}


@pytest.mark.parametrize(("kind", "view"), RECORDED)
def test_teacher_outputs_that_were_cached_earlier_stay_valid(kind: str, view: int) -> None:
    """A cached output is found by the digest of its image and of the draws behind its view."""
    indices = np.asarray([0, 7])
    files = [hashlib.blake2b(bytes([index]), digest_size=16).digest() for index in indices]
    digests = row_digests(files, augmented_pixels.draws(PRESETS[kind], 3, view, indices))
    assert tuple(row.tobytes().hex() for row in digests) == RECORDED[kind, view]


def by_hand(image_CHW: np.ndarray, kind: str, draws: np.ndarray) -> np.ndarray:
    """One picture, pixel by pixel: mirror if the third draw is below one half, then move within a black frame."""
    _, height, width = image_CHW.shape
    pad = height // 8
    down, right = (int(draw * (2 * pad + 1)) - pad for draw in draws[:2])
    result = np.zeros_like(image_CHW)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y + down, x + right
            if 0 <= from_y < height and 0 <= from_x < width:
                mirrored = kind == "shift_flip" and draws[2] < 0.5
                result[:, y, x] = image_CHW[:, from_y, width - 1 - from_x if mirrored else from_x]
    return result


@pytest.mark.parametrize("kind", ["none", "shift", "shift_flip"])
@pytest.mark.parametrize("size", [7, 8, 17])
def test_augmentation_pixel_by_pixel(kind: str, size: int) -> None:
    images = torch.randint(0, 256, (12, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = keyed_random.uniform(1, 0, np.arange(12), 3)
    draws[0], draws[1] = (0.0, 0.0, 0.0), (1 - 2**-53, 1 - 2**-53, 0.5)
    found = augmented(images, PRESETS[kind], draws)
    expected = [
        image if kind == "none" else by_hand(image, kind, d) for image, d in zip(images.numpy(), draws, strict=True)
    ]
    assert found.dtype == torch.uint8 and (found.numpy() == np.stack(expected)).all()


def test_shifts_reach_both_ends_and_half_the_pictures_are_mirrored() -> None:
    """An eighth of 16 is 2, so five places each way: of 4000 draws 800 each (deviation 25), 2000 mirrored (32)."""
    draws = keyed_random.uniform(0, 0, np.arange(4000), 3)
    for column in draws.T[:2]:
        assert np.abs(np.bincount((column * 5).astype(int)) - 800).max() < 5 * 25.3
    assert abs((draws[:, 2] < 0.5).sum() - 2000) < 5 * 31.7
    assert augmented(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), PRESETS["shift"], draws[:0]).shape == (0, 3, 16, 16)


def pictures(count: int, size: int, channels: int = 3) -> torch.Tensor:
    """Smooth colours, so that a pixel moved by one shows."""
    waves = torch.rand(count, channels, 3, 3, generator=torch.Generator().manual_seed(1))
    return (255 * F.resize(waves, [size, size], interpolation=BILINEAR)).to(torch.uint8)


def as_image(image_CHW: torch.Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def affine(image: Image.Image, x: float = 0, y: float = 0, right: int = 0, down: int = 0) -> Image.Image:
    shear = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(image, 0.0, [right, down], 1.0, shear, BILINEAR, fill=[128] * 3, center=[0, 0])


@pytest.mark.parametrize(
    ("sign", "level", "wide"), [(1, 0.3, False), (-1, 0.3, False), (1, 1.0, False), (-1, 0.8, True)]
)
def test_operations_of_randaugment_are_torchvisions(sign: int, level: float, wide: bool) -> None:
    """Ranges of torchvision's RandAugment, and TrivialAugmentWide for 224 pixels; its operations on one picture."""
    image, most = as_image(pictures(1, 40)[0]), sign * level * (0.99 if wide else 0.9)
    moved = round(sign * level * 40 * (32 / 224 if wide else 150 / 331))
    sheared, turned = sign * level * (0.99 if wide else 0.3), sign * level * (135.0 if wide else 30.0)
    expected = {
        "identity": image,
        "shear_x": affine(image, x=sheared),
        "shear_y": affine(image, y=sheared),
        "translate_x": affine(image, right=-moved),
        "translate_y": affine(image, down=-moved),
        "rotate": F.rotate(image, turned, BILINEAR, fill=[128] * 3),
        "brightness": F.adjust_brightness(image, 1 + most),
        "color": F.adjust_saturation(image, 1 + most),
        "contrast": F.adjust_contrast(image, 1 + most),
        "sharpness": F.adjust_sharpness(image, 1 + most),
        "posterize": F.posterize(image, 8 - round(level * (6 if wide else 4))),
        "solarize": F.solarize(image, round(256 * (1 - level))),
        "auto_contrast": F.autocontrast(image),
        "equalize": F.equalize(image),
    }
    assert set(expected) == set(POLICIES)
    for name, one in expected.items():
        found = np.asarray(apply_policy(image, name, sign, level, wide)).astype(int)
        # A shear's tangent of an arc tangent may round another way, by one of 255.
        assert np.abs(found - np.asarray(one)).max() <= (1 if name.startswith("shear") else 0), name


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_crop_is_torchvisions(channels: int) -> None:
    """A quarter of the area, square: 8 of 16 pixels, 4 down and 2 right; each channel alone if there are not three."""
    images, crop = pictures(1, 16, channels), Augmentation(crop=Crop(scale=[0.25, 0.25], ratio=[1.0, 1.0]))
    found = augmented(images, crop, np.array([[0, 0, 0, 0.9, 0.9, 0.5, 0.25]]))[0]
    for one, channel in zip(found, images[0], strict=True):
        twice = np.asarray(F.resize(Image.fromarray(channel.numpy()), [32, 32], BILINEAR))
        assert (one.numpy() == twice[8:24, 4:20]).all()


def test_crops_have_the_areas_and_shapes_of_their_ranges() -> None:
    """Area uniform in [0.2, 0.4], log of the shape in [1/2, 2]: means 0.3 and 0, by five deviations."""
    boxes = np.array(
        [augmented_pixels._box([0.2, 0.4], [0.5, 2.0], d) for d in keyed_random.uniform(0, 0, np.arange(2000), 4)]
    )
    top, left, height, width = boxes.T
    assert (boxes >= 0).all() and (top + height <= 1).all() and (left + width <= 1).all()
    assert abs((height * width).mean() - 0.3) < 5 * 0.2 / (12 * 2000) ** 0.5
    assert abs(np.log(width / height).mean()) < 5 * np.log(4) / (12 * 2000) ** 0.5


def test_what_is_erased_has_the_mean_colour() -> None:
    """A quarter of the area, square, in the upper right corner; above the chance nothing happens."""
    images = pictures(2, 12)
    erasing = Augmentation(erasing=Erasing(chance=0.5, scale=[0.25, 0.25], ratio=[1.0, 1.0]))
    draws = np.tile([*[0.0] * 11, 0.4, 0.9, 0.9, 0.0, 1.0], (2, 1))
    draws[1, 11] = 0.5
    expected = images.clone()
    expected[0, :, :6, 6:] = (images[0].sum((1, 2)) // 144).to(torch.uint8)[:, None, None]
    assert torch.equal(augmented(images, erasing, draws), expected)


def test_colours_are_torchvisions() -> None:
    """Factors 1 + 0.4 * (2 * draw - 1), then a turn of the hue by 0.1 * (2 * draw - 1)."""
    jitter = Augmentation(jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1))
    image = pictures(1, 12)
    draws = np.array([[*[0.0] * 7, 0.75, 0.25, 1.0, 0.75]])
    expected = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(as_image(image[0]), 1.2), 0.8), 1.4)
    found = augmented(image, jitter, draws)[0]
    assert (found.permute(1, 2, 0).numpy() == np.asarray(F.adjust_hue(expected, 0.05))).all()


def test_presets_see_the_same_corner_and_threads_change_nothing() -> None:
    """An operation has its own columns of draws: others beside it do not move it."""
    indices, strong = np.arange(8), PRESETS["strong"]
    draws = augmented_pixels.draws(strong, 3, 1, indices)
    assert (draws[:, :7] == augmented_pixels.draws(PRESETS["light"], 3, 1, indices)).all()
    images = pictures(8, 96)
    one, three = augmented(images, strong, draws), augmented(images, strong, draws, workers=3)
    assert torch.equal(one, three) and not torch.equal(one, images)
    assert torch.equal(one[5:6], augmented(images[5:6], strong, draws[5:6])), "in any company"


def test_trivial_augment_draws_one_operation_of_any_strength() -> None:
    """Fourteen operations, as often each: 2800 draws, 200 each (deviation 13.6)."""
    trivial = Augmentation(trivial_augment=True)
    assert trivial.draws == 19 and Augmentation(rand_augment=RandAugment(ops=3)).draws == 25
    column = augmented_pixels.draws(trivial, 0, 0, np.arange(2800))[:, 16]
    assert len(POLICIES) == 14 and np.abs(np.bincount((column * 14).astype(int)) - 200).max() < 5 * 13.6


def test_colours_need_three_channels() -> None:
    with pytest.raises(DataError, match=r"colours \(data.rand_augment\) is for images of red, green and blue"):
        augmented(pictures(1, 8, 1), PRESETS["strong"], augmented_pixels.draws(PRESETS["strong"], 0, 0, np.arange(1)))
