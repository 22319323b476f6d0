"""Labelled images from the embedded digits, a folder of class folders, or a tar of one."""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from remap.data import keyed
from remap.data.images import SUFFIXES
from remap.data.listing import Listing, list_folder, list_tar
from remap.errors import DataError

# Folder names of the usual splits, as timm knows them.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Split:
    """Images with labels. ``read(i)`` gives encoded bytes of image i; ``names[i]`` is what messages call it."""

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "Split":
        """The split of some of its images."""
        chosen = np.asarray(indices, dtype=np.int64)
        read = self.read
        return Split(tuple(self.names[i] for i in chosen), self.labels[chosen], lambda i: read(int(chosen[i])))


@dataclass(frozen=True)
class ImageData:
    """What a run learns from and is measured on.

    Attributes:
        classes: Names in label order (sorted).
        skipped: Files left out before training, with the reason.
        split_rule: How train and val came about, in words.
    """

    source: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None = None
    skipped: tuple[tuple[str, str], ...] = field(default=())
    split_rule: str = ""

    def fingerprint(self) -> str:
        """Hash of class names, file names, labels and order."""
        digest = hashlib.sha256(_bytes_of(self.classes))
        for split in (self.train, self.val, self.test):
            if split is not None:
                digest.update(_bytes_of(split.names) + split.labels.tobytes())
        return digest.hexdigest()


def _bytes_of(names: Iterable[str]) -> bytes:
    """File names need not be UTF-8; Python keeps stray bytes as surrogates."""
    return "\0".join(names).encode(errors="surrogatepass")


def open_data(source: str, val_source: str | None, val_fraction: float) -> ImageData:
    """Open a data source.

    Raises:
        DataError: Nothing there, fewer than two classes, an empty class, or classes that differ between splits.
    """
    if source == "digits":
        if val_source is not None:
            raise DataError("the embedded digits bring their own test split", given=f"data.val_source={val_source}")
        return digits()
    parts, skipped = _open(source)
    if val_source is not None:
        other, more = _open(val_source)
        skipped += more
        val_tree = next((other[name] for name in ("val", "test", "all") if other.get(name)), None)
        if val_tree is None:
            raise DataError("no images to evaluate on", given=val_source)
        parts = {"train": parts.get("train") or parts.get("all", {}), "val": val_tree}
    if "all" in parts:
        return _divide(source, parts["all"], val_fraction, skipped)
    if "val" not in parts and "test" in parts:
        parts = {"train": parts["train"], "val": parts["test"]}
    if "val" not in parts:
        return _divide(source, parts["train"], val_fraction, skipped)
    return _with_splits(source, parts, skipped)


def read_all(source: str, classes: Sequence[str]) -> Split:
    """All images of a folder or tar, whatever its splits, labelled by a task's class names.

    Raises:
        DataError: It has classes the task does not know.
    """
    if source == "digits":
        opened = digits()
        whole = Split(
            opened.train.names + opened.val.names,
            np.concatenate([opened.train.labels, opened.val.labels]),
            lambda i: opened.train.read(i) if i < len(opened.train) else opened.val.read(i - len(opened.train)),
        )
        if tuple(classes) != opened.classes:
            raise DataError("classes the task does not know", given="digits", allowed=", ".join(classes[:20]))
        return whole
    parts, _ = _open(source)
    files: dict[str, list] = {}
    for tree in parts.values():
        for name, rows in tree.items():
            files.setdefault(name, []).extend(rows)
    strange = sorted(set(files) - set(classes))
    if strange:
        raise DataError(
            "classes the task does not know", given=", ".join(strange[:10]), allowed=", ".join(classes[:20])
        )
    return _split(files, classes)


def digits() -> ImageData:
    """The 1,797 scanned digits of scikit-learn (UCI optdigits test set), 8x8 greys; 1,000 train, 797 to test on."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.rint(bundle.images * (255.0 / 16.0)).astype(np.uint8)
    labels = bundle.target.astype(np.int64)

    def read(index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(images[index]).save(buffer, format="PNG")
        return buffer.getvalue()

    everything = Split(tuple(f"digits/{i:04d}" for i in range(len(labels))), labels, read)
    train, val = stratified(labels, 1000)
    rule = "fixed stratified split of the 1,797 digits"
    return ImageData("digits", tuple("0123456789"), everything.take(train), everything.take(val), split_rule=rule)


def stratified(labels: NDArray[np.int64], first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide into ``first`` images and the rest, each class in proportion (largest remainder), the same every time.

    Each class of two images or more is on both sides, as far as ``first`` allows.
    """
    counts = np.bincount(labels)
    exact = counts * (first / len(labels))
    low = np.minimum(counts, 1)
    high = np.maximum(counts - 1, low)
    if not low.sum() <= first <= high.sum():
        low, high = np.zeros_like(counts), counts
    share = np.clip(np.floor(exact).astype(int), low, high)
    while (step := int(np.sign(first - share.sum()))) != 0:
        room = share < high if step > 0 else share > low
        share[np.argmax(np.where(room, (exact - share) * step, -np.inf))] += step
    order = np.argsort(keyed.keys(0, 0, np.arange(len(labels)), keyed.SPLIT), kind="stable")
    chosen = np.concatenate([order[labels[order] == label][: share[label]] for label in range(len(counts))])
    return np.sort(chosen), np.setdiff1d(np.arange(len(labels)), chosen)


