"""The embedded drawings: what the tool that packed them says of their parts, and what pixels the file holds."""

from collections import Counter
from hashlib import sha256

import numpy as np
import pytest

from remap.data.drawings import FOLDER
from remap.data.images import decode
from remap.data.sources import open_data, open_unlabeled, read_all
from remap.errors import DataError, RecipeError
from remap.recipe import resolve

CLASSES = (
    *("animal", "building", "button", "clock", "clothing", "face", "food", "fruit"),
    *("hand", "heart", "paper", "person", "plant", "sky", "sport", "vehicle"),
)


def _stems(names):
    return {name.rsplit("/", 1)[1] for name in names}


def test_training_and_test_names_are_others_and_their_counts_are_those_of_the_readme() -> None:
    data = open_data("drawings", None, 0.2)
    assert data.classes == CLASSES and data.test is None
    assert (len(data.train), len(data.val)) == (372, 216)
    assert not _stems(data.train.names) & _stems(data.val.names)
    assert min(Counter(data.train.labels.tolist()).values()) >= 16, "16 labels of each class"
    assert _stems(read_all("drawings:fluent", CLASSES)[0].names) == _stems(data.val.names)


def test_every_drawing_is_another_square_of_32_pixels() -> None:
    data = open_data("drawings", None, 0.2)
    digests = set()
    for split in (data.train, data.val):
        for index in range(len(split)):
            image = decode(split.read(index))
            assert image.size == (32, 32) and image.mode == "RGB"
            digests.add(sha256(image.tobytes()).hexdigest())
    assert len(digests) == 372 + 216
    red = decode(data.train.read(data.train.names.index("train/heart/red-heart.png")))
    middle = np.asarray(red)[12:20, 12:20].reshape(-1, 3).mean(0)
    assert middle[0] > 150 > 100 > max(middle[1:]), "a red heart is red"


def test_the_training_part_is_images_without_labels_and_apart_from_the_test_part() -> None:
    images, skipped = open_unlabeled("drawings:train")
    assert len(images) == 372 and not skipped and (images.labels == -1).all()
    alone = open_data(None, None, 0.2, unlabeled="drawings:train")
    assert len(alone.unlabeled) == 372
    both = open_data("drawings", None, 0.2, unlabeled="drawings:train", per_class=1)
    assert (len(both.train), len(both.unlabeled), len(both.val)) == (16, 372, 216)
    with pytest.raises(DataError, match="holds images to evaluate on"):
        open_data("drawings", None, 0.2, unlabeled="drawings:test")


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(DataError, match="no such part") as caught:
        open_data("drawings:noto", None, 0.2)
    assert "train, test, fluent" in str(caught.value)


def test_the_files_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 500_000


def test_base_is_the_first_half_of_the_classes_and_new_the_others() -> None:
    halves = [open_data("drawings", None, 0.2, subset=subset) for subset in ("base", "new")]
    assert [half.classes for half in halves] == [CLASSES[:8], CLASSES[8:]]
    everything = open_data("drawings", None, 0.2)
    for part in ("train", "val"):
        names = [name for half in halves for name in getattr(half, part).names]
        assert sorted(names) == sorted(getattr(everything, part).names)
        for half in halves:
            split = getattr(half, part)
            # The folder in a drawing's name is its class.
            assert [name.split("/")[1] for name in split.names] == [half.classes[label] for label in split.labels]


def test_another_draw_takes_other_images_of_each_class() -> None:
    draws = [open_data("drawings", None, 0.2, per_class=2, per_class_seed=seed).train for seed in (0, 0, 1)]
    assert draws[0].names == draws[1].names != draws[2].names
    assert all((np.bincount(draw.labels) == 2).all() for draw in draws)


def test_a_draw_of_all_images_is_refused() -> None:
    with pytest.raises(RecipeError, match="data.per_class_seed: all images are taken"):
        resolve(None, {}, ["data.per_class_seed=2"], check_options=False)
