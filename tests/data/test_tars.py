"""A tar is the folder it was made from, image for image, and nothing of it is ever written."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from remap.data import tar_listing
from remap.data.class_folders import ClassFolders
from remap.data.sources import open_data
from remap.data.splits import ImageData
from remap.errors import DataError

Make = Callable[..., Path]


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), grey).save(buffer, format="PNG")
    return buffer.getvalue()


FILES = {
    f"{part}/{name}/{i}.png": 10 * i + len(part) + ord(name)
    for part in ("train", "val", "test")
    for name in "ab"
    for i in range(3)
}
JUNK = {"train/a/notes.txt": b"x", "README": b"x", "train/.DS_Store": b"x"}


def contents(data: ImageData) -> list[tuple[str, int, bytes]]:
    splits = [split for split in (data.train, data.val, data.test) if split is not None]
    return [(s.names[i], int(s.labels[i]), s.read(i)) for s in splits for i in range(len(s))]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("prefix", ["", "./", "/"])
def test_a_tar_equals_its_folder(tree: Make, tar: Make, mode: str, prefix: str) -> None:
    files = FILES | JUNK
    folder = open_data(str(tree(files)), None, 0.2)
    packed = open_data(str(tar({prefix + path: files[path] for path in reversed(files)}, mode=mode)), None, 0.2)
    assert contents(packed) == contents(folder) and len(contents(folder)) == 18
    assert packed.fingerprint() == folder.fingerprint() and packed.classes == folder.classes
    assert packed.skipped == folder.skipped


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_with_long_names(tree: Make, tmp_path: Path, kind: int) -> None:
    files = {f"{name}/{'n' * 90}{i}.png": i for name in ("a" * 50, "b" * 50) for i in range(4)}
    root = tree(files)
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as archive:
        archive.add(root, ".")
    assert contents(open_data(str(tmp_path / "x.tar"), None, 0.5)) == contents(open_data(str(root), None, 0.5))


def test_an_empty_class_folder_in_a_tar_is_refused_too(tree: Make, tmp_path: Path) -> None:
    root = tree({"a/1.png": 1, "a/2.png": 1, "b/1.png": 1, "b/2.png": 1, "c": None})
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(root, ".")
    with pytest.raises(DataError, match="a class folder holds no images"):
        open_data(str(tmp_path / "x.tar"), None, 0.5)


def test_a_hostile_tar_writes_nothing_and_reads_nothing_outside(tar: Make, tmp_path: Path) -> None:
    """Tar slip: names with .., absolute names, links that point out, devices."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    path = tar({"a/1.png": 1, "a/2.png": 2, "b/1.png": 1, "b/2.png": 2})
    outside = f"{tmp_path}/escaped/c/1.png"
    with tarfile.open(path, "a") as archive:
        for name in ("../a/up.png", "a/../../up.png", outside):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"a/link{kind.decode()}.png")
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    data = open_data(str(path), str(tar({"a/1.png": 1, "b/1.png": 1}, "val.tar")), 0.5)
    read = contents(data)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "val.tar"])
    assert not any(content == b"secret" or ".." in name or "link" in name for name, _, content in read)
    reasons = Counter(reason for name, reason in data.skipped if "link" in name)
    assert reasons == {"links in an archive": 2, "devices and pipes": 2}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_hard_link_is_the_file_that_it_names(tree: Make, tmp_path: Path, mode: str) -> None:
    """As GNU tar writes the second name of a file."""
    root = tree({"a/1.png": 1, "a/2.png": 2, "b/1.png": 3, "b/2.png": 4})
    os.link(root / "b" / "2.png", root / "b" / "3.png")
    with tarfile.open(tmp_path / "x.tar", mode) as archive:
        archive.add(root, ".")
        assert any(member.islnk() for member in archive.getmembers())
    files, skipped = ClassFolders().images(str(tmp_path / "x.tar"))
    content = {name: listing.read(name) for name, listing in files}
    assert content["b/3.png"] == content["b/2.png"] and len(content) == 5 and not skipped


