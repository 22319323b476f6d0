"""WebDataset shards: tars in which the files of a sample share a name, as 000.jpg and 000.cls."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from remap.data.file_listing import Listing
from remap.data.image_files import is_leftover, why_not_read
from remap.data.rows import LABEL, LABELS, Row, Rows
from remap.data.shards import DEALT, Shard, of_split, shards
from remap.data.sources import Source
from remap.data.tar_listing import Held, is_compressed, list_tar, listing_of_spans
from remap.data.words import Word, parsed
from remap.errors import DataError
from remap.io.names import plain

# The file that holds a label, or what holds it in KEY.json, unless ``label=`` names another.
LABEL_FILES = ("cls", "label", "cls.txt", "label.txt")
MOST_LABEL_BYTES = 2**20
SUFFIXES = (".tar", ".tar.gz", ".tgz")
# A sample is named by its path up to the first dot of the file name, as in the package webdataset.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


class WebDataset(Rows):
    """A shard, a folder or a pattern of shards, whose names may say their split. Read as any tar; nothing is unpickled.

    Opening reads the headers and labels of all shards once. Other options: ``image=png`` where a sample has several
    images, ``label=EXTENSION`` or ``label=KEY`` of its JSON, where a list holds several labels.
    """

    several_labels = True
    only: Shard | None = None

    def rows(self, word: Word, labeled: bool) -> Iterator[Row]:
        held, list_together = Held(), DEALT.get()
        found = [self.only] if self.only else of_split(shards(word.rest, SUFFIXES), word.options.get("split"))
        # A compressed shard is held in memory by each process, which therefore reads it itself.
        plain_shards = [one for one in found if not is_compressed(one.path)] if list_together else []
        dealt = list_together(plain_shards, partial(_found, word, labeled)) if list_together else []
        known = dict(zip(plain_shards, dealt, strict=True))
        for shard in found:
            yield from _rows_of(shard, word, labeled, held, known.get(shard))

    def shards(self, word: str) -> list[Shard]:
        found = parsed(word)
        return of_split(shards(found.rest, SUFFIXES), found.options.get("split"))

    def by_shard(self, word: str) -> list[Source]:
        found, sources = parsed(word), list[Source]()
        for shard in shards(found.rest, SUFFIXES):
            if found.options.get("split") in (None, shard.split):
                sources.append(one := type(self)())
                one.only = shard
        return sources


def _rows_of(shard: Shard, word: Word, labeled: bool, held: Held, known: list[Any] | None) -> Iterator[Row]:
    """Yield the rows of one tar; their names begin with its own, since keys may repeat.

    Args:
        known: What ``_found`` returned for it, in another process.
    """
    if known is None:
        in_tar = _listed(shard, word, held)
        samples: Iterable[Any] = _samples(in_tar, word, labeled)
    else:
        in_tar = listing_of_spans(shard.path, {member: (offset, size) for member, _, offset, size in known})
        samples = ((member, tuple(label) if isinstance(label, list) else label) for member, label, _, _ in known)
    prefix = f"{shard.name}/"
    listing = Listing(
        (), (), lambda name: in_tar.read(name[len(prefix) :]), lambda name: in_tar.size(name[len(prefix) :])
    )
    for member, label in samples:
        yield Row(prefix + member, listing, label, shard.split, why_not_read(member))


def _found(word: Word, labeled: bool, shard: Shard) -> list[Any]:
    """Return name, label, offset and bytes of each image of a plain tar, for all processes."""
    in_tar = _listed(shard, word, Held())
    return [(member, label, *in_tar.spans[member]) for member, label in _samples(in_tar, word, labeled)]


def _listed(shard: Shard, word: Word, held: Held) -> Listing:
    chosen = word.options.get("label", "cls").lower()
    return list_tar(shard.path, (".cls", ".label", ".txt", ".json", f".{chosen}"), held)


def _samples(in_tar: Listing, word: Word, labeled: bool) -> Iterator[tuple[str, str | tuple[str, ...]]]:
    """Yield the image and the label of each sample of a tar."""
    samples: dict[str, dict[str, str]] = {}
    for member in in_tar.paths:
        match = _MEMBER.fullmatch(member)
        if match and not any(map(is_leftover, member.split("/"))):
            samples.setdefault(match[1], {})[match[2].lower()] = member
    for key, files in samples.items():
        image = _image(key, files, word.options.get("image"))
        if image is not None:
            yield image, _label(in_tar, files, word.options.get("label")) if labeled else ""


def _image(key: str, files: Mapping[str, str], chosen: str | None) -> str | None:
    """Return the file of a sample that is its image, or the one that may be meant for it; None without one."""
    if chosen is not None:
        return files.get(chosen.lower())
    others = [name for name in files.values() if not name.endswith((".cls", ".txt", ".json"))]
    images = [files[kind] for kind in files if "." not in kind and why_not_read(files[kind]) is None]
    images = [name for name in images if not name.endswith(".npy")] or images  # features are often stored beside
    if len(images) > 1:
        do = "name the one to use: webdataset:SHARDS,image=EXTENSION"
        raise DataError("a sample has several images", given=plain(f"{key}: {', '.join(files)}")[:200], do=do)
    return next(iter(images or others), None)


def _label(in_tar: Listing, files: Mapping[str, str], chosen: str | None) -> str | tuple[str, ...]:
    """Return the label of a sample from its text file, or the labels from its JSON; empty without one."""
    kind = next((one for one in ([chosen.lower()] if chosen else LABEL_FILES) if one in files), None)
    name = files.get(kind or "json")
    if name is None:
        return ""
    try:
        if in_tar.size(name) > MOST_LABEL_BYTES:
            raise ValueError(f"larger than {MOST_LABEL_BYTES:,} bytes")
        text = in_tar.read(name).decode("utf-8-sig")  # editors on Windows put a mark first
        if kind is not None:
            return text.strip()
        content = json.loads(text)
        value = next(
            (content[one] for one in ([chosen] if chosen else ("cls", *LABEL, *LABELS)) if one in content), None
        )
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError("a label cannot be read", given=plain(f"{name}: {error}")[:200]) from error
    if isinstance(value, list):
        return tuple(str(one) for one in value if one is not None)
    return "" if value is None else str(value)
