"""Teacher outputs on disk: what goes in comes out, whatever happens to the process, the disk or the files."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from remap.cache import cache_folders, digest_index, record_folder
from remap.cache.cache_folders import CacheKey, cache_id, cache_root, open_folder
from remap.cache.cache_listing import chosen_caches, clear, list_caches
from remap.cache.output_format import OutputFormat
from remap.cache.output_store import OutputStore, bytes_for, row_digests
from remap.cache.record_folder import RecordFolder
from remap.errors import DataError, RunError

KEY = CacheKey("vit", "5e1f", {"size": 224}, {"size": 224, "augment": "none"}, "fp32", {"torch": "2.15"})
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def digests(count: int, first: int = 0) -> np.ndarray:
    """Digests (count, 16) of images that only their number decides."""
    return row_digests([number.to_bytes(4, "little") for number in range(first, first + count)])


def content(digest: bytes, size: int) -> bytes:
    """A record that only its digest decides."""
    return (digest * (size // 16 + 1))[:size]


def record_rows(some: np.ndarray, size: int) -> np.ndarray:
    return np.frombuffer(b"".join(content(bytes(digest), size) for digest in some), np.uint8).reshape(len(some), size)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., OutputStore]]:
    opened: list[OutputStore] = []

    def make(key: CacheKey = KEY, **items: OutputFormat) -> OutputStore:
        store = OutputStore.open(tmp_path / "root", key.to_dict(), items or {"logits": OutputFormat((3,))})
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 0, 4), (1, 3, 3, 3)])
def test_rows_come_back_as_they_were_rounded(
    open_store: Callable[..., OutputStore], dtype: str, shape: tuple[int, ...]
) -> None:
    """Source: torch's own conversion."""
    names, values = digests(11), torch.randn(11, *shape)
    with open_store(item=OutputFormat(shape, dtype)) as store:
        assert store.missing(names).tolist() == list(range(11))
        store.append(names[:4], {"item": values[:4]})
        store.append(names[4:], {"item": values[4:]})
        here = store.rows(names)["item"]
    order = [5, 0, 10, 10, 3]
    with open_store(item=OutputFormat(shape, dtype)) as store:
        assert not len(store.missing(names))
        later = store.rows(names[order])["item"]
    assert here.dtype == later.dtype == TORCH[dtype]
    assert torch.equal(here, values.to(TORCH[dtype])) and torch.equal(later, values[order].to(TORCH[dtype]))


def test_numbers_at_the_edge_keep_their_bits(open_store: Callable[..., OutputStore]) -> None:
    edge = torch.tensor([[0.0, -0.0, 1e-45, 3.4028234e38, -math.inf, math.nan]])
    with open_store(item=OutputFormat((6,))) as store:
        store.append(digests(1), {"item": edge})
        assert torch.equal(store.rows(digests(1))["item"].view(torch.int32), edge.view(torch.int32))


def test_files_are_what_the_docstring_says(open_store: Callable[..., OutputStore]) -> None:
    """Source: numpy's bytes, and zlib over digest and record in one piece."""
    names, values = digests(3), torch.randn(3, 5)
    with open_store(item=OutputFormat((5,), "fp16")) as store:
        store.append(names, {"item": values})
        assert store.nbytes == bytes_for({"item": OutputFormat((5,), "fp16")}, 3) == 3 * (5 * 2 + 20)
    (segment,) = store.folder.glob("items/*/seg-0")
    records = [row.tobytes() for row in values.numpy().astype(np.float16)]
    rows = [n + zlib.crc32(n + r).to_bytes(4, "little") for n, r in zip(map(bytes, names), records, strict=True)]
    assert (segment / "data.bin").read_bytes() == b"".join(records)
    assert (segment / "rows.bin").read_bytes() == b"".join(rows)
    assert json.loads((store.folder / "key.json").read_text())["key"] == KEY.to_dict()


