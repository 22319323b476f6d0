"""What lies in a folder or a tar, and what reads it; nothing is extracted, and nothing is read without a bound."""

import bz2
import errno
import gzip
import io
import lzma
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from remap.data.images import MAX_BYTES, SUFFIXES
from remap.errors import DataError, RemapError
from remap.io.checked_read import LONGEST_PATH, open_regular, read_regular

# A compressed archive has no places to jump to, so its images are held in memory, up to this many bytes.
HELD_BYTES = 2 * 2**30
# What a compressed archive may grow to: images hardly shrink, while bombs shrink a thousandfold. Small ones may.
MOST_GROWTH, FREE_GROWTH, MOST_DECOMPRESSED = 200, 64 * 2**20, 16 * 2**30
# Files and folders of one source; the largest public sets of images have 15 million.
MOST_ENTRIES = 20_000_000
# And levels of folders in it, far below where Python gives up.
MOST_LEVELS = 128
# How often links may lead to the same folder; links that go round lead there without end.
MOST_VISITS = 16
# A header of an archive; the names in it are at most 4 kB.
_HEADER_BYTES = 2**20
_DECOMPRESSORS: tuple[tuple[bytes, Callable[[BinaryIO], BinaryIO]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
    (b"\x5d\x00\x00", lzma.LZMAFile),
)


@dataclass(frozen=True)
class Listing:
    """Files and folders of a folder or tar as relative paths, and what reads a file."""

    paths: tuple[str, ...]
    folders: tuple[str, ...]
    read: Callable[[str], bytes]


def unwrapped(listing: Listing, keep: Collection[str]) -> Listing:
    """Step into a single folder that holds everything, as archives often have one; not into one named in ``keep``."""
    tops = {path.split("/")[0] for path in listing.paths}
    deep = all(path.count("/") >= 2 for path in listing.paths)
    if len(tops) != 1 or not deep or next(iter(tops)).lower() in keep:
        return listing
    prefix = f"{tops.pop()}/"
    inside = tuple(folder.removeprefix(prefix) for folder in listing.folders if folder.startswith(prefix))
    paths = tuple(path.removeprefix(prefix) for path in listing.paths)
    return Listing(paths, inside, lambda path: listing.read(prefix + path))


def list_folder(root: Path) -> Listing:
    """All files below a folder, links followed. What is no file, such as a FIFO, is an error when it is read.

    Raises:
        DataError: A folder cannot be read, lies too deep, or links go round.
    """
    paths: list[str] = []
    folders: list[str] = []
    visits: Counter[tuple[int, int]] = Counter()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_unreadable):
        below[:] = [name for name in below if not _links_up(folder, name)]
        for name in below:
            status = os.stat(os.path.join(folder, name))
            visits[status.st_dev, status.st_ino] += 1
            if visits[status.st_dev, status.st_ino] > MOST_VISITS:
                raise DataError(
                    "links to folders go round, or lead to the same folder again and again",
                    given=os.path.join(folder, name),
                    do="remove the link",
                )
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        if prefix.count("/") > MOST_LEVELS:
            raise DataError(
                f"{root} holds folders that are more than {MOST_LEVELS} levels deep",
                do="name the folder that the images are in",
            )
        paths += [prefix + name for name in names]
        folders += [prefix + name for name in below]
        _require_few(len(paths) + len(folders), root)
    return Listing(tuple(sorted(paths)), tuple(sorted(folders)), lambda p: read_regular(root / p, MAX_BYTES))


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"a folder cannot be read: {error.strerror}", given=error.filename, do="let it be read, or remove it"
    ) from error


def _require_few(count: int, source: Path) -> None:
    if count > MOST_ENTRIES:
        raise DataError(f"{source} holds more than {MOST_ENTRIES:,} files and folders")


def _links_up(folder: str, name: str) -> bool:
    """Whether a sub-folder is a link to a folder it lies in, which would be walked for ever."""
    path = os.path.join(folder, name)
    above = os.path.join(os.path.realpath(folder), "")
    return os.path.islink(path) and above.startswith(os.path.join(os.path.realpath(path), ""))


