"""Teacher outputs on disk: one row for each image and draw of its view, found by what the image is.

A row is found by a digest of the encoded image and the draws of its view. So a changed image, another draw, and an
image that was added or moved are noticed by construction: nothing is stored under their digest. What else decides the
values is the key of the folder (``remap.cache.cache_folders``). Letters: B images, r bytes of a record.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remap.cache.cache_folders import (
    DIGEST_BYTES,
    OUTPUT_FILE,
    OUTPUTS,
    ROW_BYTES,
    cache_id,
    cannot_read,
    make_once,
    open_folder,
)
from remap.cache.output_format import OutputFormat
from remap.cache.record_folder import RecordFolder
from remap.errors import RunError
from remap.io.own_files import require_own_folder

# Below this mean probability of the stored classes, a student learns something else from them than from all logits.
LEAST_MASS = 0.9


def row_digests(files: Sequence[bytes], draws_BN: NDArray[np.float64] | None = None) -> NDArray[np.uint8]:
    """Return the digests (B, 16) that rows are found by: BLAKE2b of an image's own digest and the draws of its view."""
    draws = [b""] * len(files) if draws_BN is None else map(bytes, draws_BN)
    # With the length of the first part, or a byte could move from the one to the other unnoticed.
    parts = [len(file).to_bytes(8, "little") + file + draw for file, draw in zip(files, draws, strict=True)]
    digests = b"".join(hashlib.blake2b(part, digest_size=DIGEST_BYTES).digest() for part in parts)
    return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)


def bytes_for(formats: Mapping[str, OutputFormat], count: int) -> int:
    """Return the bytes on disk of ``count`` rows of each output."""
    return count * sum(form.record_bytes + ROW_BYTES for form in formats.values())


class OutputStore:
    """Rows of several outputs under one key. Processes may write at once; each is used by one thread.

        with OutputStore.open(cache_root(), key.to_dict(), {"logits": OutputFormat((1000,), "fp16")}) as store:
            todo = store.missing(digests)
            store.append(digests[todo], {"logits": teacher(images[todo])})
            rows = store.rows(digests)

    Digests are (B, 16) uint8.

    Attributes:
        folder: The key's folder.
    """

    def __init__(self, folder: Path, formats: Mapping[str, OutputFormat]) -> None:
        self.folder, self.formats = folder, dict(formats)
        self._open = ExitStack()
        self._segments = {name: _segments(folder, name, form) for name, form in formats.items()}

    @classmethod
    def open(cls, root: Path, key: Mapping[str, Any], formats: Mapping[str, OutputFormat]) -> "OutputStore":
        """Open, and make what is not there yet.

        Args:
            root: Where all caches are.
            key: JSON values that decide the rows besides the image: ``CacheKey.to_dict()``.
            formats: The outputs of interest; others that are stored there stay as they are.

        Raises:
            RunError: The cache cannot be written.
        """
        # If an output cannot be opened, the folder must not stay locked: ``clear`` would skip it.
        with ExitStack() as stack:
            store = cls(stack.enter_context(open_folder(root, key)), formats)
            store._open = stack.pop_all()
        return store

    def __enter__(self) -> "OutputStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(*((RunError,) if kind is not None else ())):  # the first error says more
            self.close()

    @property
    def nbytes(self) -> int:
        """Bytes on disk of the outputs of interest."""
        return sum(segments.nbytes for segments in self._segments.values())

    @property
    def damaged(self) -> int:
        """Records that did not fit their checksum and were given up."""
        return sum(segments.damaged for segments in self._segments.values())

    def missing(self, digests_B16: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the positions in the batch of rows that lack an output.

        A record is read and its checksum compared when this store first finds it; damaged ones are missing.
        """
        # One lacking output is enough: the teacher computes all of them in one pass.
        lacking_B = np.zeros(len(digests_B16), bool)
        for segments in self._segments.values():
            lacking_B |= segments.find(digests_B16) < 0
        return np.flatnonzero(lacking_B)

    def append(self, digests_B16: NDArray[np.uint8], outputs: Mapping[str, Tensor]) -> None:
        """Store rows; those already there stay. They are found at once here, by other processes after ``flush``.

        Args:
            digests_B16: What the rows are found by.
            outputs: Rows of each output (B, ...), on any device.

        Raises:
            RunError: The disk is full; what was stored before is complete.
            DataError: A number is too large for the dtype.
        """
        if set(outputs) != set(self.formats):
            raise ValueError(f"outputs are {sorted(self.formats)}, not {sorted(outputs)}")
        # Two images with the same content are one row.
        _, first = np.unique(digests_B16, axis=0, return_index=True)
        first.sort()  # back in the order of the batch, which is the order in which training reads
        for name, segments in self._segments.items():
            rows = outputs[name]
            if len(rows) != len(digests_B16):
                raise ValueError(f"{len(rows)} rows of '{name}' for {len(digests_B16)} digests")
            # After an interruption, some outputs of an image may be stored and others not.
            new = first[segments.find(digests_B16[first]) < 0]
            if len(new):
                chosen = rows if len(new) == len(rows) else rows[torch.from_numpy(new).to(rows.device)]
                segments.append(digests_B16[new], self.formats[name].encode(name, chosen))

    def rows(self, digests_B16: NDArray[np.uint8]) -> dict[str, Tensor]:
        """Return rows in the order of the batch, in the dtype they are stored in (top-k logits: float32), on the CPU.

        Raises:
            RunError: One is not there, or was damaged since ``missing`` looked.
        """
        return {name: form.decode(self._records(name, digests_B16)) for name, form in self.formats.items()}

    def mass(self, digests_B16: NDArray[np.uint8]) -> float | None:
        """Return the mean probability of the classes that top-k stored; None without such an output or rows."""
        formats = {name: form for name, form in self.formats.items() if form.top_k is not None}
        if not formats or not len(digests_B16):
            return None
        masses = [form.masses(self._records(name, digests_B16)).mean() for name, form in formats.items()]
        return float(np.mean(masses))

    def _records(self, name: str, digests_B16: NDArray[np.uint8]) -> NDArray[np.uint8]:
        addresses_B = self._segments[name].find(digests_B16)
        lacking = int((addresses_B < 0).sum())
        if lacking:
            raise RunError(
                f"{lacking} of {len(addresses_B)} rows are not in the teacher cache, or damaged",
                given=f"{name} in {self.folder}",
                do="run again: they will be computed again",
            )
        return self._segments[name].read(addresses_B)

    def refresh(self) -> None:
        """Read what other processes have flushed since."""
        for segments in self._segments.values():
            segments.refresh()

    def flush(self) -> None:
        """Wait until all appended rows are on the disk; a killed process loses what was not flushed (every 5 s).

        Raises:
            RunError: The disk is full; what was stored before is complete.
        """
        for segments in self._segments.values():
            segments.flush()

    def close(self) -> None:
        """Flush, and let ``clear`` delete the folder afterwards."""
        with self._open:
            for segments in self._segments.values():
                self._open.callback(segments.close)  # all are closed, and the first error is raised


def _segments(folder: Path, name: str, form: OutputFormat) -> RecordFolder:
    """Open the folder of an output in one format, made if need be."""
    description = {"name": name, **asdict(form)}
    # Names hold spaces, slashes and more, and may differ only there; the hash also knows shape and dtype.
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:40]
    path = folder / OUTPUTS / f"{plain}-{cache_id(description)[:8]}"
    make_once(path, OUTPUT_FILE, description)
    try:
        require_own_folder(path)
    except OSError as error:
        raise cannot_read(error, path) from error
    return RecordFolder(path, form.record_bytes)
