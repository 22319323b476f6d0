"""All records of one output on disk: readable at any moment, written by several processes at once.

The folder holds segments, ``seg-0``, ``seg-1``, ... (``remap.cache.segment``). Each process writes a new one, so that
none waits for another. Letters: B digests in a batch, r bytes of one record.
"""

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remap.cache.cache_folders import ROW_BYTES
from remap.cache.digest_index import DigestIndex
from remap.cache.segment import Segment
from remap.errors import RunError

# A killed process loses the work of at most this many seconds; each flush waits for the disk.
FLUSH_SECONDS = 5.0
# An address is the number of a segment and of a row in it, in one integer.
_SHIFT = 40
_ROW_MASK = (1 << _SHIFT) - 1


class RecordFolder:
    """All records of one folder.

    Args:
        folder: An existing folder.
        record_bytes: Size of a record; 0 is allowed.

    Attributes:
        damaged: Records that this process found not to fit their checksum. They no longer count, for any process.
    """

    def __init__(self, folder: Path, record_bytes: int) -> None:
        self.folder, self.record_bytes = folder, record_bytes
        self.damaged = 0
        self._segments: list[Segment] = []
        self._index = DigestIndex()
        self._writer: Segment | None = None
        self._flushed_at = time.monotonic()
        self.refresh()

    def __len__(self) -> int:
        return sum(segment.count for segment in self._segments)

    @property
    def nbytes(self) -> int:
        return len(self) * (self.record_bytes + ROW_BYTES)

    def refresh(self) -> None:
        """Read what other processes have written since."""
        # Sorted, so that all processes number segments alike where nothing changes meanwhile.
        known = {segment.folder.name for segment in self._segments}
        new = sorted(path for path in self.folder.glob("seg-*") if path.name not in known)
        self._segments += [Segment(path, self.record_bytes) for path in new]
        for segment in self._segments:
            # What this process writes is in the index already.
            if segment is not self._writer:
                first = segment.count
                self._add(segment, first, segment.load())

    def _add(self, segment: Segment, first: int, digests_B16: NDArray[np.uint8]) -> None:
        number = self._segments.index(segment)
        self._index.add(digests_B16, (number << _SHIFT) + first + np.arange(len(digests_B16)))

    def find(self, digests_B16: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return addresses of records (B,), -1 for those that are not there.

        A record's checksum is compared when this process first finds it; a damaged one is not there any more.
        """
        addresses_B = self._index.find(digests_B16)
        segments_B, rows_B = addresses_B >> _SHIFT, addresses_B & _ROW_MASK
        for number in np.unique(segments_B[addresses_B >= 0]):
            # One call a segment: Python's cost for each record would be that of reading it.
            here = np.flatnonzero(segments_B == number)
            bad = here[self._segments[number].damaged(rows_B[here], digests_B16[here])]
            if len(bad):
                self.damaged += len(np.unique(rows_B[bad]))
                self._index.drop(digests_B16[bad])
                addresses_B[bad] = -1
        return addresses_B

    def read(self, addresses_B: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a copy of the records at these addresses, (B, r)."""
        segments_B, rows_B = addresses_B >> _SHIFT, addresses_B & _ROW_MASK
        numbers = np.unique(segments_B)
        if len(numbers) == 1:  # most often, and then one copy is enough
            return self._segments[numbers[0]].records()[rows_B]
        records_Br = np.empty((len(addresses_B), self.record_bytes), np.uint8)
        for number in numbers:
            here = segments_B == number
            records_Br[here] = self._segments[number].records()[rows_B[here]]
        return records_Br

    def append(self, digests_B16: NDArray[np.uint8], records_Br: NDArray[np.uint8]) -> None:
        """Add records. This process finds them at once, others after ``flush``.

        Raises:
            RunError: The disk is full or refuses; all that was there before still is.
        """
        if not len(records_Br):
            return
        try:
            if self._writer is None:
                self._writer = self._make_segment()
            first = self._writer.count
            self._writer.append(digests_B16, records_Br)
        except OSError as error:
            # The records before these may still fit, and count then.
            with suppress(OSError):
                if self._writer is not None:
                    self._writer.flush()
            raise self._refused(error) from error
        self._add(self._writer, first, digests_B16)
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Wait until all records are on the disk; from then on they count.

        Raises:
            RunError: The disk is full or refuses; what does not count yet can be flushed again.
        """
        try:
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            raise self._refused(error) from error
        self._flushed_at = time.monotonic()  # a clock that no change of the date sets back

    def close(self) -> None:
        """Flush, and stop writing."""
        try:
            self.flush()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _make_segment(self) -> Segment:
        # Where numbers are taken by processes that began later, the next free one is a few steps away.
        number = len(self._segments)
        while True:
            folder = self.folder / f"seg-{number}"
            number += 1
            with suppress(FileExistsError):  # another process has just made it
                folder.mkdir(0o700)
                segment = Segment(folder, self.record_bytes)
                segment.open_to_write()
                self._segments.append(segment)
                return segment

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write the teacher's outputs: {error.strerror}",
            given=self.folder,
            do="make room (remap cache ls, remap cache clear), name another disk in REMAP_CACHE, or run without: "
            "--set teacher.cache=off; outputs cached so far are complete, and the next run continues from there",
        )
