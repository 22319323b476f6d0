"""Files in a tar, plain or compressed; nothing is extracted, and nothing is read or decompressed without a bound."""

import bz2
import errno
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from remap.data.file_listing import Listing, member_path, require_few
from remap.data.image_files import OTHER_TABLES, why_not_read
from remap.data.images import MAX_BYTES
from remap.errors import DataError, RemapError
from remap.io.checked_read import open_regular
from remap.io.names import first_line, plain

# A compressed archive cannot be read from the middle, so its images are held in memory: of all archives of a source
# together up to this many bytes.
HELD_BYTES = 2 * 2**30
# What a compressed archive may grow to: images hardly shrink, while bombs shrink a thousandfold. Small ones may.
MOST_GROWTH, FREE_GROWTH, MOST_DECOMPRESSED = 200, 64 * 2**20, 16 * 2**30
# One header of an archive; the names in it are at most 4 kB.
_HEADER_BYTES = 2**20
_DECOMPRESSORS: tuple[tuple[bytes, Callable[[io.BufferedReader], io.BufferedIOBase]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
    (b"\x5d\x00\x00", lzma.LZMAFile),
)
# Why members of an archive are left out.
LINKS, DEVICES = "links in an archive", "devices and pipes"
# Offset and bytes of each file by name.
Members = dict[str, tuple[int, int]]


@dataclass
class Held:
    """Bytes of compressed archives that are held in memory."""

    bytes: int = 0


def list_tar(path: Path, also: tuple[str, ...] = (), held_so_far: Held | None = None) -> Listing:
    """List the regular files of a tar, to be read where they lie; links, devices and files with holes are left out.

    A hard link to a file before it in the archive is that file under another name.

    Args:
        also: Ends of names of other files than images that are read, too.
        held_so_far: What earlier archives of the source hold; this one is added.

    Raises:
        DataError: It is not a complete tar, it grows out of bounds, or it is compressed with too many images to hold.
    """
    try:
        with open_regular(path) as file:
            stream, compressed = _stream(path, file)
            files, folders, left_out = _members(path, stream)
            if compressed:
                held = _held(path, stream, files, also, held_so_far or Held())

                def read_held(name: str) -> bytes:
                    if name not in held:
                        raise OSError(errno.EINVAL, "not read from a compressed archive: neither an image nor a label")
                    return held[name]

                sizes = {name: size for name, (_, size) in files.items()}
                return Listing(tuple(sorted(files)), folders, read_held, sizes.__getitem__, left_out=left_out)
    except RemapError:
        raise
    except Exception as error:  # Python's readers raise many kinds; all mean the file is no usable archive
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error).rstrip(":")
        do = "download or copy it again; if it is another kind of file, name the folder of the images"
        if path.suffix.lower() in OTHER_TABLES:
            do = "if it holds the labels, convert it to a CSV and name that"
        raise DataError(f"cannot read {path} as a tar archive: {reason}", do=do) from error
    return replace(listing_of_spans(path, files, folders), left_out=left_out)


def is_compressed(path: Path) -> bool:
    """Return whether a file is a compressed archive; one that cannot be read is none."""
    try:
        with open_regular(path) as file:
            return file.read(8).startswith(tuple(magic for magic, _ in _DECOMPRESSORS))
    except OSError:
        return False


def listing_of_spans(path: Path, files: Members, folders: tuple[str, ...] = ()) -> Listing:
    """Return the listing of files that lie in a tar at these offsets."""

    def read(name: str) -> bytes:
        offset, size = files[name]
        if size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MAX_BYTES:,} bytes")
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return Listing(tuple(sorted(files)), folders, read, lambda name: files[name][1], files)


def _stream(path: Path, file: io.BufferedReader) -> tuple["_Bounded", bool]:
    """Return the archive's bytes, decompressed where it is compressed; and whether it is."""
    start, size = file.read(8), os.fstat(file.fileno()).st_size
    file.seek(0)
    for magic, opener in _DECOMPRESSORS:
        if start.startswith(magic):
            limit = min(max(FREE_GROWTH, MOST_GROWTH * size), MOST_DECOMPRESSED)
            return _Bounded(opener(file), limit, path, size), True
    return _Bounded(file, size, path, size), False


class _Bounded(io.RawIOBase):
    """A file that is not read beyond a limit, and by tarfile only in pieces of at most a header."""

    def __init__(self, file: io.BufferedIOBase, limit: int, path: Path, packed: int) -> None:
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
        """Return the bytes of a member."""
        self.seek(offset)
        self._require(offset + size)
        data = self._file.read(size)
        if len(data) != size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _require(self, end: int) -> None:
        if end <= self._limit + _HEADER_BYTES:
            return
        if self._limit == self._packed:
            raise tarfile.ReadError("unexpected end of data")
        raise DataError(
            f"{self._path} grows out of bounds when it is decompressed",
            given=f"{self._packed:,} bytes that hold more than {self._limit:,}",
            allowed=f"{MOST_GROWTH} times its size ({FREE_GROWTH // 2**20} MiB at least)",
            do="if you trust it, decompress it yourself (gunzip, unxz, bunzip2) and name the plain tar",
        )


def _members(path: Path, stream: _Bounded) -> tuple[Members, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return the files, the last of several of one name, the names of folders, and what else there is."""
    files: Members = {}
    folders: set[str] = set()
    left_out: list[tuple[str, str]] = []
    count, last = 0, -1
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            # A header of negative size leads back, and tarfile would read it for ever (its CVE-2025-8194).
            if member.offset <= last or member.size < 0:
                raise tarfile.ReadError("its headers go in a circle")
            last, count = member.offset, count + 1
            require_few(count, path)
            archive.members.clear()  # type: ignore[attr-defined]  # a million members that were seen are a gigabyte
            name = member_path(member.name)
            if member.isdir() and name:
                folders.add(name)
            elif member.isreg() and not member.issparse():
                files[name] = (member.offset_data, member.size)
            elif member.islnk() and (target := member_path(member.linkname)) in files:
                files[name] = files[target]
            elif name:
                left_out.append((plain(name), _kind(member)))
    return files, tuple(sorted(folders)), tuple(left_out)


def _kind(member: tarfile.TarInfo) -> str:
    """Return what a member is that is not read, as a reason to leave several out."""
    if member.issparse():
        return "files with holes"
    return LINKS if member.issym() or member.islnk() else DEVICES


def _held(path: Path, stream: _Bounded, files: Members, also: tuple[str, ...], so_far: Held) -> dict[str, bytes]:
    """Return the content of a compressed archive's images; other members are not read."""
    images = {name: at for name, at in files.items() if why_not_read(name) is None or name.lower().endswith(also)}
    # Hard links are several names of one span.
    spans = sorted(set(images.values()))
    total, before = sum(size for _, size in spans), so_far.bytes
    so_far.bytes += total
    if so_far.bytes > HELD_BYTES:
        more = f" beside {before / 2**30:.1f} GiB of the archives before it" if before else ""
        raise DataError(
            f"{path} is compressed and holds more images than fit in memory",
            given=f"{total / 2**30:.1f} GiB{more}",
            allowed=f"{HELD_BYTES / 2**30:.1f} GiB; a plain tar or a folder may have any size",
            do="decompress the archive (gunzip, unxz, bunzip2), or unpack it and name the folder",
        )
    # In the order of their positions, since a compressed file can only be read forwards.
    content = {span: stream.content(*span) for span in spans}
    return {name: content[span] for name, span in images.items()}