def test_an_item_is_added_to_rows_that_have_others(open_store: Callable[..., OutputStore]) -> None:
    names, logits, pooled = digests(6), torch.randn(6, 3), torch.randn(6, 2)
    with open_store(logits=OutputFormat((3,))) as store:
        store.append(names[:4], {"logits": logits[:4]})
        file = next(store.folder.glob("items/logits*/seg-0/data.bin"))
    before = file.read_bytes()
    with open_store(logits=OutputFormat((3,)), pooled=OutputFormat((2,))) as store:
        assert store.missing(names[:4]).tolist() == [0, 1, 2, 3]
        store.append(names, {"logits": logits + 1, "pooled": pooled})  # what is there already stays
        found = store.rows(names)
    assert torch.equal(found["pooled"], pooled) and file.read_bytes()[: len(before)] == before
    assert torch.equal(found["logits"], torch.cat([logits[:4], logits[4:] + 1]))


def test_a_row_is_stored_once(open_store: Callable[..., OutputStore]) -> None:
    names = digests(2)
    with open_store() as store:
        store.append(names[[0, 1, 0]], {"logits": torch.tensor([[1.0] * 3, [2.0] * 3, [1.0] * 3])})
        store.append(names[1:], {"logits": torch.full((1, 3), 9.0)})
        store.append(names[:0], {"logits": torch.zeros(0, 3)})
        assert store.nbytes == 2 * (12 + 20)
        assert store.rows(names[[1, 0, 1]])["logits"][:, 0].tolist() == [2, 1, 2]


def test_changes_are_noticed(open_store: Callable[..., OutputStore]) -> None:
    """A changed image, another draw and a moved border between the two have other digests; order is of no account."""
    some = [(b"image", b"draw"), (b"imagf", b"draw"), (b"image", b"drax"), (b"imaged", b"raw"), (b"imagedraw", b"")]
    files, draws = [file for file, _ in some], [draw for _, draw in some]
    names = row_digests(files, draws)
    assert len({bytes(name) for name in names}) == 5 and names.shape == (5, 16)
    with open_store() as store:
        store.append(names[:1], {"logits": torch.ones(1, 3)})
        assert store.missing(names[::-1]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "vit2"},
        {"state": "5e1e"},
        {"preprocessing": {"size": 225}},
        {"view": {"size": 224, "augment": "shift"}},
        {"precision": "bf16"},
        {"versions": {"torch": "2.16"}},
    ],
)
def test_another_key_is_another_folder(open_store: Callable[..., OutputStore], change: dict) -> None:
    with open_store() as store, open_store(replace(KEY, **change)) as other:
        store.append(digests(2), {"logits": torch.ones(2, 3)})
        store.flush()
        other.refresh()
        assert other.folder != store.folder and len(other.missing(digests(2))) == 2


@pytest.mark.parametrize("other", [OutputFormat((3,), "fp16"), OutputFormat((3,), top_k=1), OutputFormat((4,))])
def test_another_way_of_keeping_is_another_item(open_store: Callable[..., OutputStore], other: OutputFormat) -> None:
    with open_store() as store:
        store.append(digests(2), {"logits": torch.ones(2, 3)})
    with open_store(logits=other) as store:
        assert len(store.missing(digests(2))) == 2


def test_names_of_items_are_safe_and_told_apart(open_store: Callable[..., OutputStore]) -> None:
    names = ["../../up", "a/b", "a b", "map11 8x8 bilinear class+patches heads=mean", "x" * 300]
    items = {name: OutputFormat((1,)) for name in names}
    values = {name: torch.full((1, 1), float(number)) for number, name in enumerate(names)}
    with open_store(**items) as store:
        store.append(digests(1), values)
        assert {name: row.item() for name, row in store.rows(digests(1)).items()} == dict(
            zip(names, range(5), strict=True)
        )
        folders = [path for path in (store.folder / "items").iterdir() if path.is_dir()]
        assert len(folders) == 5 and all(len(path.name) < 60 and path.name.isascii() for path in folders)
    assert {item.name for item in list_caches(store.folder.parent)[0].outputs} == set(names)


