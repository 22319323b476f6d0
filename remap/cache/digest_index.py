"""Where the record of a digest is, for millions of them. Letters: B digests in a batch, N in the index."""

import numpy as np
from numpy.typing import NDArray

from remap.cache.cache_folders import DIGEST_BYTES

# Digests in the dict when it is merged into the arrays; in a dict, each takes some 200 bytes.
SORT_AT = 1 << 16


class DigestIndex:
    """Digest -> address: sorted arrays of 24 bytes a record, and a dict of those added since they were sorted."""

    def __init__(self) -> None:
        # Zeros are the digest of nothing; with them the arrays are never empty.
        self._digests_N = np.zeros(1, f"S{DIGEST_BYTES}")
        self._addresses_N: NDArray[np.int64] = np.full(1, -1)
        self._recent: dict[bytes, int] = {}

    def add(self, digests_B16: NDArray[np.uint8], addresses_B: NDArray[np.int64]) -> None:
        """Add addresses; of two equal digests the later one counts."""
        self._recent.update(zip(map(bytes, digests_B16), addresses_B.tolist(), strict=True))
        if len(self._recent) >= SORT_AT:
            recent = np.frombuffer(b"".join(self._recent), f"S{DIGEST_BYTES}")
            addresses = np.fromiter(self._recent.values(), np.int64, len(recent))
            # unique gives the first of equal ones, so recent ones come first.
            self._digests_N, first = np.unique(np.concatenate([recent, self._digests_N]), return_index=True)
            self._addresses_N, self._recent = np.concatenate([addresses, self._addresses_N])[first], {}

    def find(self, digests_B16: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return addresses (B,), -1 where there is none."""
        at_B, is_there_B = self._search(digests_B16)
        addresses_B = np.where(is_there_B, self._addresses_N[at_B], -1)
        if self._recent:
            recent_B = np.asarray([self._recent.get(digest, -1) for digest in map(bytes, digests_B16)], np.int64)
            addresses_B = np.where(recent_B >= 0, recent_B, addresses_B)
        return addresses_B

    def drop(self, digests_B16: NDArray[np.uint8]) -> None:
        """Forget digests."""
        for digest in map(bytes, digests_B16):
            self._recent.pop(digest, None)
        at_B, is_there_B = self._search(digests_B16)
        self._addresses_N[at_B[is_there_B]] = -1

    def _search(self, digests_B16: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return where in the arrays each digest would be (B,), and whether it is there."""
        # As strings, which numpy can sort and search; that it leaves off zeros at their ends changes no order.
        digests_B = np.ascontiguousarray(digests_B16).reshape(-1).view(f"S{DIGEST_BYTES}")
        at_B = np.minimum(np.searchsorted(self._digests_N, digests_B), len(self._digests_N) - 1)
        return at_B, self._digests_N[at_B] == digests_B
