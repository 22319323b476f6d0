"""Records of one size on disk: append-only, readable at any moment, written by several processes at once.

A folder holds segments, ``seg-0``, ``seg-1``, ... each written by one process at a time:

    data.bin   the records, one after another
    rows.bin   for each of them the 16-byte digest of what it belongs to, and a CRC-32 of digest and record

A record counts once its row is there, and rows are written only after their records have reached the disk. So a
process may be killed at any moment: what it had not finished does not count, and the next writer of the segment cuts it
off. Numbers are little-endian. Letters: B digests asked for, N records, r bytes of one record.
"""

import fcntl
import os
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remap.cache.folders import DATA_FILE, ROW_BYTES, ROWS_FILE
from remap.errors import RunError

DIGEST_BYTES = 16
_ROW = np.dtype([("digest", f"V{DIGEST_BYTES}"), ("crc", "<u4")])
assert _ROW.itemsize == ROW_BYTES
# A killed process loses at most the work of so many seconds; each flush waits for the disk.
FLUSH_SECONDS = 5.0
# A place is a record's segment and its number therein, in one integer.
_SHIFT = 40
_SORT_AT = 1 << 16


class Records:
    """All records of one folder.

    Args:
        folder: An existing folder.
        record_bytes: Size of a record; 0 is allowed.

    Attributes:
        damaged: Records that this process found not to fit their checksum. They no longer count, here or anywhere.
    """

    def __init__(self, folder: Path, record_bytes: int) -> None:
        self.folder, self.record_bytes = folder, record_bytes
        self.damaged = 0
        self._segments: list[_Segment] = []
        self._index = _Index()
        self._writer: _Segment | None = None
        self._flushed_at = time.monotonic()
        self.refresh()

    def __len__(self) -> int:
        return sum(segment.count for segment in self._segments)

    @property
    def nbytes(self) -> int:
        return len(self) * (self.record_bytes + ROW_BYTES)

    def refresh(self) -> None:
        """Take note of what other processes have written since."""
        known = {segment.folder.name for segment in self._segments}
        for path in sorted(self.folder.glob("seg-*"), key=lambda path: path.name):
            if path.name not in known:
                self._segments.append(_Segment(path, self.record_bytes))
        for number, segment in enumerate(self._segments):
            if segment is not self._writer:
                self._take_note(number, segment)

    def _take_note(self, number: int, segment: "_Segment") -> None:
        first = segment.count
        digests_N = segment.load()
        self._index.add(digests_N, (number << _SHIFT) + first + np.arange(len(digests_N)))

    def find(self, digests_B16: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Places of records, -1 for those that are not there (B,).

        A record's checksum is compared when this process first finds it; a damaged one is not there any more.
        """
        places_B = self._index.find(_joined(digests_B16))
        for number in np.unique(places_B[places_B >= 0] >> _SHIFT):
            mine = np.flatnonzero(places_B >> _SHIFT == number)
            rows = places_B[mine] - (int(number) << _SHIFT)
            bad = self._segments[number].damaged(rows, digests_B16[mine])
            if bad.any():
                self.damaged += len(np.unique(rows[bad]))
                self._index.drop(_joined(digests_B16[mine[bad]]))
                places_B[mine[bad]] = -1
        return places_B

    def read(self, places_B: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A copy of the records at these places, (B, r)."""
        segments_B, rows_B = places_B >> _SHIFT, places_B & ((1 << _SHIFT) - 1)
        if len(places_B) and (segments_B == segments_B[0]).all():
            return self._segments[segments_B[0]].records()[rows_B]
        out_Br = np.empty((len(places_B), self.record_bytes), np.uint8)
        for number in np.unique(segments_B):
            mine = segments_B == number
            out_Br[mine] = self._segments[number].records()[rows_B[mine]]
        return out_Br

    def append(self, digests_B16: NDArray[np.uint8], records_Br: NDArray[np.uint8]) -> None:
        """Add records. This process finds them at once, others after ``flush``.

        Raises:
            RunError: The disk is full or refuses; all that was there before still is.
        """
        if not len(records_Br):
            return
        if self._writer is None:
            self._writer = self._lock_one()
        first = self._writer.count
        try:
            self._writer.append(digests_B16.tobytes(), records_Br)
        except OSError as error:
            with suppress(OSError):  # what came before may still fit
                self._writer.flush()
            raise self._refused(error) from error
        number = self._segments.index(self._writer)
        self._index.add(_joined(digests_B16), (number << _SHIFT) + first + np.arange(len(records_Br)))
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Wait until everything is on the disk, and let it count.

        Raises:
            RunError: The disk is full or refuses; what does not count yet can be flushed again.
        """
        try:
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            raise self._refused(error) from error
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush, and leave the segment to others."""
        try:
            self.flush()
        finally:
            if self._writer is not None:
                self._writer.unlock()
                self._writer = None

    def _lock_one(self) -> "_Segment":
        """A segment that no process writes, made if need be; what a killed writer left half-done is cut off."""
        try:
            for number, segment in enumerate(self._segments):
                if segment.lock():
                    self._take_note(number, segment)
                    segment.cut()
                    return segment
            number = len(self._segments)
            while True:
                folder = self.folder / f"seg-{number}"
                number += 1
                with suppress(FileExistsError):
                    folder.mkdir()
                    segment = _Segment(folder, self.record_bytes)
                    if segment.lock():
                        self._take_note(len(self._segments), segment)
                        self._segments.append(segment)
                        return segment
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write the teacher's outputs: {error.strerror}",
            given=self.folder,
            do="make room (remap cache ls, remap cache clear), name another disk in REMAP_CACHE, or go on without: "
            "--set teacher.cache=off; what was kept before is whole, and the next run goes on from there",
        )