def test_a_number_too_large_for_its_dtype_is_refused(open_store: Callable[..., OutputStore]) -> None:
    """The largest float16 is 65504."""
    with open_store(tokens=OutputFormat((2,), "fp16")) as store:
        store.append(digests(1), {"tokens": torch.tensor([[65504.0, -math.inf]])})
        with pytest.raises(DataError, match=r"tokens do not fit[\s\S]*7e\+04[\s\S]*cache_dtype"):
            store.append(digests(1, 1), {"tokens": torch.tensor([[7e4, 0.0]])})
        assert store.missing(digests(2)).tolist() == [1]


def test_wrong_calls_are_refused(open_store: Callable[..., OutputStore]) -> None:
    with open_store() as store:
        for names, values in (
            (digests(2), {"pooled": torch.ones(2, 3)}),
            (digests(2), {"logits": torch.ones(2, 4)}),
            (digests(2), {"logits": torch.ones(1, 3)}),
        ):
            with pytest.raises(ValueError):
                store.append(names, values)
        assert store.nbytes == 0
        with pytest.raises(RunError, match="2 of 2 rows are not in the teacher cache"):
            store.rows(digests(2))


# Top-k logits.

PROBABILITIES = torch.tensor([[0.06, 0.5, 0.04, 0.3, 0.1], [0.9, 0.01, 0.02, 0.03, 0.04]], dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("fp16", 3e-3), ("bf16", 3e-3)])
def test_top_k_keeps_the_largest_and_shares_the_rest(
    open_store: Callable[..., OutputStore], dtype: str, tolerance: float
) -> None:
    """Closed form: two of five classes; what the other three have (0.2; 0.06) is shared by them.

    Float16 has 11 bits: a logarithm below 4 is off by 2^-10 at most, and so is its probability's ratio.
    """
    shared = torch.tensor([[0.2 / 3, 0.5, 0.2 / 3, 0.3, 0.2 / 3], [0.9, 0.02, 0.02, 0.02, 0.04]])
    with open_store(logits=OutputFormat((5,), dtype, top_k=2)) as store:
        store.append(digests(2), {"logits": (PROBABILITIES.log() + 3).float()})  # a shift changes no probability
        assert store.nbytes == 2 * (2 * 4 + 4 + 2 * (4 if dtype == "fp32" else 2) + 20)
        assert store.mass(digests(2)) == pytest.approx((0.8 + 0.94) / 2, abs=1e-6)
        assert store.mass(digests(1)) == pytest.approx(0.8, abs=1e-6)
    with open_store(logits=OutputFormat((5,), dtype, top_k=2)) as store:
        rows = store.rows(digests(2))["logits"]
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.exp(), shared, rtol=tolerance, atol=0)


def test_top_k_of_a_certain_teacher_stays_finite(open_store: Callable[..., OutputStore]) -> None:
    """One class at probability 1 - 3e-40: the others' logarithm is kept, so none becomes infinite."""
    with open_store(logits=OutputFormat((4,), top_k=1)) as store:
        store.append(digests(1), {"logits": torch.tensor([[0.0, -92.0, -92.0, -92.0]])})
        rows = store.rows(digests(1))["logits"]
        assert store.mass(digests(1)) == 1.0
    torch.testing.assert_close(rows, torch.tensor([[0.0, -92.0, -92.0, -92.0]]), rtol=1e-6, atol=1e-6)


def test_top_k_must_leave_something_out() -> None:
    with pytest.raises(DataError, match=r"nothing to leave out[\s\S]*1 to 9"):
        OutputFormat((10,), top_k=10)
    with pytest.raises(ValueError, match="does not fit rows"):
        OutputFormat((10, 2), top_k=3)


# Killed, cut, damaged, refused.

BUILD = """
import sys, time
import numpy as np
from pathlib import Path
from remap.cache import record_folder
from remap.cache.record_folder import RecordFolder

record_folder.FLUSH_SECONDS = 0.002
folder, size, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
names = np.asarray([list(bytes.fromhex(word)) for word in sys.stdin.read().split()], np.uint8)
records = RecordFolder(folder, size)
print("start", len(records), flush=True)
for at in range(0, len(names), 8):
    rows = names[at : at + 8]
    new = np.flatnonzero(records.find(rows) < 0)
    if len(new):
        time.sleep(pause)
        values = b"".join((bytes(rows[i]) * (size // 16 + 1))[:size] for i in new)
        records.append(rows[new], np.frombuffer(values, np.uint8).reshape(-1, size))
        if records._writer.is_flushed:
            print("kept", len(records), flush=True)
records.close()
print("end", len(records), records.damaged, flush=True)
"""


