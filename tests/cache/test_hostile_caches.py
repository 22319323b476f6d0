"""A cache that somebody else has filled, or that several users share: nothing outside of it is written, nothing hangs.

What is expected stands in SECURITY.md; the traps are those of a folder that another user may write.
"""

import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from remap.cache.cache_folders import CacheKey
from remap.cache.cache_listing import chosen_caches, clear, list_caches
from remap.cache.output_format import OutputFormat
from remap.cache.output_store import OutputStore, row_digests
from remap.errors import RunError
from remap.io import own_files

KEY = CacheKey("vit", "5e1f", {"size": 224}, {"size": 224}, "fp32", {}).to_dict()
FORMATS = {"logits": OutputFormat((3,))}
DIGESTS = row_digests([bytes([number]) for number in range(4)])


def use(root: Path, more: int = 0) -> OutputStore:
    """Read what is there, and write what is not."""
    with OutputStore.open(root, KEY, FORMATS) as store:
        todo = store.missing(DIGESTS[: 2 + more])
        store.append(DIGESTS[todo], {"logits": torch.ones(len(todo), 3)})
    return store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache of two rows; one byte of the first is damaged, so that reading it wants to erase it."""
    use(tmp_path / "root")
    data = next((tmp_path / "root").glob("*/items/*/seg-0/data.bin"))
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    return tmp_path / "root"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder outside of the cache, with files under the names that a cache has."""
    folder = tmp_path / "victim"
    (folder / "seg-0").mkdir(parents=True)
    for name in ("key.json", "item.json", "data.bin", "rows.bin", "seg-0/data.bin", "seg-0/rows.bin"):
        (folder / name).write_bytes(os.urandom(4096))
    return folder


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """A FIFO that is waited for, and gigabytes that are read, end the test."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


PARTS = {
    "the folder of a key": ("*", ""),
    "the folder of outputs": ("*/items", ""),
    "the folder of an output": ("*/items/*", ""),
    "a segment": ("*/items/*/seg-0", "seg-0"),
    "a key": ("*/key.json", "key.json"),
    "rows": ("*/items/*/seg-0/rows.bin", "rows.bin"),
    "records": ("*/items/*/seg-0/data.bin", "data.bin"),
}


@pytest.mark.guarantee(14)
@pytest.mark.parametrize(("pattern", "target"), PARTS.values(), ids=list(PARTS))
def test_no_link_is_followed(
    pattern: str, target: str, root: Path, victim: Path, tmp_path: Path, figure: Callable[..., None]
) -> None:
    path = next(root.glob(pattern))
    path.rename(tmp_path / "moved")
    path.symlink_to(victim / target)
    before = contents(victim)
    with pytest.raises(RunError, match="it is a link") as caught:
        use(root, more=2)
    assert "REMAP_CACHE" in str(caught.value)
    clear(list_caches(root))
    assert contents(victim) == before
    figure("links in a teacher cache that were followed, of all tried", 0, 1)


@pytest.mark.guarantee(14)
@pytest.mark.parametrize("name", ["rows.bin", "data.bin"])
def test_a_second_name_of_a_file_elsewhere_is_not_written(
    name: str, root: Path, victim: Path, figure: Callable[..., None]
) -> None:
    """A hard link to a file of the same size: the damaged record's row would be erased in it."""
    path = next(root.glob(f"*/items/*/seg-0/{name}"))
    (victim / name).write_bytes(path.read_bytes())
    path.unlink()
    path.hardlink_to(victim / name)
    before = contents(victim)
    use(root, more=2)
    assert contents(victim) == before
    figure("links in a teacher cache that were followed, of all tried", 0, 1)


@pytest.mark.parametrize("pattern", ["*/key.json", "*/items/*/seg-0/rows.bin", "*/items/*/seg-0/data.bin"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["FIFO", "folder"])
def test_what_is_not_a_file_is_refused_at_once(pattern: str, make: Callable[[Path], None], root: Path) -> None:
    path = next(root.glob(pattern))
    path.unlink()
    make(path)
    with pytest.raises(RunError, match="it is a FIFO, not a file|Is a directory"):
        use(root)
    list_caches(root)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["FIFO", "device"])
def test_a_listing_does_not_wait(make: Callable[[Path], None], root: Path) -> None:
    path = next(root.glob("*/items/*/item.json"))
    path.unlink()
    make(path)
    (cache,) = chosen_caches(root, everything=True)
    assert cache.outputs == () and len(clear([cache]).removed) == 1 and list_caches(root) == []


def test_rows_without_records_and_files_of_holes_are_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB of rows for two records: as a file of holes it is refused, as a whole file only two rows are read."""
    path = next(root.glob("*/items/*/seg-0/rows.bin"))
    os.truncate(path, 2**34)
    with pytest.raises(RunError, match="it is mostly holes"):
        use(root)
    monkeypatch.setattr(own_files, "require_stored", lambda descriptor: None)
    assert use(root).damaged == 1  # and not out of memory


def test_files_of_other_users_are_not_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # whose own files everybody may use
        os.chown(next(root.glob("*/items/*/seg-0/rows.bin")), 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(RunError, match="it belongs to another user"):
        use(root)


def test_drafts_behind_a_link_are_not_deleted(root: Path, victim: Path) -> None:
    """Drafts of dead processes are; those below a link are somebody's folders."""
    (items,) = root.glob("*/items")
    for folder in (victim, items):
        (folder / ".draft-old").mkdir()
        os.utime(folder / ".draft-old", (0, 0))
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "items").symlink_to(victim)
    use(root)
    assert (victim / ".draft-old").is_dir() and not (items / ".draft-old").exists()


def test_new_folders_are_for_this_user_only(tmp_path: Path) -> None:
    earlier = os.umask(0)
    try:
        use(tmp_path / "a" / "root")
    finally:
        os.umask(earlier)
    made = [tmp_path / "a", *(tmp_path / "a").rglob("*")]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made}
    assert {modes[path.name] for path in made if path.is_dir()} == {0o700} and modes["rows.bin"] == 0o600
    assert np.array_equal(use(tmp_path / "a" / "root").missing(DIGESTS[:2]), [])
