"""What lies in a folder or a tar, and what reads it; nothing is extracted."""

import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from remap.data.images import SUFFIXES
from remap.errors import DataError

# A compressed archive has no places to jump to, so its images are held in memory, up to this many bytes.
HELD_BYTES = 2 * 2**30


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
    paths: list[str] = []
    folders: list[str] = []
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not _links_up(folder, name)]
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        paths += [prefix + name for name in names]
        folders += [prefix + name for name in below]
    return Listing(tuple(sorted(paths)), tuple(sorted(folders)), lambda p: (root / p).read_bytes())


def _links_up(folder: str, name: str) -> bool:
    """Whether a sub-folder is a link to a folder it lies in, which would be walked for ever."""
    path = os.path.join(folder, name)
    above = os.path.join(os.path.realpath(folder), "")
    return os.path.islink(path) and above.startswith(os.path.join(os.path.realpath(path), ""))


def list_tar(path: Path) -> Listing:
    """Members are read where they lie; nothing is extracted, and links and devices are ignored.

    Raises:
        DataError: It is no whole tar, or a compressed one with too many images to hold.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            everything = archive.getmembers()
            members = {_clean(m.name): m for m in everything if m.isreg()}
            folders = tuple(sorted(filter(None, (_clean(m.name) for m in everything if m.isdir()))))
            if path.stat().st_size and not _is_plain_tar(path):
                held = _held(path, archive, members)
                return Listing(tuple(sorted(members)), folders, lambda p: held[p])
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise DataError(
            f"cannot read {path} as a tar archive: {reason}", allowed="a folder of class folders, or a tar of one"
        ) from error
    places = {name: (member.offset_data, member.size) for name, member in members.items()}

    def read(name: str) -> bytes:
        offset, size = places[name]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return Listing(tuple(sorted(places)), folders, read)


def _held(path: Path, archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, bytes]:
    """The images of a compressed archive; other members are left where they are."""
    images = {name: member for name, member in members.items() if name.lower().endswith(SUFFIXES)}
    total = sum(member.size for member in images.values())
    if total > HELD_BYTES:
        raise DataError(
            f"{path} is compressed and holds more images than fit in memory",
            given=f"{total / 2**30:.1f} GiB",
            allowed=f"{HELD_BYTES / 2**30:.1f} GiB; a plain tar or a folder may have any size",
            do="decompress the archive (gunzip, unxz, bunzip2), or unpack it and name the folder",
        )
    return {name: archive.extractfile(member).read() for name, member in images.items()}


def _is_plain_tar(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(257)
        return file.read(5) == b"ustar"


def _clean(name: str) -> str:
    return "/".join(part for part in PurePosixPath(name).parts if part not in (".", "/"))
