"""One segment of cached records: two files that one process writes, and all may read at any moment.

    data.bin   the records, one after another
    rows.bin   for each of them the 16-byte digest of what it belongs to, and a CRC-32 of digest and record

A record counts once its row is there, and rows are written only after their records have reached the disk. So a
process may be killed at any moment: what it had not finished does not count. Numbers are little-endian. Letters: B
digests in a batch, N records, r bytes of one record.
"""

import io
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remap.cache.cache_folders import DATA_FILE, DIGEST_BYTES, ROW_BYTES, ROWS_FILE, cannot_read
from remap.errors import RunError
from remap.io.own_files import open_own

_ROW = np.dtype([("digest", "u1", (DIGEST_BYTES,)), ("crc", "<u4")])
assert _ROW.itemsize == ROW_BYTES
# Stands for the checksum of a record that fits it, or that this process wrote; checksums are not negative.
_CHECKED = -1


class Segment:
    """Two files in a folder of their own. Rows are numbered from 0."""

    def __init__(self, folder: Path, record_bytes: int) -> None:
        self.folder, self.record_bytes = folder, record_bytes
        # Checksums of the rows in the file, and rows that wait until the disk has their records.
        self._crcs_N: NDArray[np.int64] = np.empty(0, np.int64)
        self._waiting: list[bytes] = []
        self._mapped: NDArray[np.uint8] | None = None
        self._rows_file = self._data_file = -1

    @property
    def count(self) -> int:
        """Records that this process knows, those that wait included."""
        return len(self._crcs_N) + len(self._waiting)

    @property
    def is_flushed(self) -> bool:
        """Whether all records count."""
        return not self._waiting

    def load(self) -> NDArray[np.uint8]:
        """Return the digests (N, 16) of the rows that others wrote since the last call."""
        assert self.is_flushed
        try:
            with self._read(ROWS_FILE) as file, self._read(DATA_FILE) as data:
                sizes = [os.fstat(opened.fileno()).st_size for opened in (file, data)]
                # After a power cut or a copy that was cut off there may be more rows than records.
                counts = [sizes[0] // ROW_BYTES, *([sizes[1] // self.record_bytes] if self.record_bytes else [])]
                file.seek(self.count * ROW_BYTES)
                content = file.read(max(0, min(counts) - self.count) * ROW_BYTES)
        except FileNotFoundError:  # its writer has just begun
            return np.empty((0, DIGEST_BYTES), np.uint8)
        except OSError as error:
            raise cannot_read(error, self.folder) from error
        new = len(content) // ROW_BYTES
        rows = np.frombuffer(content, _ROW, count=new)
        self._crcs_N = np.append(self._crcs_N, rows["crc"].astype(np.int64))
        return np.ascontiguousarray(rows["digest"])

    def records(self) -> NDArray[np.uint8]:
        """Return the records (N, r), mapped: the system reads from the disk what is looked at."""
        if self._mapped is None or len(self._mapped) < self.count:
            shape = (self.count, self.record_bytes)
            if not self.record_bytes:
                return np.empty(shape, np.uint8)  # an empty file cannot be mapped
            try:
                with self._read(DATA_FILE) as file:
                    self._mapped = np.asarray(np.memmap(file, np.uint8, "r", shape=shape))
            except OSError as error:
                raise cannot_read(error, self.folder) from error
            except ValueError as error:  # it has become shorter
                raise RunError(f"cannot read the teacher cache: {error}", given=self.folder) from error
        return self._mapped

    def damaged(self, rows_B: NDArray[np.int64], digests_B16: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return which of these records do not fit their checksum (B,); their digests are erased on the disk.

        Each is read once, when it is first asked for: reading all at the start would take hours for large caches.
        """
        bad_B = np.zeros(len(rows_B), bool)
        todo = np.flatnonzero(rows_B < len(self._crcs_N))
        todo = todo[self._crcs_N[rows_B[todo]] != _CHECKED]
        if not len(todo):
            return bad_B
        records, crcs = self.records(), self._crcs_N[rows_B[todo]]
        for at, crc in zip(todo, crcs, strict=True):
            bad_B[at] = zlib.crc32(records[rows_B[at]].data, zlib.crc32(digests_B16[at].data)) != crc
        self._crcs_N[rows_B[todo[~bad_B[todo]]]] = _CHECKED
        # Zeros are the digest of nothing, so no process finds these rows again. A disk that refuses only costs time.
        with suppress(OSError):
            self._erase(rows_B[bad_B])
        return bad_B

    def _erase(self, rows: NDArray[np.int64]) -> None:
        if len(rows):
            with os.fdopen(open_own(self.folder / ROWS_FILE, os.O_RDWR), "r+b", buffering=0) as file:
                for row in rows.tolist():
                    os.pwrite(file.fileno(), bytes(ROW_BYTES), row * ROW_BYTES)

    def _read(self, name: str) -> io.BufferedReader:
        return os.fdopen(open_own(self.folder / name), "rb")

    def open_to_write(self) -> None:
        """Become the writer of a new segment."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._rows_file = open_own(self.folder / ROWS_FILE, flags)
        self._data_file = open_own(self.folder / DATA_FILE, flags)

    def close(self) -> None:
        """Stop writing."""
        for file in (self._rows_file, self._data_file):
            if file >= 0:
                os.close(file)
        self._rows_file = self._data_file = -1

    def append(self, digests_B16: NDArray[np.uint8], records_Br: NDArray[np.uint8]) -> None:
        """Write records; their rows wait for ``flush``."""
        content = np.ascontiguousarray(records_Br).reshape(-1).data
        _write(self._data_file, content, self.count * self.record_bytes)
        rows = []
        for number, digest in enumerate(map(bytes, digests_B16)):
            record = content[number * self.record_bytes : (number + 1) * self.record_bytes]
            rows.append(digest + zlib.crc32(record, zlib.crc32(digest)).to_bytes(4, "little"))
        self._waiting += rows

    def flush(self) -> None:
        """Write the rows that wait, once the disk has their records."""
        if self._waiting:
            os.fsync(self._data_file)
            _write(self._rows_file, memoryview(b"".join(self._waiting)), len(self._crcs_N) * ROW_BYTES)
            os.fsync(self._rows_file)
            # In this order: a signal in between must not make ``count`` too small, which would overwrite records.
            self._crcs_N = np.append(self._crcs_N, np.full(len(self._waiting), _CHECKED))
            self._waiting = []


def _write(file: int, content: memoryview, offset: int) -> None:
    """Write all of it; if that fails, the file ends where it ended before."""
    done = 0
    try:
        while done < len(content):  # a disk that fills up takes a part first
            done += os.pwrite(file, content[done:], offset + done)
    except OSError:
        with suppress(OSError):
            os.ftruncate(file, offset)
        raise