class _Segment:
    """Two files of one writer."""

    def __init__(self, folder: Path, record_bytes: int) -> None:
        self.folder, self.record_bytes = folder, record_bytes
        # Rows in the file that are known, and rows that wait for the disk to have their records. One attribute, so
        # that a signal never finds the two at odds.
        self._rows: tuple[int, list[bytes]] = (0, [])
        self._crcs = np.empty(0, np.uint32)
        self._compared = np.empty(0, bool)  # shorter than ``count`` by what this process wrote, which needs no check
        self._mapped: NDArray[np.uint8] | None = None
        self._rows_file = self._data_file = -1

    @property
    def count(self) -> int:
        """Records that this process knows, those that wait included."""
        return self._rows[0] + len(self._rows[1])

    def load(self) -> NDArray[np.bytes_]:
        """Digests of the rows written since the last call."""
        try:
            with open(self.folder / ROWS_FILE, "rb") as file:
                file.seek(self.count * ROW_BYTES)
                content = file.read()
            size = (self.folder / DATA_FILE).stat().st_size
        except FileNotFoundError:  # its writer has just begun
            return np.empty(0, f"S{DIGEST_BYTES}")
        except OSError as error:
            raise RunError(f"cannot read the teacher cache: {error.strerror}", given=self.folder) from error
        new = len(content) // ROW_BYTES
        if self.record_bytes:
            new = max(0, min(new, size // self.record_bytes - self.count))
        rows = np.frombuffer(content, _ROW, count=new)
        own = self.count - len(self._compared)
        self._crcs = np.concatenate([self._crcs, np.zeros(own, np.uint32), rows["crc"]])
        self._compared = np.concatenate([self._compared, np.ones(own, bool), np.zeros(new, bool)])
        self._rows = (self.count + new, [])
        return np.ascontiguousarray(rows["digest"]).view(f"S{DIGEST_BYTES}")

    def records(self) -> NDArray[np.uint8]:
        """The records (N, r), mapped."""
        if self._mapped is None or len(self._mapped) < self.count:
            if not self.record_bytes:
                return np.empty((self.count, 0), np.uint8)
            try:
                shape = (self.count, self.record_bytes)
                self._mapped = np.asarray(np.memmap(self.folder / DATA_FILE, np.uint8, "r", shape=shape))
            except (OSError, ValueError) as error:
                raise RunError(f"cannot read the teacher cache: {error}", given=self.folder) from error
        return self._mapped

    def damaged(self, rows_B: NDArray[np.int64], digests_B16: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of these rows do not fit their checksum; each is looked at once, and taken off the disk's list."""
        bad_B = np.zeros(len(rows_B), bool)
        known = len(self._compared)
        todo = np.flatnonzero(rows_B < known)
        todo = todo[~self._compared[rows_B[todo]]]
        if not len(todo):
            return bad_B
        records = self.records()
        for at in todo:
            row = rows_B[at]
            crc = zlib.crc32(np.ascontiguousarray(records[row]), zlib.crc32(digests_B16[at].tobytes()))
            bad_B[at] = crc != self._crcs[row]
            self._compared[row] |= not bad_B[at]
        if bad_B.any():
            self._forget(rows_B[bad_B])
        return bad_B

    def _forget(self, rows: NDArray[np.int64]) -> None:
        """Overwrite digests by zeros, which no digest is."""
        with suppress(OSError), open(self.folder / ROWS_FILE, "r+b", buffering=0) as file:
            for row in rows:
                os.pwrite(file.fileno(), bytes(ROW_BYTES), int(row) * ROW_BYTES)

    def lock(self) -> bool:
        """Become its writer, unless another process is."""
        flags = os.O_RDWR | os.O_CREAT
        rows_file = os.open(self.folder / ROWS_FILE, flags, 0o666)
        try:
            fcntl.flock(rows_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._data_file = os.open(self.folder / DATA_FILE, flags, 0o666)
        except BaseException as error:
            os.close(rows_file)
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._rows_file = rows_file
        return True

    def unlock(self) -> None:
        os.close(self._data_file)
        os.close(self._rows_file)
        self._rows_file = self._data_file = -1

    def cut(self) -> None:
        """Cut off what does not count."""
        for file, size in ((self._rows_file, ROW_BYTES), (self._data_file, self.record_bytes)):
            if os.fstat(file).st_size > self.count * size:
                os.ftruncate(file, self.count * size)

    def append(self, digests: bytes, records_Br: NDArray[np.uint8]) -> None:
        """Write records; their rows wait."""
        content = memoryview(np.ascontiguousarray(records_Br).reshape(-1))
        _write(self._data_file, content, self.count * self.record_bytes)
        rows, step = list[bytes](), self.record_bytes
        for number, at in enumerate(range(0, len(digests), DIGEST_BYTES)):
            digest = digests[at : at + DIGEST_BYTES]
            crc = zlib.crc32(content[number * step : (number + 1) * step], zlib.crc32(digest))
            rows.append(digest + crc.to_bytes(4, "little"))
        self._rows[1].extend(rows)

    def flush(self) -> None:
        """Write the rows that wait, once the disk has their records."""
        flushed, waiting = self._rows
        if waiting:
            os.fsync(self._data_file)
            _write(self._rows_file, b"".join(waiting), flushed * ROW_BYTES)
            os.fsync(self._rows_file)
            self._rows = (flushed + len(waiting), [])


def _write(file: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of it; if that fails, the file ends where it ended before."""
    left = memoryview(content)
    try:
        while left:
            written = os.pwrite(file, left, offset + len(content) - len(left))
            left = left[written:]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file, offset)
        raise


class _Index:
    """Digest -> place, in 24 bytes a record: sorted, and beside it a dict of those that came since."""

    def __init__(self) -> None:
        self._digests_N = np.empty(0, f"S{DIGEST_BYTES}")
        self._places_N = np.empty(0, np.int64)
        self._new: dict[bytes, int] = {}

    def add(self, digests_N: NDArray[np.bytes_], places_N: NDArray[np.int64]) -> None:
        """Take in; of two equal digests the later one counts."""
        self._new.update(zip(_apart(digests_N), places_N.tolist(), strict=True))
        if len(self._new) < _SORT_AT:
            return
        new = np.frombuffer(b"".join(self._new), f"S{DIGEST_BYTES}")
        places = np.fromiter(self._new.values(), np.int64, len(new))
        digests, places = np.concatenate([self._digests_N, new]), np.concatenate([self._places_N, places])
        order = np.argsort(digests, kind="stable")
        digests, places = digests[order], places[order]
        last = np.append(digests[1:] != digests[:-1], True)
        self._digests_N, self._places_N, self._new = digests[last], places[last], {}

    def find(self, digests_B: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Places, -1 where there is none."""
        places_B = np.full(len(digests_B), -1, np.int64)
        if len(self._digests_N):
            at = np.minimum(np.searchsorted(self._digests_N, digests_B), len(self._digests_N) - 1)
            places_B = np.where(self._digests_N[at] == digests_B, self._places_N[at], -1)
        if self._new:
            new_B = np.asarray([self._new.get(digest, -1) for digest in _apart(digests_B)], np.int64)
            places_B = np.where(new_B >= 0, new_B, places_B)
        return places_B

    def drop(self, digests_B: NDArray[np.bytes_]) -> None:
        for digest in _apart(digests_B):
            self._new.pop(digest, None)
        if len(self._digests_N):
            at = np.minimum(np.searchsorted(self._digests_N, digests_B), len(self._digests_N) - 1)
            self._places_N[at[self._digests_N[at] == digests_B]] = -1


def _joined(digests_B16: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Digests as one array of strings; compared as a whole, since all have the same length."""
    return np.ascontiguousarray(digests_B16).reshape(-1).view(f"S{DIGEST_BYTES}")


def _apart(digests_B: NDArray[np.bytes_]) -> list[bytes]:
    """Digests one by one, with the zeros at their end, which numpy leaves off."""
    content = digests_B.tobytes()
    return [content[at : at + DIGEST_BYTES] for at in range(0, len(content), DIGEST_BYTES)]
