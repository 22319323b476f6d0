"""Digests of what the files of a data source hold, which tell whether images are those of an earlier run."""

import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise, starmap

import numpy as np
from numpy.typing import NDArray

from remap.data.splits import ImageData, Split
from remap.data.thread_pool import threads
from remap.errors import DataError
from remap.progress import Progress

DIGEST_BYTES = 16
# Files that are read at once between two reports of progress.
CHUNK = 256
# The system lacks something: the image itself may be sound.
_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def ranges(images: int, processes: int) -> list[range]:
    """Return the indices of images that each of several processes reads: as many, one after the other."""
    ends = [number * images // processes for number in range(processes + 1)]
    return list(starmap(range, pairwise(ends)))


class Contents:
    """Digests (BLAKE2b, 16 bytes) of the encoded content of a split's images. No file is read twice for them.

    What cannot be read has the digest of its name and the reason.
    """

    def __init__(self, split: Split, workers: int | None = None) -> None:
        self.split, self._workers = split, workers or min(8, os.cpu_count() or 1)
        # 17 bytes an image, also where there are millions of them.
        self._digests_N16: NDArray[np.uint8] = np.zeros((len(split), DIGEST_BYTES), np.uint8)
        self._known_N: NDArray[np.bool_] = np.zeros(len(split), bool)

    def read(self, index: int) -> bytes:
        """Return the encoded content of an image, and store its digest.

        Raises:
            OSError: It cannot be read.
            DataError: Nothing can be read now; the image itself may be sound.
        """
        try:
            content = self.split.read(index)
        except OSError as error:
            if error.errno in _LACKING:
                raise DataError(
                    f"images cannot be read: {error.strerror}",
                    given=self.split.names[index],
                    do="allow more open files (ulimit -n) or set data.workers lower; then start again or use --resume",
                ) from error
            reason = f"{self.split.names[index]} cannot be read: {error.strerror or type(error).__name__}"
            self._store(index, reason.encode(errors="surrogatepass"))
            raise
        self._store(index, content)
        return content

    def of(self, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """Return the digests of some images; those not known yet are read."""
        chosen = np.asarray(indices, dtype=np.int64)
        missing = np.unique(chosen[~self._known_N[chosen]])
        if len(missing):
            with threads(self._workers) as pool:
                list(pool.map(self._try_to_read, missing.tolist()))
        return [row.tobytes() for row in self._digests_N16[chosen]]

    def complete(self, progress: Progress, what: str, part: range | None = None) -> NDArray[np.uint8]:
        """Return the digests of all images, (N, 16), once those of a part of them are known; None is all of them."""
        missing = np.flatnonzero(~self._known_N)
        if part is not None:
            missing = missing[(missing >= part.start) & (missing < part.stop)]
        if len(missing):
            with progress.wait(f"checking the content of {what}", len(missing)) as step:
                for start in range(0, len(missing), CHUNK):
                    chunk = missing[start : start + CHUNK]
                    self.of(chunk)
                    step.advance(len(chunk))
        return self._digests_N16

    def fingerprint(self, progress: Progress, what: str) -> str:
        """Return 64 hex digits for the names, labels, order and content of all images."""
        return hashlib.sha256(self.split.described() + self.complete(progress, what).tobytes()).hexdigest()

    def known(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return the images whose digests are known so far (K,), and these (K, 16)."""
        return np.flatnonzero(self._known_N), self._digests_N16[self._known_N]

    def learn(self, indices_K: NDArray[np.int64], digests_K16: NDArray[np.uint8]) -> None:
        """Take over what is ``known`` of the same images in another process."""
        self._digests_N16[indices_K], self._known_N[indices_K] = digests_K16, True

    def taken(self, indices: NDArray[np.int64]) -> "Contents":
        """Return what is known of some of the images, for ``split.take(indices)``."""
        other = Contents(self.split.take(indices), self._workers)
        other._digests_N16, other._known_N = self._digests_N16[indices], self._known_N[indices]
        return other

    def _try_to_read(self, index: int) -> None:
        try:
            self.read(index)
        except OSError:
            return  # the digest of the reason is stored

    def _store(self, index: int, content: bytes) -> None:
        if not self._known_N[index]:
            digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
            self._digests_N16[index] = np.frombuffer(digest, np.uint8)
            self._known_N[index] = True


def fingerprint(
    data: ImageData, progress: Progress, workers: int | None = None, known: Mapping[str, Contents] | None = None
) -> str:
    """Return 64 hex digits for class names, file names, labels, order and the content of every file.

    They are equal for equal images, in a folder or in a tar, in any path.

    Args:
        known: Contents of some of the splits (train, val, test, unlabeled, selection) as far as they were read already.
    """
    digest = hashlib.sha256(data.fingerprint().encode())
    for name in ("train", "val", "test", "unlabeled", "selection"):
        split: Split | None = getattr(data, name)
        if split is not None:
            contents = (known or {}).get(name) or Contents(split, workers)
            digest.update(f"{name} {len(split)} ".encode())
            digest.update(contents.complete(progress, f"{name} images").tobytes())
    return digest.hexdigest()
