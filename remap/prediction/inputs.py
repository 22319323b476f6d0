"""The images that words name, one after the other: files, folders, patterns, archives, lists and standard input."""

import codecs
import glob
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from remap.data import is_source
from remap.data.file_listing import walk_folder
from remap.data.hugging_face import HuggingFace
from remap.data.image_files import Skipped, also_left_out, left_out, why_left_out
from remap.data.images import SUFFIXES
from remap.data.sources import TABLES, Source, find_source, list_files
from remap.data.words import Word, of_images, parsed
from remap.errors import DataError
from remap.io.checked_read import open_regular
from remap.io.paths import expanded

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
FILES_OF_IMAGES = (*TABLES, ".parquet")
STDIN = "-"
_NO_IMAGES = "name images, or folders, archives or lists of them"


@dataclass(frozen=True)
class Item:
    """One image: what rows call it, what gives its file or content, and whether it is known to be of a kind to read."""

    path: str
    read: Callable[[], Path | bytes]
    judged: bool = False


class Inputs:
    """Iterates over the images, in the same order every time; nothing is listed beforehand but the names of an archive.

    Files are taken as they are named, even where there are none, which their rows say; in folders and archives only
    images count.

    Args:
        words: Files, folders, tars and zips, patterns (``photos/**/*.jpg``), sources (``csv:photos.csv``), or "-" for
            one of these a line on standard input.
        lists: Text files with one of these a line.

    Attributes:
        left_out: How many files of folders and archives were not taken for images, by reason.
        left_out_here: Those of them that no other process of ``share`` counts.

    Raises:
        DataError: No word names anything; while iterating: there is no image, or a folder or list cannot be read.
    """

    def __init__(self, words: Iterable[str | Path], lists: Iterable[str | Path] = ()) -> None:
        self.words, self.lists = [of_images(os.fspath(word)) for word in words], [expanded(path) for path in lists]
        self.left_out: Counter[str] = Counter()
        self.left_out_here: Counter[str] = Counter()
        plain = [word for word in self.words if word != STDIN and not glob.has_magic(word) and not is_source(word)]
        if not all(self.words) or not (self.words or self.lists):  # an empty word would be the current folder
            raise DataError("no images are named", allowed="files, folders, archives, patterns, --list FILE, or -")
        if plain == self.words and not self.lists and not any(os.path.lexists(expanded(word)) for word in plain):
            raise DataError(
                "no such file or folder",
                given=", ".join(plain),
                do="check the path; relative paths start at the current folder",
            )

    def __iter__(self) -> Iterator[Item]:
        return (item for _, item in self.share(0, 1))

    def share(self, process: int, processes: int) -> Iterator[tuple[int, Item]]:
        """Yield the images that one of several processes reads, each with the number of the turn that it is of.

        In a turn each process has one image; or, of a WebDataset with as many shards as processes, all images of a
        shard, which no other process lists or reads. A single process has one turn.
        """
        self.left_out.clear()
        self.left_out_here.clear()
        units, empty = 0, True
        for word in self._all_words():
            for items in self._units(word, processes):
                mine = units % processes == process
                for item in items if mine else ():
                    empty = False
                    yield (units // processes if processes > 1 else 0), item
                empty, units = empty and mine, units + 1
        if empty:
            given = ", ".join([*self.words, *map(str, self.lists)])
            raise DataError(
                "no images there", given=given + also_left_out(self._skipped), allowed=" ".join(SUFFIXES), do=_NO_IMAGES
            )

    @property
    def left_out_text(self) -> str:
        """Return how many files were left out for which reason, in words."""
        return left_out(self._skipped)

    @property
    def _skipped(self) -> Skipped:
        return [("", reason) for reason in self.left_out.elements()]

    def _all_words(self) -> Iterator[str]:
        for word in self.words:
            if word == STDIN:
                yield from _lines(sys.stdin.buffer)
            elif glob.has_magic(word) and not is_source(word) and not os.path.lexists(expanded(word)):
                yield from _matches(os.fspath(expanded(word)))
            else:
                yield word
        for path in self.lists:
            try:
                with open_regular(path) as file:
                    yield from _lines(file)
            except OSError as error:
                raise DataError(
                    f"cannot read {path}: {error.strerror}", do="name a text file, one path a line"
                ) from None

    def _units(self, word: str, processes: int) -> Iterator[Iterable[Item]]:
        """Yield what is dealt out to processes: shards, or else single images."""
        shards = find_source(word).by_shard(word) if is_source(word := of_images(word)) else []
        if len(shards) < processes:
            yield from ((item,) for item in self._items(word))
        else:
            yield from (self._of_source(shard, word, self.left_out_here) for shard in shards)

    def _of_source(self, source: Source, word: str, left_out: Counter[str]) -> Iterator[Item]:
        files, skipped = source.images(word)
        for counter in (self.left_out, left_out):
            counter.update(reason for _, reason in skipped)
        folder = _folder_of(parsed(word))
        for name, listing in files:
            yield Item(os.path.join(folder, name), partial(listing.read, name), judged=True)

    def _items(self, word: str) -> Iterator[Item]:
        path = expanded(word := of_images(word))
        # A table that a pattern matches lies beside the images it names.
        is_named = word in self.words and word.lower().endswith(FILES_OF_IMAGES) and os.path.isfile(path)
        if is_source(word) or is_named or HuggingFace().recognises(path):
            yield from self._of_source(find_source(word), word, Counter())
        elif os.path.isdir(path):
            for prefix, _, names in walk_folder(path):
                for name in filter(self._is_image, (prefix + name for name in names)):
                    yield Item(str(path / name), partial(Path, path / name))
        elif word.lower().endswith(ARCHIVES) and os.path.isfile(path):
            listing = list_files(word, "a tar or zip of images")
            for name in filter(self._is_image, listing.paths):
                yield Item(f"{path}/{name}", partial(listing.read, name))
        else:
            yield Item(str(path), partial(Path, path))

    def _is_image(self, path: str) -> bool:
        reason = why_left_out(path)
        if reason is not None:
            self.left_out[reason] += 1
        return reason is None


def _folder_of(word: Word) -> str:
    """Return where the names that a source gives its images are: of a table or of shards, the folder beside them."""
    is_file = word.rest.lower().endswith((*FILES_OF_IMAGES, ".tar"))
    return word.options.get("folder") or (os.path.dirname(word.rest) if is_file else word.rest)


def _matches(pattern: str) -> Iterator[str]:
    """Yield the paths that match, but for those in a folder that matches itself and is read completely."""
    folders: set[Path] = set()
    for match in sorted(glob.iglob(pattern, recursive=True)):
        if folders.isdisjoint(Path(match).parents):
            if os.path.isdir(match):
                folders.add(Path(match))
            yield match


def _lines(file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file):
        content = line if number else line.removeprefix(codecs.BOM_UTF8)  # which editors on Windows put first
        if word := os.fsdecode(content).strip("\r\n"):
            yield word
