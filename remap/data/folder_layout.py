"""Where the class folders are in what people have: inside of wrapping folders, and in the folders of splits."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from remap.data.file_listing import Listing
from remap.data.image_files import is_leftover, why_not_read
from remap.errors import DataError

# Folder names of the usual splits, as timm knows them: one that is alone is not a folder around everything.
SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test", "testing")
_SPLITS = {
    "train": r"train(?:ing)?",
    "val": r"val(?:id(?:ation)?)?|eval(?:uation)?|dev|holdout",
    "test": r"test(?:ing)?",
}
# What may stand around the name of a split, or alone as the name of a folder around everything. None of these words
# consists of others, so that no name takes long to match.
_FILLER = r"(?:images?|imgs?|photos?|pictures?|pics?|data|sets?|splits?|seg|my|raw|folders?)"
# The names on the way to a folder that holds files, and whether one of these is an image: (["train", "cat"], True).
Folder = tuple[list[str], bool]


@dataclass(frozen=True)
class Layout:
    """Where the class folders of a listing are.

    Attributes:
        prefix: The folder around everything, as "photos/"; empty without one.
        roots: The split of each folder inside ``prefix`` that holds class folders, as {"train/": "train"}; without
            splits {"": "all"}.
    """

    prefix: str
    roots: dict[str, str]

    def root_of(self, path: str) -> str | None:
        """Return the root that a path (without ``prefix``) lies in."""
        return next(filter(path.startswith, self.roots), None)


def split_named(folder: str) -> str | None:
    """Return the split that a folder's name stands for: "train" for "training_set", "seg_train" and "train2017"."""
    letters = _letters(folder)
    return next((s for s, words in _SPLITS.items() if re.fullmatch(f"{_FILLER}*(?:{words}){_FILLER}*", letters)), None)


def find_layout(word: str, listing: Listing) -> Layout:
    """Return where the class folders are.

    Raises:
        DataError: There is no train folder, or there are folders that may be splits as well as classes.
    """
    has_image: dict[str, bool] = {}
    for path in listing.paths:
        folder, _, name = path.rpartition("/")
        if not has_image.get(folder) and not is_leftover(name):
            has_image[folder] = why_not_read(name) is None
    named = ((folder.split("/") if folder else [], has) for folder, has in has_image.items())
    folders = [(parts, has) for parts, has in named if not any(map(is_leftover, parts))]
    prefix: list[str] = []
    while (around := _wrapping(folders)) is not None:
        prefix.append(around)
        folders = [(parts[1:], has) for parts, has in folders if parts and parts[0] == around]
    splits = _split_folders("/".join([word, *prefix]), folders)
    inner = {top: _inner_folder(top, split, folders) for top, split in splits.items()}
    # The training images show whether a folder as "images" is a class, of which others may hold that one alone.
    entered = any(inner[top] for top, split in splits.items() if split == "train")
    roots = {f"{top}/{inner[top] if entered else ''}": split for top, split in splits.items()}
    return Layout("".join(f"{name}/" for name in prefix), roots or {"": "all"})


def _letters(name: str) -> str:
    """Return a name without separators and years."""
    return re.sub(r"(?:19|20)\d\d|[\W_]+", "", name.lower())


def _is_filler(name: str) -> bool:
    return re.fullmatch(f"{_FILLER}+", _letters(name)) is not None


def _wrapping(folders: Sequence[Folder]) -> str | None:
    """Return the one folder that all images lie in, at least two levels deeper, as archives often have one."""
    images = [parts for parts, has in folders if has and parts]
    tops = {parts[0] for parts in images}
    if len(tops) != 1 or any(len(parts) < 2 for parts in images):
        return None
    (top,) = tops
    alone = all(parts[0] == top for parts, _ in folders if parts)
    return top if top.lower() not in SPLIT_FOLDERS and (alone or _is_filler(top)) else None


def _inner_folder(top: str, split: str, folders: Sequence[Folder]) -> str:
    """Return the folder inside a split's that holds the class folders: the second one in seg_train/seg_train/cat."""
    images = [parts[1:] for parts, has in folders if has and parts[:1] == [top] and len(parts) > 1]
    inner = {parts[0] for parts in images}
    if len(inner) != 1 or any(len(parts) < 2 for parts in images):
        return ""
    (name,) = inner
    return f"{name}/" if _is_filler(name) or split_named(name) == split else ""


def _split_folders(word: str, folders: Sequence[Folder]) -> dict[str, str]:
    """Return the split of each top folder that holds one; nothing where no folder is to learn from.

    A split holds class folders. A folder that holds images directly is a class, whatever its name.
    """
    direct = {parts[0] for parts, has in folders if has and len(parts) == 1}
    inner: defaultdict[str, set[str]] = defaultdict(set)
    for parts, has in folders:
        if has and len(parts) > 1:
            inner[parts[0]].add(parts[1])
    tops = sorted({parts[0] for parts, _ in folders if parts})
    split_of = {top: split for top in tops if (split := split_named(top)) is not None}
    others = [top for top in tops if top not in split_of]
    train = [top for top, split in split_of.items() if split == "train"]
    held_out = [top for top in split_of if top not in train]
    if not train:
        if held_out and not others:
            raise DataError(
                "there is no train folder",
                given=f"{word} has {', '.join(held_out)}",
                do="name the training images' folder with --data and the other with --val-data",
            )
        for top in held_out:
            if inner[top] & set(others):
                do = "move it elsewhere and name it with --val-data"
                raise _split_or_class(word, top, "it holds folders of the same names as those beside it", do)
        return {}  # classes may be called "test" or "val"
    do = f"name it: --data {word}/{train[0]}"
    if all(top in direct and not inner[top] for top in train):
        if not direct.intersection(others) or any(inner[top] for top in held_out):
            do = "sort its images into class folders, or name a CSV of labels with --data"
            raise _split_or_class(word, train[0], "it holds images, but no class folders", do)
        return {}
    beside = [top for top in others if top in direct]
    if len(beside) > 1 and not any(inner[top] for top in held_out):
        why = f"it holds sub-folders, while {', '.join(beside[:3])} beside it hold images"
        raise _split_or_class(word, train[0], why, do)
    alike = next((top for top in others if inner[top] & inner[train[0]]), None)
    if alike is not None and not any(inner[top] for top in held_out):
        raise DataError(
            f"{alike} may be a split, or of no use: it holds folders of the same names as {train[0]} beside it",
            given=word,
            do=f"if it is a split, {do} --val-data {word}/{alike}; if not, move it elsewhere",
        )
    return split_of


def _split_or_class(word: str, folder: str, why: str, do: str) -> DataError:
    what = f"{folder} may be a split, or a class of that name: {why}"
    return DataError(what, given=word, do=f"if it is a split, {do}; if it is a class, rename it")