def _open(source: str) -> tuple[dict[str, dict[str, list]], list[tuple[str, str]]]:
    """Files by split and class: {"train": {"ants": [(name, reader), ...]}}; without split folders under "all"."""
    path = Path(source).expanduser()
    if path.is_dir():
        listing = list_folder(path)
    elif path.is_file():
        listing = list_tar(path)
    else:
        raise DataError(
            "no such data",
            given=source,
            allowed="'digits', a folder of class folders, or a tar of one",
            do="check the path; relative paths start at the current folder",
        )
    return _by_split_and_class(source, listing)


def _by_split_and_class(source: str, listing: Listing) -> tuple[dict[str, dict[str, list]], list[tuple[str, str]]]:
    tops = {path.split("/")[0] for path in listing.paths if "/" in path}
    split_of = {top: split for split, words in SPLITS.items() for top in tops if top.lower() in words}
    divided = "train" in split_of.values()
    if split_of and not divided and len(split_of) == len({top for top in tops if not _is_hidden(top)}):
        raise DataError(
            "there is no train folder",
            given=f"{source} has {', '.join(sorted(split_of))}",
            do="name the training images' folder with --data and the other with --val-data",
        )
    parts: dict[str, dict[str, list]] = {}
    skipped: list[tuple[str, str]] = []
    for path in listing.paths:
        pieces = path.split("/")
        if any(_is_hidden(piece) for piece in pieces):
            continue
        split = split_of.get(pieces[0]) if divided else "all"
        inner = pieces[1:] if divided else pieces
        if split is None or len(inner) < 2:
            skipped.append((path, "lies outside the class folders"))
        elif not path.lower().endswith(SUFFIXES):
            skipped.append((path, f"{Path(path).suffix or 'no suffix'} is not an image format that is read"))
        else:
            parts.setdefault(split, {}).setdefault(inner[0], []).append((path, listing.read))
    _require_images(source, listing, divided, split_of, parts)
    return parts, skipped


def _is_hidden(name: str) -> bool:
    """What file managers leave behind: .DS_Store, ._name, __MACOSX."""
    return name.startswith((".", "__MACOSX"))


def _require_images(
    source: str, listing: Listing, divided: bool, split_of: dict[str, str], parts: dict[str, dict[str, list]]
) -> None:
    if not parts:
        raise DataError(
            "no images in class folders",
            given=f"{source} ({len(listing.paths)} files)",
            allowed=f"CLASS/NAME with one of {' '.join(SUFFIXES)}, also below train/ and val/",
        )
    places = [p.split("/") for p in (*listing.folders, *(p.rpartition("/")[0] for p in listing.paths if "/" in p))]
    if divided:
        places = [pieces[1:] for pieces in places if pieces[0] in split_of]
    known = {name for classes in parts.values() for name in classes}
    empty = sorted({pieces[0] for pieces in places if pieces and not _is_hidden(pieces[0])} - known)
    if empty:
        raise DataError("a class folder holds no images", given=", ".join(empty), do="fill it or remove it")
    if divided and not parts.get("train"):
        raise DataError("the train folder holds no images", given=source)


def _split(files: dict[str, list], classes: Sequence[str]) -> Split:
    rows = [(name, read, label) for label, one in enumerate(classes) for name, read in files.get(one, [])]
    names = tuple(name for name, _, _ in rows)
    labels = np.asarray([label for _, _, label in rows], dtype=np.int64)
    return Split(names, labels, lambda index: rows[index][1](rows[index][0]))


def _require_classes(source: str, classes: Iterable[str]) -> tuple[str, ...]:
    names = tuple(sorted(classes))
    if len(names) < 2:
        raise DataError(
            "at least two classes are needed",
            given=f"{source} has {', '.join(names) or 'none'}",
            do="name the folder whose sub-folders are the classes",
        )
    return names


def _divide(source: str, files: dict[str, list], fraction: float, skipped: list[tuple[str, str]]) -> ImageData:
    """Hold out a share of each class; which images is a function of their number alone."""
    classes = _require_classes(source, files)
    everything = _split(files, classes)
    small = [classes[label] for label, count in enumerate(np.bincount(everything.labels)) if count < 2]
    if small:
        raise DataError("a class needs two images at least, one to learn from and one to check", given=", ".join(small))
    first = len(everything) - max(len(classes), round(len(everything) * fraction))
    train, val = stratified(everything.labels, max(first, len(classes)))
    rule = f"{fraction:.0%} of each class held out for evaluation"
    return ImageData(
        source, classes, everything.take(train), everything.take(val), skipped=tuple(skipped), split_rule=rule
    )


def _with_splits(source: str, parts: dict[str, dict[str, list]], skipped: list[tuple[str, str]]) -> ImageData:
    classes = _require_classes(source, parts["train"])
    for split in ("val", "test"):
        strange = sorted(set(parts.get(split, {})) - set(classes))
        if strange:
            raise DataError(
                f"classes in {split} that train lacks",
                given=", ".join(strange[:10]),
                allowed=", ".join(classes[:20]),
                do=f"remove them from {split}, or add training images",
            )
    test = _split(parts["test"], classes) if parts.get("test") else None
    return ImageData(
        source,
        classes,
        _split(parts["train"], classes),
        _split(parts["val"], classes),
        test,
        tuple(skipped),
        "the source's own train and evaluation folders",
    )