def building(folder: Path, names: np.ndarray, size: int, pause: float = 0.001) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder), str(size), str(pause)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(" ".join(bytes(name).hex() for name in names))
    process.stdin.close()
    return process


def require_all(folder: Path, names: np.ndarray, size: int) -> None:
    records = RecordFolder(folder, size)
    places = records.find(names)
    assert (places >= 0).all() and records.damaged == 0
    assert (records.read(places) == record_rows(names, size)).all()


@pytest.mark.slow
def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Five times SIGKILL at random moments: what was said to be kept is there, right, and is not computed again."""
    names, size, said, draws = digests(4000), 3001, 0, np.random.default_rng(0)
    for _ in range(5):
        process = building(tmp_path, names, size)
        start = int(process.stdout.readline().split()[1])
        assert start >= said
        for _ in range(draws.integers(1, 25)):
            word, count = process.stdout.readline().split()[:2]
            assert word == "kept"
            said = int(count)
        time.sleep(draws.uniform(0, 0.004))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().splitlines()
        said = max([said, *(int(line.split()[1]) for line in rest if line.startswith("kept ") and line.split()[1:])])
        assert process.wait() == -signal.SIGKILL
        require_all(tmp_path, names[:said], size)
    assert 0 < said < len(names)
    process = building(tmp_path, names, size, pause=0)
    lines = process.stdout.read().splitlines()
    assert process.wait() == 0 and int(lines[0].split()[1]) >= said and lines[-1] == f"end {len(names)} 0"
    require_all(tmp_path, names, size)
    assert len(list(tmp_path.iterdir())) <= 6, "a segment for each process that wrote"


@pytest.mark.slow
def test_a_killed_store_goes_on(tmp_path: Path, open_store: Callable[..., OutputStore]) -> None:
    code = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from remap.cache.output_format import OutputFormat\n"
        "from remap.cache.output_store import OutputStore, row_digests\n"
        "names = row_digests([number.to_bytes(4, 'little') for number in range(40)])\n"
        f"items = {{'logits': OutputFormat((3,)), 'pooled': OutputFormat((2,), 'bf16')}}\n"
        f"store = OutputStore.open(Path({str(tmp_path / 'root')!r}), {KEY.to_dict()!r}, items)\n"
        "value = lambda first, last, width: torch.arange(first, last)[:, None].repeat(1, width).float()\n"
        "store.append(names[:20], {'logits': value(0, 20, 3), 'pooled': value(0, 20, 2)})\n"
        "store.flush()\n"
        "store.append(names[20:30], {'logits': value(20, 30, 3), 'pooled': value(20, 30, 2)})\n"
        "store._segments['logits'].flush()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    names, values = digests(40), torch.arange(40.0)[:, None]
    with open_store(logits=OutputFormat((3,)), pooled=OutputFormat((2,), "bf16")) as store:
        missing = store.missing(names)
        assert missing.tolist() == list(range(20, 40))  # of ten images only one of two items was on the disk
        new = values[missing]
        store.append(names[missing], {"logits": new.repeat(1, 3), "pooled": new.repeat(1, 2)})
        found = store.rows(names)
    assert torch.equal(found["logits"], values.repeat(1, 3)) and torch.equal(
        found["pooled"].float(), values.repeat(1, 2)
    )
    assert len(list(store.folder.glob("items/*/seg-*"))) == 4  # of two outputs, one of each process


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    names, size = digests(1200), 100
    first, second = building(tmp_path, names[:800], size, 0.02), building(tmp_path, names[400:], size, 0.02)
    assert first.stdout.readline()
    first.send_signal(signal.SIGSTOP)
    assert second.stdout.readline()  # both are at work
    first.send_signal(signal.SIGCONT)
    assert first.stdout.read() and second.stdout.read() and first.wait() == second.wait() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seg-0", "seg-1"]
    require_all(tmp_path, names, size)


def test_writers_see_each_other_after_flush_and_refresh(open_store: Callable[..., OutputStore]) -> None:
    one, two = open_store(), open_store()
    one.append(digests(3), {"logits": torch.ones(3, 3)})
    two.append(digests(3, 3), {"logits": torch.full((3, 3), 2.0)})
    two.refresh()
    assert len(two.missing(digests(6))) == 3
    one.flush(), two.flush()
    one.refresh(), two.refresh()
    for store in (one, two):
        assert store.rows(digests(6)[::-1])["logits"][:, 0].tolist() == [2, 2, 2, 1, 1, 1]


def test_each_writer_has_a_segment(tmp_path: Path) -> None:
    """Also one that comes later: nothing is ever written into the segment of another process."""
    names, size = digests(9), 50
    one = RecordFolder(tmp_path, size)
    one.append(names[:2], record_rows(names[:2], size))
    one.flush()
    two = RecordFolder(tmp_path, size)
    two.append(names[2:4], record_rows(names[2:4], size))
    one.append(names[4:7], record_rows(names[4:7], size))
    one.close(), two.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seg-0", "seg-1"]
    require_all(tmp_path, names[:7], size)
    two.refresh()
    two.append(names[7:], record_rows(names[7:], size))
    two.close()
    require_all(tmp_path, names, size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seg-0", "seg-1", "seg-2"]


@pytest.mark.parametrize("name", ["data.bin", "rows.bin"])
@pytest.mark.parametrize("cut", [1, 20, 33, 10_000])
def test_cut_files_keep_their_whole_records(tmp_path: Path, name: str, cut: int) -> None:
    names, size = digests(10), 33
    records = RecordFolder(tmp_path, size)
    records.append(names, record_rows(names, size))
    records.close()
    path = tmp_path / "seg-0" / name
    os.truncate(path, max(0, path.stat().st_size - cut))
    left = path.stat().st_size // (size if name == "data.bin" else 20)
    records = RecordFolder(tmp_path, size)
    assert (records.find(names) >= 0).tolist() == [index < left for index in range(10)]
    require_all(tmp_path, names[:left], size)
    new = digests(3, 50)
    records.append(new, record_rows(new, size))
    records.close()
    require_all(tmp_path, np.concatenate([names[:left], new]), size)


@pytest.mark.parametrize(
    ("name", "at", "counted"),
    [("data.bin", 2 * 33 + 32, 1), ("rows.bin", 2 * 20 + 17, 1), ("rows.bin", 2 * 20 + 3, 0)],
    ids=["record", "checksum", "digest"],
)
def test_a_flipped_bit_costs_that_record_alone(tmp_path: Path, name: str, at: int, counted: int) -> None:
    """Of a digest nothing fits any more: it is not found, so nothing is counted as damaged."""
    names, size = digests(6), 33
    records = RecordFolder(tmp_path, size)
    records.append(names, record_rows(names, size))
    records.close()
    path = tmp_path / "seg-0" / name
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    records = RecordFolder(tmp_path, size)
    twice = np.concatenate([names, names])
    assert (np.flatnonzero(records.find(twice) < 0) % 6).tolist() == [2, 2] and records.damaged == counted
    later = RecordFolder(tmp_path, size)
    assert later.find(names).tolist().count(-1) == 1 and later.damaged == 0  # known once and for all
    records.append(names[2:3], record_rows(names[2:3], size))
    assert (records.read(records.find(twice)) == record_rows(twice, size)).all()
    records.close()
    require_all(tmp_path, names, size)


def test_the_store_says_what_was_damaged(open_store: Callable[..., OutputStore]) -> None:
    with open_store() as store:
        store.append(digests(4), {"logits": torch.ones(4, 3)})
    path = next(store.folder.glob("items/*/seg-0/data.bin"))
    path.write_bytes(path.read_bytes()[:-12] + bytes(12))
    with open_store() as store:
        with pytest.raises(RunError, match="1 of 4 rows are not in the teacher cache, or damaged"):
            store.rows(digests(4))
        assert store.missing(digests(4)).tolist() == [3] and store.damaged == 1


@pytest.mark.parametrize("step", ["records", "rows", "fsync"])
def test_a_full_disk_ends_in_one_error_and_a_whole_store(
    open_store: Callable[..., OutputStore], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    names, values = digests(8), torch.randn(8, 3)
    store = open_store()
    store.append(names[:4], {"logits": values[:4]})
    store.flush()
    pwrite = os.pwrite

    def half(file: int, data: memoryview, offset: int) -> int:
        """Write a part, then refuse, as a full disk does."""
        if (step == "rows") == (len(data) % 20 == 0) and len(data) > 7:
            return pwrite(file, data[:7], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "records":
        monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(RunError, match=r"No space left[\s\S]*cache clear[\s\S]*teacher.cache=off"), store:
        if step == "rows":
            monkeypatch.setattr(record_folder, "FLUSH_SECONDS", math.inf)
        store.append(names[4:], {"logits": values[4:]})
        monkeypatch.setattr(os, *(("fsync", refuse) if step == "fsync" else ("pwrite", half)))
        store.flush()
    monkeypatch.undo()
    with open_store() as store:
        assert store.missing(names).tolist() == [4, 5, 6, 7]
        store.append(names[4:], {"logits": values[4:]})
        assert torch.equal(store.rows(names)["logits"], values)
    with open_store() as store:
        assert torch.equal(store.rows(names)["logits"], values)


def test_records_are_on_the_disk_before_their_rows_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut needs; SIGKILL alone would not show it."""
    calls: list[tuple[str, str]] = []
    pwrite, fsync = os.pwrite, os.fsync

    def name(file: int) -> str:
        paths = (tmp_path / "seg-0").iterdir()
        return next(path.name for path in paths if os.path.samestat(path.stat(), os.fstat(file)))

    monkeypatch.setattr(os, "pwrite", lambda *all: calls.append(("write", name(all[0]))) or pwrite(*all))
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(("sync", name(file))) or fsync(file))
    records = RecordFolder(tmp_path, 40)
    for some in (digests(2), digests(2, 2)):
        records.append(some, record_rows(some, 40))
    assert calls == [("write", "data.bin")] * 2
    records.close()
    assert calls[2:] == [("sync", "data.bin"), ("write", "rows.bin"), ("sync", "rows.bin")]


