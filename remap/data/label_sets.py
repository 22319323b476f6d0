"""Images with any number of labels each (``task: multilabel``): their classes, multi-hot labels and splits.

Letters: N images, C classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from remap.data.copies import copies_together, first_copies
from remap.data.file_listing import Listing
from remap.data.image_files import Skipped, also_left_out
from remap.data.labeled_files import merged
from remap.data.sources import unknown_classes
from remap.data.splits import ImageData, Split
from remap.errors import DataError
from remap.io.names import plain, same_name

# An image by its name, what reads it, and its labels; by split, as ``labeled_files.BySplit``.
Labeled = tuple[str, Listing, tuple[str, ...]]
BySplit = dict[str, list[Labeled]]


def multi_hot(files: Sequence[Labeled], classes: Sequence[str]) -> Split:
    """Return images with labels (N, C), int8: 1 for the classes that an image has.

    Raises:
        DataError: An image has a class that is not listed.
    """
    numbers = {same_name(name): number for number, name in enumerate(classes)}
    names = {same_name(label): label for _, _, labels in files for label in labels}
    if unknown := sorted(names[key] for key in names.keys() - numbers.keys()):
        raise unknown_classes(unknown, classes)
    labels_NC = np.zeros((len(files), len(classes)), np.int8)
    for index, (_, _, labels) in enumerate(files):
        labels_NC[index, [numbers[same_name(label)] for label in labels]] = 1
    return Split(tuple(plain(name) for name, _, _ in files), labels_NC, lambda i: files[i][1].read(files[i][0]))


def divided(word: str, splits: BySplit, skipped: Skipped, fraction: float) -> ImageData:
    """Return the images to learn from and to evaluate on: by the source's own splits, else with some held out.

    Test images of which none has a class are without labels, as those of contests, and are left out.

    Raises:
        DataError: There are too few images or classes, or no image to evaluate on has a class.
    """
    tests = splits.get("test", [])
    if not any(labels for _, _, labels in tests):
        splits = {name: images for name, images in splits.items() if name != "test"}
        skipped = [*skipped, *((plain(name), "without a label") for name, _, _ in tests)]
    if "val" in splits and not any(labels for _, _, labels in splits["val"]):
        do = "name images with labels (--val-data), or leave these out: some of the others are then held out"
        raise DataError("no image to evaluate on has a class", given=word, do=do)
    everything = splits.get("train") or splits.get("all") or []
    classes = tuple(sorted(merged({label: [] for _, _, labels in everything for label in labels})))
    if len(classes) < 2:
        given = f"{word} has {', '.join(classes) or 'none'}{also_left_out(skipped)}"
        raise DataError("at least two classes are needed", given=given)
    if "val" in splits or "test" in splits:
        val = multi_hot(splits.get("val") or splits["test"], classes)
        test = multi_hot(splits["test"], classes) if "val" in splits and splits.get("test") else None
        rule = "the source's own train and evaluation images"
        return ImageData(word, classes, multi_hot(everything, classes), val, test, tuple(skipped), rule)
    images = multi_hot(everything, classes)
    # As one class: what is equal byte for byte stays on one side, whatever its labels.
    alike = replace(images, labels=np.zeros(len(images), np.int64))
    first_N = first_copies(alike, lambda index: everything[index][1].size(everything[index][0]))
    distinct = len(np.unique(first_N))
    count = distinct - max(1, round(distinct * fraction))
    if count < 1:
        raise DataError("there are too few images to hold some out", given=f"{word}: {distinct}")
    train, val = copies_together(images, first_N, count)
    rule = f"{fraction:.0%} of the images held out for evaluation, of each class as far as its images allow"
    return ImageData(word, classes, train, val, skipped=tuple(skipped), split_rule=rule)
