"""A zip is the folder it was made from, image for image; nothing of it is ever written, or read without a bound."""

import contextlib
import io
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from remap.data import file_listing, zip_listing
from remap.data.sources import open_data, open_unlabeled
from remap.errors import DataError

Make = Callable[..., Path]


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), grey).save(buffer, format="PNG")
    return buffer.getvalue()


FILES = {
    f"photos/{part}/{name}/{i}.png": png(50 * i + ord(name) + len(part))
    for part in ("train", "val")
    for name in "ab"
    for i in range(3)
}
JUNK = {"photos/train/a/notes.txt": b"x", "__MACOSX/photos/train/a/._0.png": b"\0\5", "photos/.DS_Store": b"x"}


def pack(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_equals_its_folder(tree: Make, tmp_path: Path, compression: int) -> None:
    folder = open_data(str(tree(FILES | JUNK, "folder")), None, 0.2)
    path = pack(tmp_path / "x.zip", FILES | JUNK, compression)
    packed = open_data(str(path), None, 0.2)
    assert packed.fingerprint() == folder.fingerprint() and packed.skipped == folder.skipped
    for one, other in ((packed.train, folder.train), (packed.val, folder.val)):
        assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(other))]
    assert (len(packed.train), len(packed.val)) == (6, 6)


def test_empty_class_folders_and_names_of_macs_and_windows(tmp_path: Path) -> None:
    """Macs write UTF-8 without the flag that says so (bit 11 of APPNOTE 4.4.4); some Windows programs backslashes."""
    content = pack(
        tmp_path / "x.zip", {f"caf\u00e9/{i}.png": png(i) for i in range(3)} | {"a/1.png": png(7), "a/2.png": png(8)}
    )
    raw = bytearray(content.read_bytes())
    for magic, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = raw.find(magic)
        while start >= 0:
            raw[start + at + 1] &= 0xF7
            start = raw.find(magic, start + 4)
    content.write_bytes(raw)
    assert open_data(str(content), None, 0.3).classes == ("a", "caf\u00e9")
    windows = pack(tmp_path / "w.zip", {f"{name}\\{i}.png": png(9 * i) for name in "ab" for i in range(3)})
    assert open_data(str(windows), None, 0.3).classes == ("a", "b")
    with zipfile.ZipFile(windows, "a") as archive:
        archive.mkdir("c") if hasattr(archive, "mkdir") else archive.writestr("c/", b"")
    with pytest.raises(DataError, match="a class folder holds no images\n  given:   c"):
        open_data(str(windows), None, 0.3)


def test_a_hostile_zip_writes_nothing_and_reads_nothing_outside(tmp_path: Path) -> None:
    """Zip slip: absolute names, names with .., links."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    outside = {"../up.png": b"x", f"{tmp_path}/out/1.png": b"x", "a/../../up.png": b"x", "..\\up2.png": b"x"}
    path = pack(tmp_path / "x.zip", {"a/1.png": png(1), "b/1.png": png(2)} | outside)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("a/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(tmp_path / "secret.png"))
        device = zipfile.ZipInfo("a/device.png")
        device.external_attr = stat.S_IFCHR << 16
        archive.writestr(device, b"")
    before = sorted(tmp_path.rglob("*"))
    split, left_out = open_unlabeled(str(path))
    read = [split.read(i) for i in range(len(split))]
    assert b"secret" not in read and not any("link" in name or "device" in name for name in split.names)
    assert {("x.zip/a/link.png", "links in an archive"), ("x.zip/a/device.png", "devices and pipes")} < set(left_out)
    assert sorted(name for name in split.names if "out" not in name) == ["x.zip/a/1.png", "x.zip/b/1.png"]
    assert len(left_out) == 5 and sorted(tmp_path.rglob("*")) == before


def test_bombs_and_lies_are_unreadable_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MB of zeros shrink a thousandfold; a wrong size and changed bytes are found by length and CRC."""
    monkeypatch.setattr(zip_listing, "FREE_GROWTH", 2**20)
    path = pack(tmp_path / "x.zip", {"1.png": bytes(8_000_000), "2.png": png(2), "3.png": png(3)})
    split, _ = open_unlabeled(str(path))
    with pytest.raises(OSError, match="grows out of bounds"):
        split.read(0)
    assert split.read(1) == png(2)
    raw = bytearray(path.read_bytes())
    entry = raw.find(b"PK\1\2", raw.find(b"PK\1\2") + 4)
    raw[entry + 24] += 1  # the second member's size in the list of files
    third = raw.find(b"3.png") + 5
    raw[third + 2] ^= 0xFF
    path.write_bytes(raw)
    split, _ = open_unlabeled(str(path))
    for index in (1, 2):
        with pytest.raises(OSError, match="damaged in the zip"):
            split.read(index)


def test_lists_of_files_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "x.zip", {f"a/{i}.png": b"" for i in range(30)})
    monkeypatch.setattr(zip_listing, "_LIST_BYTES", 1000)
    with pytest.raises(DataError, match="its list of files is too large"):
        open_unlabeled(str(path))
    monkeypatch.setattr(zip_listing, "_LIST_BYTES", 10_000)
    monkeypatch.setattr(file_listing, "MOST_ENTRIES", 20)
    with pytest.raises(DataError, match="more than 20 files"):
        open_unlabeled(str(path))


OTHERS = {
    "a 7z archive": b"7z\xbc\xaf\x27\x1c" + bytes(60),
    "a rar archive": b"Rar!\x1a\x07\x01\x00" + bytes(60),
    "a zstd archive": b"\x28\xb5\x2f\xfd" + bytes(60),
    "a Parquet file": b"PAR1" + bytes(60),
}


@pytest.mark.parametrize(("kind", "content"), OTHERS.items())
def test_other_archives_are_named(kind: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    for read in (lambda word: open_data(word, None, 0.2), open_unlabeled):
        with pytest.raises(DataError, match=f"{kind} is not read"):
            read(str(tmp_path / "x.bin"))


@pytest.mark.parametrize("cut", [10, 200, -10, -30])
def test_what_is_not_a_complete_zip_is_the_users_error(cut: int, tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", FILES)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"cannot read .* as a zip archive"):
        open_data(str(path), None, 0.2)


def test_encrypted_zips_and_addresses_say_what_to_do(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", {"a/1.png": png(1), "b/1.png": png(2)}, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"PK\1\2") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="is encrypted"):
        open_data(str(path), None, 0.2)
    with pytest.raises(DataError, match="data is not downloaded"):
        open_data("https://example.org/photos.zip", None, 0.2)


def test_changed_zips_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    """400 copies with one to four changed bytes, half of them cut as well."""
    random, whole = np.random.default_rng(0), pack(tmp_path / "x.zip", FILES | JUNK).read_bytes()
    ends = set()
    for number in range(400):
        raw = bytearray(whole if number % 2 else whole[: random.integers(4, len(whole))])
        for at in random.integers(4, len(raw), random.integers(1, 5)) if len(raw) > 4 else ():
            raw[at] = random.integers(256)
        (tmp_path / "y.zip").write_bytes(raw)
        try:
            split, _ = open_unlabeled(str(tmp_path / "y.zip"))
            for index in range(len(split)):
                with contextlib.suppress(OSError):
                    split.read(index)
            ends.add("read")
        except DataError:
            ends.add("refused")
    assert ends == {"read", "refused"}
