"""Check labelled images before a run: what is broken, copied, uneven or odd, and what to do about it."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from remap.data import CLASSES
from remap.data.image_files import left_out
from remap.data.images import BadImage, decode, reason_of, stored_channels, wide_values
from remap.data.pixels import RGB
from remap.data.sources import open_data
from remap.data.splits import ImageData, Split
from remap.data.thread_pool import map_ahead, threads
from remap.data.value_range import find_value_range
from remap.inspection.near_duplicates import FLAT, SIDE, dhash, near_pairs, small_greys
from remap.io.human_size import number_of
from remap.progress import Progress, Silent

# Files that a finding names; the count has all.
SHOWN = 20
Range = tuple[float, float] | None
FEW_IMAGES, UNEVEN, SMALL_SIDE, LONG_SHAPE = 10, 10.0, 32, 4.0


@dataclass(frozen=True)
class Finding:
    """One thing that is odd.

    Attributes:
        kind: One word: broken, left_out, copies, near_copies, imbalance, few, small, shape, range, channels, flat.
        severity: "bad" raises or spoils the accuracy; "note" may be meant so.
        files: Some of them; a pair is "ONE = OTHER".
    """

    kind: str
    severity: str
    what: str
    do: str
    count: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What was read of one image.

    Attributes:
        name: SPLIT/NAME.
        label: Its class, or 0 and 1 for each class.
        reason: Why it cannot be read; empty where it can.
    """

    name: str
    split: str
    label: int | list[int]
    index: int
    reason: str = ""
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    dhash: int = 0
    greys: bytes = b""
    flat: bool = False
    wide: str = ""
    channels: int = 3


@dataclass(frozen=True)
class Report:
    """What the images are, and what is odd about them, the worst first.

    Attributes:
        counts: Images of each class by split.
        sizes: Smallest, median and largest width and height in pixels.
        value_range: The values of images with more than 8 bits that a run takes for black and white; None without such.
    """

    source: str
    split_rule: str
    counts: dict[str, dict[str, int]]
    sizes: dict[str, tuple[int, int]]
    findings: tuple[Finding, ...]
    value_range: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_data(
    source: str, depth: int | None = None, progress: Progress = Silent(), *, task: str = CLASSES
) -> tuple[Report, ImageData]:
    """Read every image of a source and report.

    Args:
        source: As ``--data`` takes it.
        task: What a label is; with MULTILABEL an image counts for each of its classes.

    Raises:
        DataError: The source cannot be opened, as a run would say.
    """
    data = open_data(source, None, 0.2, depth=depth, task=task)
    splits = {"train": data.train, "val": data.val, "test": data.test}
    seen: list[Seen] = []
    value_range = find_value_range(data.train, RGB)
    for name, split in splits.items():
        if split is None:
            continue
        with threads(8) as pool, progress.wait(f"reading {name} images", len(split)) as step:
            for _, one in map_ahead(pool, partial(_look, name, split, value_range), range(len(split)), 64):
                seen.append(one)
                step.advance()
    counts = {name: dict(zip(data.classes, data.count(split), strict=True)) for name, split in splits.items() if split}
    order = {"bad": 0, "note": 1}
    findings = sorted(_findings(data, seen, counts, value_range), key=lambda finding: order[finding.severity])
    sides = np.array([one.size for one in seen if not one.reason] or [(0, 0)])
    sizes = {
        word: (int(value[0]), int(value[1]))
        for word, value in (("smallest", sides.min(0)), ("median", np.median(sides, 0)), ("largest", sides.max(0)))
    }
    return Report(source, data.split_rule, counts, sizes, tuple(findings), value_range), data


def decoded(content: bytes, value_range: Range) -> tuple[Image.Image, int]:
    """Return a picture as a run sees it, and its channels: 3, or as many as a file of other kinds holds.

    Of other than 3 channels the picture is the first.

    Raises:
        BadImage: It cannot be read.
    """
    pixels = replace(RGB, value_range=value_range)
    try:
        return decode(content, pixels), 3
    except BadImage:
        if (channels := stored_channels(content)) in (None, 1, 3):
            raise
        return decode(content, replace(pixels, channels=channels)), channels


def _look(name: str, split: Split, value_range: Range, index: int) -> Seen:
    found = partial(
        Seen, f"{name}/{split.names[index].removeprefix(f'{name}/')}", name, split.labels[index].tolist(), index
    )
    try:
        content = split.read(index)
        image, channels = decoded(content, value_range)
    except (BadImage, OSError) as error:
        return found(reason=error.reason if isinstance(error, BadImage) else reason_of(error))
    spread = int(np.ptp(np.asarray(image.convert("L"))))
    wide = wide_values(content, RGB)
    values = "" if wide is None else str(wide.values_HWC.dtype)
    digest = blake2b(content, digest_size=16).digest()
    return found("", image.size, digest, dhash(image), small_greys(image), spread < FLAT, values, channels)


