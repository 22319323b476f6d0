"""Images from the embedded digits, a folder of class folders, or a tar of one; those without labels from any folder."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from remap.data.digits import open_digits
from remap.data.file_listing import Listing, list_folder, list_tar, unwrapped
from remap.data.images import SUFFIXES
from remap.data.splits import NO_LABEL, ImageData, Split, stratified
from remap.errors import DataError, MissingData
from remap.io.checked_read import absolute, expanded, plain, unfit_for_a_name

# Folder names of the usual splits, as timm knows them.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}


def open_data(
    source: str, val_source: str | None, val_fraction: float, unlabeled: str | None = None, labels: int | None = None
) -> ImageData:
    """Open a data source.

    Args:
        unlabeled: A folder or tar of images without labels, in any folders.
        labels: Keep the labels of this many training images; the others count as unlabelled.

    Raises:
        DataError: Nothing there, fewer than two classes, an empty class, classes that differ between splits, or a
            number of labels that cannot be.
    """
    data = _open_labeled(source, val_source, val_fraction)
    if labels is not None:
        data = data.with_labels(labels)
    if unlabeled is None:
        return data
    for other in (source, val_source):
        if other not in (None, "digits") and _holds(unlabeled, other):
            raise DataError(
                "the folder of images without labels holds the labelled ones, maybe those to evaluate on among them",
                given=f"{unlabeled} and {other}",
                do="name another folder; to learn from this one with the labels of N images only, set data.labels=N",
            )
        if other not in (None, "digits") and _holds(other, unlabeled):
            _refuse_evaluation(data, other, unlabeled)
    more, skipped = open_unlabeled(unlabeled)
    return replace(data.with_unlabeled(more), skipped=(*data.skipped, *skipped))


def open_unlabeled(source: str) -> tuple[Split, list[tuple[str, str]]]:
    """All images of a folder or tar, whatever its folders, without labels; and the files left out, with the reason.

    Names begin with the source's own, as the same file names may stand in the labelled data.

    Raises:
        DataError: Nothing there, or no images.
    """
    listing, name = _listing(source, "a folder or a tar of images"), Path(source).name
    visible = [path for path in listing.paths if not any(map(_is_hidden, path.split("/")))]
    paths = [path for path in visible if path.lower().endswith(SUFFIXES)]
    if not paths:
        raise DataError(
            "no images to learn from without labels",
            given=f"{source} ({len(listing.paths)} files)",
            allowed=f"files with one of {' '.join(SUFFIXES)}, in any folders",
        )
    skipped = [(plain(f"{name}/{path}"), _not_an_image(path)) for path in sorted({*visible} - {*paths})]
    names = tuple(plain(f"{name}/{path}") for path in paths)
    return Split(names, np.full(len(paths), NO_LABEL, dtype=np.int64), lambda i: listing.read(paths[i])), skipped


def _holds(outer: str, inner: str) -> bool:
    return Path(absolute(inner)).is_relative_to(absolute(outer))


def _refuse_evaluation(data: ImageData, source: str, unlabeled: str) -> None:
    """A folder inside the labelled data may be its training folder, or lie beside it, but not be evaluated on."""
    inside = Path(absolute(unlabeled)).relative_to(absolute(source)).as_posix()
    splits = [split for split in (data.val, data.test) if split is not None]
    if any(name.startswith(plain(f"{inside}/")) for split in splits for name in split.names):
        raise DataError(
            "the folder of images without labels holds images to evaluate on",
            given=f"{unlabeled}, inside {source}",
            do="name another folder; to learn from few labels, set data.labels=N",
        )


def _open_labeled(source: str, val_source: str | None, val_fraction: float) -> ImageData:
    if source == "digits":
        if val_source is not None:
            raise DataError("the embedded digits bring their own test split", given=f"data.val_source={val_source}")
        return open_digits()
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
        opened = open_digits()
        if tuple(classes) != opened.classes:
            raise DataError("classes the task does not know", given="digits", allowed=", ".join(classes[:20]))
        return opened.train.joined(opened.val)
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


def _open(source: str) -> tuple[dict[str, dict[str, list]], list[tuple[str, str]]]:
    """Files by split and class: {"train": {"ants": [(name, reader), ...]}}; without split folders under "all"."""
    listing = _listing(source, "'digits', a folder of class folders, or a tar of one")
    return _by_split_and_class(source, unwrapped(listing, [word for words in SPLITS.values() for word in words]))


def _listing(source: str, allowed: str) -> Listing:
    path = expanded(source)
    if os.path.isdir(path):
        return list_folder(path)
    if os.path.exists(path):
        return list_tar(path)
    from_here = "" if path.is_absolute() else "; relative paths start at the current folder"
    raise MissingData("no such data", given=source, allowed=allowed, do=f"check the path{from_here}")


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
            skipped.append((plain(path), "lies outside the class folders"))
        elif not path.lower().endswith(SUFFIXES):
            skipped.append((plain(path), _not_an_image(path)))
        else:
            parts.setdefault(split, {}).setdefault(inner[0], []).append((path, listing.read))
    _require_images(source, listing, divided, split_of, parts)
    for name in {name for classes in parts.values() for name in classes}:
        _require_class_name(name)
    return parts, skipped


def _require_class_name(name: str) -> None:
    """Class names go into task files, tables and reports, and are typed on command lines."""
    unfit = unfit_for_a_name(name) or ("more than 255 letters" if len(name) > 255 else None)
    if unfit:
        raise DataError(f"a class folder's name has {unfit}", given=plain(name)[:80], do="rename the folder")


def _not_an_image(path: str) -> str:
    suffix = plain(Path(path).suffix)[:20]
    return f"{suffix} files are not taken from folders of images" if suffix else "it has no suffix"


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
        raise DataError("a class folder holds no images", given=plain(", ".join(empty[:20])), do="fill it or remove it")
    if divided and not parts.get("train"):
        raise DataError("the train folder holds no images", given=source)


def _split(files: dict[str, list], classes: Sequence[str]) -> Split:
    rows = [(name, read, label) for label, one in enumerate(classes) for name, read in files.get(one, [])]
    names = tuple(plain(name) for name, _, _ in rows)
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
