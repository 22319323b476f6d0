"""Data sets in several files: patterns that name them, and the splits that their names say."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from posixpath import splitext
from typing import Any, NamedTuple

from remap.data.file_listing import list_folder
from remap.data.folder_layout import split_named
from remap.data.image_files import is_leftover
from remap.errors import DataError, MissingData
from remap.io.paths import expanded

MOST_SHARDS = 100_000
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")


class Shard(NamedTuple):
    """A file, its path below the folder of all, and its split; None where no file's path there says one."""

    path: Path
    name: str
    split: str | None


# What lists each shard where several processes do it together (``remap.distributed.reading``); what it finds of a shard
# goes through JSON. None where each process lists all of them.
Deal = Callable[[Sequence[Shard], Callable[[Shard], Any]], list[Any]]
DEALT: ContextVar[Deal | None] = ContextVar("dealt", default=None)


def shards(word: str, suffixes: tuple[str, ...]) -> list[Shard]:
    """Return the files that a word names, with their splits as their names, or the folders they lie in, say them.

    ``train-00000-of-00004.parquet``, ``imagenet1k-train-0000.tar`` and ``train/0000.parquet`` are of "train".

    Args:
        word: A file, a folder of such files, or a pattern: ``shards-{000..009}.tar``, ``{a,b}.tar``, ``data/*.tar``.

    Raises:
        MissingData: One of them is not there.
    """
    path = expanded(word)
    if os.path.isdir(path):
        names = [name for name in list_folder(path).paths if not any(map(is_leftover, name.split("/")))]
        files = [path / name for name in names if name.lower().endswith(suffixes)]
    else:
        files = [file for pattern in expand_braces(str(path)) for file in _matching(pattern)]
    if not files:
        raise MissingData("no such files", given=word, allowed=f"files that end in {' or '.join(suffixes)}")
    folder = os.path.commonpath([file.parent for file in files])
    names = [os.path.relpath(file, folder).replace(os.sep, "/") for file in files]
    parts = [_parts(name, suffixes) for name in names]
    splits: list[str | None] = [None] * len(files)
    for says in (_is_split, _has_split):  # beside "train", "train_small" is another one
        if not any(splits):
            splits = [next(filter(None, map(says, one)), None) for one in parts]
    if any(splits):  # what says none of the usual ones has another: "unsupervised"
        splits = [split or next(filter(None, one), "") for split, one in zip(splits, parts, strict=True)]
    return [Shard(*one) for one in zip(files, names, splits, strict=True)]


def of_split(found: list[Shard], split: str | None) -> list[Shard]:
    """Return the shards of a split alone, the only ones to be read; all of them where none is of it."""
    return [one for one in found if one.split == split] or found


def _parts(name: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return what may say a split: the file's name without numbers and hashes, and its folders, the nearest first."""
    *folders, file = name.split("/")
    ending = next((suffix for suffix in suffixes if file.lower().endswith(suffix)), splitext(file)[1])
    stem = re.sub(r"\d+-of-\d+.*|\d+", "", file[: len(file) - len(ending)])
    return [part.strip("-_.") for part in (stem, *reversed(folders))]


def _is_split(part: str) -> str | None:
    """Return what says a split as a whole: "train_set"."""
    return part if split_named(part) else None


def _has_split(part: str) -> str | None:
    """Return the one word that says a split: "train" of "imagenet1k-train"."""
    words = [word for word in re.split(r"[\W\d_]+", part) if split_named(word)]
    return words[0] if len({split_named(word) for word in words}) == 1 else None


def expand_braces(pattern: str) -> list[str]:
    """Return what a shell makes of ``{000..009}`` and ``{a,b}``.

    Raises:
        DataError: These are more than ``MOST_SHARDS``.
    """
    waiting, found = [pattern], list[str]()
    while waiting:
        text = waiting.pop()
        match = _BRACES.search(text)
        if match is None:
            found.append(text)
        else:
            first, last, words = match.groups()
            numbers = range(int(first or 0), int(last or 0) + 1)
            width = len(first) if first and first.startswith("0") else 0
            parts = words.split(",") if words else (f"{n:0{width}d}" for n in islice(numbers, MOST_SHARDS + 1))
            waiting += [text[: match.start()] + part + text[match.end() :] for part in parts][::-1]
        if len(waiting) + len(found) > MOST_SHARDS:
            raise DataError(f"a pattern names more than {MOST_SHARDS:,} files", given=pattern)
    return found


def _matching(pattern: str) -> list[Path]:
    if glob.has_magic(pattern) and not os.path.exists(pattern):
        return [Path(found) for found in sorted(glob.glob(pattern, recursive=True))]
    if not os.path.isfile(pattern):
        raise MissingData("no such file", given=pattern, do="check the path")
    return [Path(pattern)]