def list_tar(path: Path) -> Listing:
    """Members are read where they lie; nothing is extracted, and links, devices and files with holes are ignored.

    Raises:
        DataError: It is no whole tar, one that grows out of bounds, or a compressed one with too many images to hold.
    """
    try:
        with open_regular(path) as file:
            stream, compressed = _stream(path, file)
            files, folders = _members(path, stream)
            if compressed:
                held = _held(path, stream, files)
                return Listing(tuple(sorted(files)), folders, lambda p: held[p])
    except RemapError:
        raise
    except Exception as error:  # Python's readers raise many kinds; all mean the file is no usable archive
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        reason = error.strerror if isinstance(error, OSError) and error.strerror else reason
        raise DataError(
            f"cannot read {path} as a tar archive: {reason}", allowed="a folder of class folders, or a tar of one"
        ) from error

    def read(name: str) -> bytes:
        offset, size = files[name]
        _require_readable(size)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return Listing(tuple(sorted(files)), folders, read)


def _stream(path: Path, file: BinaryIO) -> tuple["_Bounded", bool]:
    """The archive's bytes, decompressed within bounds where it is compressed; and whether it is."""
    start, size = file.read(8), os.fstat(file.fileno()).st_size
    file.seek(0)
    for magic, opener in _DECOMPRESSORS:
        if start.startswith(magic):
            limit = min(max(FREE_GROWTH, MOST_GROWTH * size), MOST_DECOMPRESSED)
            return _Bounded(opener(file), limit, path, size), True
    return _Bounded(file, size, path, size), False


class _Bounded(io.RawIOBase):
    """A file that is not read beyond a limit, nor in pieces larger than a header unless ``content`` is asked for."""

    def __init__(self, file: BinaryIO, limit: int, path: Path, packed: int) -> None:
        self._file, self._limit, self._path, self._packed = file, limit, path, packed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < 0:
            raise tarfile.ReadError("its headers point outside of it")
        self._require(offset)
        return self._file.seek(offset)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError("a header in it is too large")
        self._require(self.tell() + size)
        return self._file.read(size)

    def content(self, offset: int, size: int) -> bytes:
        """Bytes of a member."""
        self.seek(offset)
        self._require(offset + size)
        data = self._file.read(size)
        if len(data) != size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _require(self, place: int) -> None:
        if place <= self._limit + _HEADER_BYTES:
            return
        if self._limit == self._packed:
            raise tarfile.ReadError("unexpected end of data")
        raise DataError(
            f"{self._path} grows out of bounds when it is decompressed",
            given=f"{self._packed:,} bytes that hold more than {self._limit:,}",
            allowed=f"{MOST_GROWTH} times its size ({FREE_GROWTH // 2**20} MiB at least)",
            do="if you trust it, decompress it yourself (gunzip, unxz, bunzip2) and name the plain tar",
        )


def _members(path: Path, stream: _Bounded) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """(offset, bytes) of each file by name, the last of several of one name, and the names of folders."""
    files: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for count, member in enumerate(_each(archive)):
            _require_few(count, path)
            name = _clean(member.name)
            if len(name) > LONGEST_PATH:
                raise tarfile.ReadError(f"a name in it has more than {LONGEST_PATH:,} letters")
            if member.isdir() and name:
                folders.add(name)
            elif member.isreg() and not member.issparse():
                files[name] = (member.offset_data, member.size)
    return files, tuple(sorted(folders))


def _each(archive: tarfile.TarFile) -> Iterator[Any]:
    """Members in their order. A header of negative size leads back, and tarfile would read it for ever (its
    CVE-2025-8194); members that were seen are let go, as a million of them is a gigabyte."""
    last = -1
    while (member := archive.next()) is not None:
        if member.offset <= last or member.size < 0:
            raise tarfile.ReadError("its headers go round")
        last = member.offset
        archive.members.clear()
        yield member


def _require_readable(size: int) -> None:
    if size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_BYTES:,} bytes")


def _held(path: Path, stream: _Bounded, files: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """The images of a compressed archive; other members are left where they are."""
    images = {name: place for name, place in files.items() if name.lower().endswith(SUFFIXES)}
    total = sum(size for _, size in images.values())
    if total > HELD_BYTES:
        raise DataError(
            f"{path} is compressed and holds more images than fit in memory",
            given=f"{total / 2**30:.1f} GiB",
            allowed=f"{HELD_BYTES / 2**30:.1f} GiB; a plain tar or a folder may have any size",
            do="decompress the archive (gunzip, unxz, bunzip2), or unpack it and name the folder",
        )
    in_order = sorted(images.items(), key=lambda item: item[1])
    return {name: stream.content(*place) for name, place in in_order}


def _clean(name: str) -> str:
    return "/".join(part for part in PurePosixPath(name).parts if part not in (".", "/"))