def _findings(
    data: ImageData, seen: list[Seen], counts: dict[str, dict[str, int]], value_range: Range
) -> Iterator[Finding]:
    good = [one for one in seen if not one.reason]
    broken = [f"{one.name} ({one.reason})" for one in seen if one.reason]
    do = "repair or remove them; training leaves out up to data.max_bad of them, evaluation with --skip-bad"
    yield from _some("broken", "bad", "cannot be read", do, broken)
    if data.skipped:
        names = [f"{name} ({reason})" for name, reason in data.skipped]
        do = "convert what is meant to be an image; remove the rest"
        yield Finding("left_out", "note", left_out(data.skipped), do, len(names), tuple(names[:SHOWN]))
    yield from _copies(good)
    flat = [one.name for one in good if one.flat]
    yield from _some("flat", "note", "of one colour", "look whether they are placeholders; remove them", flat)
    small = [f"{one.name} ({one.size[0]} x {one.size[1]})" for one in good if min(one.size) < SMALL_SIDE]
    do = "look whether they are thumbnails; for data of such images take a small model (mini_student)"
    yield from _some("small", "note", f"with a side below {SMALL_SIDE} pixels", do, small)
    long = [f"{one.name} ({one.size[0]} x {one.size[1]})" for one in good if max(one.size) > LONG_SHAPE * min(one.size)]
    do = "crop them: a run sees the square in the centre only"
    yield from _some("shape", "note", f"more than {LONG_SHAPE:g} times as long as wide", do, long)
    wide = [f"{one.name} ({one.wide})" for one in good if one.wide]
    what = "of more than 8 bits, whose range is taken from the type"
    if value_range is not None:
        low, high = value_range
        what = f"of more than 8 bits: a run takes {low:g} for black and {high:g} for white, by its training images"
    do = "where others are black and white, say so: --set data.value_range=[LOW,HIGH]"
    yield from _some("range", "note", what, do, wide)
    many = [f"{one.name} ({one.channels})" for one in good if one.channels != 3]
    what, do = "of other channels than grey or colours", "take a model of as many channels; no other reads them"
    yield from _some("channels", "note", what, do, many)
    yield from _uneven(counts["train"])


def _some(kind: str, severity: str, what: str, do: str, names: list[str]) -> Iterator[Finding]:
    if names:
        yield Finding(kind, severity, f"{number_of(len(names), 'file')} {what}", do, len(names), tuple(names[:SHOWN]))


def _copies(good: list[Seen]) -> Iterator[Finding]:
    """Yield copies: across splits and of other labels first, exact before near ones."""
    by_digest: defaultdict[bytes, list[Seen]] = defaultdict(list)
    for one in good:
        by_digest[one.digest].append(one)
    exact = [(group[0], other) for group in by_digest.values() for other in group[1:]]
    firsts = [group[0] for group in by_digest.values() if not group[0].flat]
    hashes = np.array([one.dhash for one in firsts], np.uint64)
    greys = np.frombuffer(b"".join(one.greys for one in firsts), np.uint8).reshape(-1, SIDE * SIDE)
    near = [(firsts[i], firsts[j]) for i, j in near_pairs(hashes, greys)]
    for word, pairs in (("copies", exact), ("near_copies", near)):
        kinds = sorted(((_relation(*pair), pair) for pair in pairs), key=lambda one: one[0])
        for relation, group in groupby(kinds, key=lambda one: one[0]):
            names = [f"{one.name} = {other.name}" for _, (one, other) in group]
            what, do = _RELATIONS[relation]
            same = "of exact copies" if word == "copies" else "of near copies (difference hash, greys)"
            what = f"{number_of(len(names), 'pair')} {same} {what}"
            yield Finding(word, "bad" if relation < 2 else "note", what, do, len(names), tuple(names[:SHOWN]))


_RELATIONS = (
    ("in different splits", "remove one of each: what is learned from must not be evaluated on"),
    ("under different labels", "decide which label is right, and remove the other file"),
    ("in one class of one split", "keep one of each, unless it is meant to count twice"),
)


def _relation(one: Seen, other: Seen) -> int:
    return 0 if one.split != other.split else 1 if one.label != other.label else 2


def _uneven(train: dict[str, int]) -> Iterator[Finding]:
    few = [f"{name} ({count})" for name, count in train.items() if count < FEW_IMAGES]
    if few:
        what = f"{number_of(len(few), 'class')} with fewer than {FEW_IMAGES} training images"
        yield Finding("few", "note", what, "collect more, or merge them into others", len(few), tuple(few[:SHOWN]))
    (largest, most), (smallest, least) = (Counter(train).most_common()[index] for index in (0, -1))
    if most > UNEVEN * least:
        what = f"{largest} has {most / max(least, 1):.0f} times as many training images as {smallest} ({most}, {least})"
        do = "look at the figure of each class (remap eval), not only at that of all; collect more images"
        yield Finding("imbalance", "note", what, do, 1, (largest, smallest))


def sample_indices(split: Split, classes: int, each: int) -> dict[int, list[int]]:
    """Return the first ``each`` images of every class that has any."""
    found: dict[int, list[int]] = {}
    for label in range(classes):
        has_N = split.labels[:, label] == 1 if split.labels.ndim == 2 else split.labels == label
        if len(indices_K := np.flatnonzero(has_N)[:each]):
            found[label] = indices_K.tolist()
    return found