def test_a_refusal_of_the_system_is_met(tmp_path: Path) -> None:
    """A real limit instead of a full disk: no file may grow beyond 10,000 bytes."""
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
    process = subprocess.run(
        [sys.executable, "-c", limit + BUILD, str(tmp_path), "300", "0"],
        input=" ".join(bytes(name).hex() for name in digests(100)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1 and "remap.errors.RunError: cannot write" in process.stderr
    kept = len(RecordFolder(tmp_path, 300))
    assert kept == 32  # four times eight records of 300 bytes; a fifth eight would need 12,000
    require_all(tmp_path, digests(kept), 300)
    building(tmp_path, digests(100), 300, pause=0).wait()
    require_all(tmp_path, digests(100), 300)


def test_the_index_is_a_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of zeros and ones, many alike and many ending in zeros, against a dict."""
    monkeypatch.setattr(digest_index, "SORT_AT", 50)
    index, known, draws = digest_index.DigestIndex(), {}, np.random.default_rng(1)

    def some(count: int) -> np.ndarray:
        found = np.zeros((count, 16), np.uint8)
        found[:, [0, 7, 8, 14, 15]] = draws.integers(0, 2, (count, 5))
        found[:, 1] = draws.integers(0, 8, count)
        return found

    for step in range(60):
        new = some(9)
        places = np.arange(9) + 9 * step
        index.add(new, places)
        known |= {row.tobytes(): int(place) for row, place in zip(new, places, strict=True)}
        gone = some(2)
        index.drop(gone)
        for row in gone:
            known.pop(row.tobytes(), None)
        asked = some(40)
        assert index.find(asked).tolist() == [known.get(row.tobytes(), -1) for row in asked]
    assert len(index._digests_N) >= 50


# Folders.


@pytest.mark.parametrize(
    ("environment", "base"),
    [
        ({"REMAP_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/remap"),
        ({"XDG_CACHE_HOME": "relative"}, "~/.cache/remap"),
        ({"REMAP_CACHE": "~/x"}, "~/x"),
        ({"REMAP_CACHE": ""}, "~/.cache/remap"),
    ],
)
def test_the_root_comes_from_the_environment(environment: dict[str, str], base: str) -> None:
    """Source of the rule on relative paths: the XDG Base Directory Specification, "Basics"."""
    assert cache_root(environment) == Path(base).expanduser() / "teachers"


def fill(root: Path, teacher: str, count: int = 2) -> Path:
    key = replace(KEY, teacher=teacher).to_dict()
    with OutputStore.open(root, key, {"logits": OutputFormat((3,)), "tokens": OutputFormat((2, 2), "fp16")}) as store:
        store.append(digests(count), {"logits": torch.ones(count, 3), "tokens": torch.ones(count, 2, 2)})
    return store.folder


def test_a_listing_says_what_there_is(tmp_path: Path) -> None:
    assert list_caches(tmp_path / "absent") == []
    one, two = fill(tmp_path, "one", 2), fill(tmp_path, "two", 5)
    os.utime(one / "key.json", (1e9, 1e9))
    found = list_caches(tmp_path)
    assert [cache.folder for cache in found] == [two, one]
    assert [cache.images for cache in found] == [5, 2] and found[1].to_dict()["last_used"] == "2001-09-09T01:46:40Z"
    on_disk = sum(path.stat().st_size for path in two.rglob("*.bin"))
    assert found[0].bytes == on_disk == 5 * (12 + 20 + 8 + 20)
    assert [(item.name, item.shape, item.dtype) for item in found[0].outputs] == [
        ("logits", (3,), "fp32"),
        ("tokens", (2, 2), "fp16"),
    ]
    assert json.loads(json.dumps(found[0].to_dict()))["key"]["teacher"] == "two"


def test_what_is_no_cache_is_neither_listed_nor_deleted(tmp_path: Path) -> None:
    root, mine = tmp_path / "root", fill(tmp_path / "root", "one")
    elsewhere = fill(tmp_path / "elsewhere", "two")
    shutil.copytree(mine, root / ("0" * 24))  # a key that does not fit the folder's name
    shutil.copytree(mine, root / "copy")
    (root / ("1" * 24)).mkdir()
    (root / "photos").mkdir()
    (root / "photos" / "key.json").write_text("{}")
    (root / ("2" * 24)).write_text("a file")
    (root / elsewhere.name).symlink_to(elsewhere)
    (mine / "link").symlink_to(tmp_path / "elsewhere")
    others = {path.name for path in root.iterdir()} - {mine.name}
    assert [cache.folder for cache in list_caches(root)] == [mine]
    cleared = clear(chosen_caches(root, everything=True))
    assert [cache.folder for cache in cleared.removed] == [mine] and cleared.bytes == 2 * (12 + 20 + 8 + 20)
    assert {path.name for path in root.iterdir()} == others
    assert len(list((elsewhere / "items").iterdir())) == 2  # no link was followed


def test_a_listed_folder_that_was_exchanged_is_not_deleted(tmp_path: Path) -> None:
    folder = fill(tmp_path, "one")
    found = list_caches(tmp_path)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "photo.png").write_bytes(b"")
    assert clear(found).removed == () and (folder / "photo.png").exists()


def test_a_cache_in_use_is_left(tmp_path: Path) -> None:
    folder = fill(tmp_path, "one")
    store = OutputStore.open(tmp_path, replace(KEY, teacher="one").to_dict(), {"logits": OutputFormat((3,))})
    cleared = clear(list_caches(tmp_path))
    assert [cache.folder for cache in cleared.in_use] == [folder] and not cleared.removed
    assert not len(store.missing(digests(2)))
    store.close()
    assert len(clear(list_caches(tmp_path)).removed) == 1 and list(tmp_path.iterdir()) == []


def test_opening_while_another_process_clears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder goes between finding it and locking it: a fresh one is made."""
    folder, key, gone = fill(tmp_path, "one"), replace(KEY, teacher="one").to_dict(), []
    flock = cache_folders.fcntl.flock

    def late(file: int, how: int) -> None:
        if not gone and how == cache_folders.fcntl.LOCK_SH:
            gone.append(shutil.rmtree(folder))
        flock(file, how)

    monkeypatch.setattr(cache_folders.fcntl, "flock", late)
    with OutputStore.open(tmp_path, key, {"logits": OutputFormat((3,))}) as store:
        assert gone and store.folder == folder and len(store.missing(digests(2))) == 2


def test_caches_are_chosen_by_id_and_by_age(tmp_path: Path) -> None:
    folders = [fill(tmp_path, str(number)) for number in range(17)]  # so many that two ids begin alike
    old = time.time() - 10 * 86400
    os.utime(folders[3] / "key.json", (old, old))
    ids = [folder.name for folder in folders]
    assert [cache.id for cache in chosen_caches(tmp_path, [ids[0].upper(), ids[0]])] == [ids[0]]
    assert [cache.id for cache in chosen_caches(tmp_path, older_than_days=9.9)] == [ids[3]]
    assert chosen_caches(tmp_path, older_than_days=10.1) == []
    assert chosen_caches(tmp_path, [ids[0]], older_than_days=9.9) == []
    twice = next(a for a in "0123456789abcdef" if sum(name.startswith(a) for name in ids) > 1)
    for words, says in (([twice], "caches begin with this id"), (["xyz"], "no teacher cache of this id")):
        with pytest.raises(RunError, match=says):
            chosen_caches(tmp_path, words)
    with pytest.raises(RunError, match="nothing was chosen"):
        chosen_caches(tmp_path)
    with pytest.raises(RunError, match="either name caches or take all"):
        chosen_caches(tmp_path, ["a"], everything=True)


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    folder = fill(tmp_path, "one")
    old, new = tmp_path / ".draft-dead", tmp_path / ".draft-alive"
    inner = folder / "items" / ".draft-dead"
    for path in (old, new, inner):
        path.mkdir()
        (path / "key.json").write_text("{}")
    for path in (old, inner):
        os.utime(path, (1e9, 1e9))
    fill(tmp_path, "two")
    assert not old.exists() and not inner.exists() and new.exists()


def test_a_damaged_key_is_said(tmp_path: Path) -> None:
    folder, key = fill(tmp_path, "one"), replace(KEY, teacher="one").to_dict()
    for damage in (lambda: (folder / "key.json").write_text("{"), (folder / "key.json").unlink):
        damage()
        with pytest.raises(RunError, match=r"key.json[\s\S]*rm -r"), open_folder(tmp_path, key):
            pass
    assert list_caches(tmp_path) == []


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="REMAP_CACHE"), open_folder(tmp_path / "file" / "root", KEY.to_dict()):
        pass


def test_the_name_of_a_folder_is_that_of_its_key() -> None:
    """Order of the words is of no account, and tuples are lists."""
    one, two = {"a": [1, 2], "b": "x"}, {"b": "x", "a": (1, 2)}
    assert cache_id(one) == cache_id(two) != cache_id({"a": [2, 1], "b": "x"})
    assert len(cache_id(one)) == 24


@pytest.mark.parametrize(("free", "fits"), [(1050, True), (1049, False)])
def test_room_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    """1000 bytes need 1050 free ones; the folder need not exist yet."""
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage if place == tmp_path else None)
    if fits:
        cache_folders.require_space(tmp_path / "a" / "b", 1000)
    else:
        with pytest.raises(RunError, match=r"1.0 kB needed, 1.0 kB free[\s\S]*teacher.top_k[\s\S]*teacher.cache=off"):
            cache_folders.require_space(tmp_path / "a" / "b", 1000)


def test_targets_from_a_device_are_copied(open_store: Callable[..., OutputStore]) -> None:
    """Rows that are no longer contiguous, with a gradient, in another type: kept as the numbers they are."""
    values: Tensor = (torch.randn(4, 6, requires_grad=True) * 2).t()[:3, :].to(torch.float64)
    with open_store(item=OutputFormat((4,))) as store:
        store.append(digests(3), {"item": values})
        assert torch.equal(store.rows(digests(3))["item"], values.detach().float())