def damaged(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(255 - value for value in data[len(data) // 2 :])
    path.write_bytes(data)
    return path


BROKEN = {
    "text": lambda tar, folder: _write(folder / "x.tar", b"this is no archive" * 100),
    "empty": lambda tar, folder: _write(folder / "x.tar", b""),
    "an image": lambda tar, folder: _write(folder / "x.tar", b"\x89PNG\r\n\x1a\n" + bytes(600)),
    "cut": lambda tar, folder: _write(folder / "y.tar", tar(FILES).read_bytes()[:2000]),
    "cut gz": lambda tar, folder: _write(folder / "y.tar", tar(FILES, mode="w:gz").read_bytes()[:-200]),
    "damaged gz": lambda tar, folder: damaged(tar(FILES, mode="w:gz")),
    "damaged xz": lambda tar, folder: damaged(tar(FILES, mode="w:xz")),
    "damaged bz2": lambda tar, folder: damaged(tar(FILES, mode="w:bz2")),
}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("make", BROKEN.values(), ids=list(BROKEN))
def test_what_is_no_whole_tar_is_the_users_error(make: Callable, tar: Make, tmp_path: Path) -> None:
    path = make(tar, tmp_path)
    with pytest.raises(DataError) as caught:
        open_data(str(path), None, 0.2)
    text = str(caught.value)
    assert text.startswith(f"cannot read {path} as a tar archive: ") and len(text.splitlines()) in (2, 3)


def test_a_file_that_is_not_an_archive_says_what_is_read(tree: Make) -> None:
    root = tree({"a/1.png": 1, "notes.pdf": b"text" * 200})
    with pytest.raises(DataError, match=r"this is an image(.|\n)*given: .*1\.png\n  allowed: a folder(.|\n)*do: "):
        open_data(str(root / "a" / "1.png"), None, 0.2)
    with pytest.raises(DataError, match=r"as a tar archive(.|\n)*another kind of file, name the folder"):
        open_data(str(root / "notes.pdf"), None, 0.2)


def test_the_first_of_two_members_of_one_name_is_replaced(tar: Make) -> None:
    """As unpacking would: the later member wins (GNU tar manual, section 4.2.2)."""
    path = tar({"a/1.png": 1, "a/2.png": 2, "b/1.png": 1, "b/2.png": 2})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("a/1.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"new"))
    found = [content for name, _, content in contents(open_data(str(path), None, 0.5)) if name == "a/1.png"]
    assert found == [b"new"]


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_a_compressed_tar_holds_its_images_only_and_not_without_bound(
    tar: Make, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Four images fit where the junk beside them would not; one byte less and they do not."""
    images = {f"{name}/{i}.png": png(i) for name in "ab" for i in range(2)}
    total = sum(map(len, images.values()))
    path = tar(images | {"a/film.mov": bytes(2 * total)}, mode=mode)
    monkeypatch.setattr(tar_listing, "HELD_BYTES", total)
    data = open_data(str(path), None, 0.5)
    assert sorted(name for name, _, _ in contents(data)) == sorted(images)
    assert data.skipped == (("a/film.mov", ".mov files are not read"),)
    monkeypatch.setattr(tar_listing, "HELD_BYTES", total - 1)
    with pytest.raises(DataError, match="decompress the archive"):
        open_data(str(path), None, 0.5)


def test_compressed_shards_share_one_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two holds half of what fits, and then one byte more than half of what fits is too much."""
    total = 0
    for shard in "ab":
        with tarfile.open(tmp_path / f"{shard}.tar.gz", "w:gz") as archive:
            for label in range(2):
                for name, content in ((f"{shard}{label}.png", png(label)), (f"{shard}{label}.cls", b"%d" % label)):
                    member = tarfile.TarInfo(name)
                    member.size, total = len(content), total + len(content)
                    archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(tar_listing, "HELD_BYTES", total)
    data = open_data(f"webdataset:{tmp_path}", None, 0.5)
    assert len(data.train) + len(data.val) == 4
    monkeypatch.setattr(tar_listing, "HELD_BYTES", total - 1)
    with pytest.raises(DataError, match=r"b.tar.gz is compressed and holds more images than fit in memory"):
        open_data(f"webdataset:{tmp_path}", None, 0.5)
