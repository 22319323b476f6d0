"""Files in a zip; nothing is extracted, and nothing is read or decompressed without a bound."""

import contextlib
import errno
import io
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from remap.data.file_listing import Listing, member_path, require_few
from remap.data.images import MAX_BYTES
from remap.data.tar_listing import DEVICES, FREE_GROWTH, LINKS, MOST_GROWTH
from remap.errors import DataError, RemapError
from remap.io.checked_read import open_regular
from remap.io.names import first_line, plain

# What Python's reader may read at once: the list of all files, about 100 bytes each.
_LIST_BYTES = 192 * 2**20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_UTF8_FLAG, _ENCRYPTED_FLAG = 0x800, 0x1


def list_zip(path: Path) -> Listing:
    """List the regular files of a zip, to be read where they lie; links and devices are left out.

    Raises:
        DataError: It is not a complete zip, or it is encrypted.
    """
    files: dict[str, zipfile.ZipInfo] = {}
    folders: set[str] = set()
    left_out: list[tuple[str, str]] = []
    try:
        with _Bounded(open_regular(path)) as file, zipfile.ZipFile(file) as archive:
            require_few(len(archive.filelist), path)
            for member in archive.filelist:
                name = member_path(_name(member))
                if member.is_dir() or member.filename.endswith("\\"):
                    folders.update([name] if name else [])
                elif name and (kind := stat.S_IFMT(member.external_attr >> 16)) in (0, stat.S_IFREG):
                    files[name] = member
                elif name:
                    left_out.append((plain(name), LINKS if kind == stat.S_IFLNK else DEVICES))
    except RemapError:
        raise
    except Exception as error:  # Python's reader raises many kinds; all mean the file is no usable archive
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DataError(
            f"cannot read {path} as a zip archive: {reason}",
            do="download or copy it again; if it is another kind of file, name the folder of the images",
        ) from error
    if any(member.flag_bits & _ENCRYPTED_FLAG for member in files.values()):
        raise DataError(f"{path} is encrypted", do="unpack it and name the folder")
    sizes = {name: member.file_size for name, member in files.items()}
    return Listing(
        tuple(sorted(files)),
        tuple(sorted(folders)),
        lambda name: _content(path, files[name]),
        sizes.__getitem__,
        left_out=tuple(left_out),
    )


class _Bounded(io.BufferedReader):
    """A file of which no piece is read that is larger than the list of all files may be."""

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file.detach())

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LIST_BYTES:
            raise zipfile.BadZipFile("its list of files is too large")
        return super().read(size)


def _name(member: zipfile.ZipInfo) -> str:
    """Return the name as it was written: Macs write UTF-8 without saying so, and some Windows programs backslashes."""
    name = member.filename
    if not member.flag_bits & _UTF8_FLAG:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/") if "/" not in name else name


def _content(path: Path, member: zipfile.ZipInfo) -> bytes:
    """Return the content of a member, by a file handle of its own: several threads read at once.

    Raises:
        OSError: It is too large, grows out of bounds, or is damaged.
    """
    size, packed = member.file_size, member.compress_size
    if size > MAX_BYTES or packed > MAX_BYTES or size > max(FREE_GROWTH, MOST_GROWTH * packed):
        raise OSError(errno.EFBIG, f"grows out of bounds: {packed:,} bytes that hold {size:,}")
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header.ljust(_LOCAL_HEADER.size, b"\0"))
        file.seek(name_bytes + extra_bytes, io.SEEK_CUR)
        content = file.read(packed)
    try:
        if member.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        elif member.compress_type != zipfile.ZIP_STORED:
            raise OSError(errno.ENOTSUP, "compressed by a method other than deflate: unpack the zip")
    except zlib.error as error:
        raise OSError(errno.EIO, "damaged in the zip") from error
    if signature != b"PK\3\4" or len(content) != size or zlib.crc32(content) != member.CRC:
        raise OSError(errno.EIO, "damaged in the zip")
    return content
