"""Kept teacher outputs: one row for each image and draw of its view, on disk, found by what the image is.

A row is found by a digest of the encoded image and the draw of its view. So a changed image, another draw, an image
that was added or moved are noticed by construction: nothing is stored under their digest. What else decides the values
is the key of the folder (``remap.cache.folders``). Letters: B images, C classes, K kept classes, r bytes of a record.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from math import log, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remap.cache.folders import ITEM_FILE, ITEMS, ROW_BYTES, cache_id, held, make_once
from remap.cache.segments import DIGEST_BYTES, Records
from remap.errors import DataError, RunError

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Below this mean probability of the kept classes, what a student learns from them differs from the whole answer.
LEAST_MASS = 0.9


@dataclass(frozen=True)
class Item:
    """How one kind of output is kept.

    Args:
        shape: Of one image's row.
        dtype: "fp32", "fp16" or "bf16".
        top_k: For logits (C,): keep the K most probable classes and the probability of all others together, as TinyViT
            does (Wu et al. 2022, arXiv 2207.10666); probabilities are then kept as fp32, or fp16 for both short types.
    """

    shape: tuple[int, ...]
    dtype: str = "fp32"
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {self.dtype!r}")
        if self.top_k is not None:
            if len(self.shape) != 1 or self.top_k < 1:
                raise ValueError(f"top_k={self.top_k} fits no row of shape {self.shape}")
            if self.top_k >= self.shape[0]:
                raise DataError(
                    f"there is nothing to leave out: the teacher has {self.shape[0]} classes",
                    given=f"top_k = {self.top_k}",
                    allowed=f"1 to {self.shape[0] - 1}",
                    do="keep whole logits: leave top_k out",
                )

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        if self.top_k is not None:
            return self.layout.itemsize
        return prod(self.shape) * _DTYPES[self.dtype].itemsize

    @cached_property
    def layout(self) -> np.dtype:
        """A record of top-k classes: their numbers, the logarithm of what the others have together, their own."""
        real = "<f4" if self.dtype == "fp32" else "<f2"
        return np.dtype([("classes", "<i4", (self.top_k,)), ("log_rest", "<f4"), ("log_p", real, (self.top_k,))])

    def encode(self, name: str, value: Tensor) -> NDArray[np.uint8]:
        """Rows of a batch as records (B, r).

        Raises:
            DataError: A number is too large for the dtype.
        """
        value = value.detach()
        if tuple(value.shape[1:]) != self.shape:
            raise ValueError(f"rows of '{name}' are {tuple(value.shape[1:])}, not {self.shape}")
        if self.top_k is not None:
            return self._encode_top(name, value)
        kept = self._rounded(name, value, _DTYPES[self.dtype])
        return kept.cpu().contiguous().reshape(len(value), prod(self.shape)).view(torch.uint8).numpy()

    def _encode_top(self, name: str, logits_BC: Tensor) -> NDArray[np.uint8]:
        log_p_BC = torch.log_softmax(logits_BC.cpu().double(), dim=1)
        log_p_BK, classes_BK = log_p_BC.topk(self.top_k, dim=1)
        records = np.empty(len(logits_BC), self.layout)
        records["classes"] = classes_BK.numpy()
        records["log_rest"] = log_p_BC.scatter(1, classes_BK, -torch.inf).logsumexp(dim=1).numpy()
        real = torch.float32 if self.dtype == "fp32" else torch.float16
        records["log_p"] = self._rounded(name, log_p_BK, real).numpy()
        return records.view(np.uint8).reshape(len(records), self.record_bytes)

    def _rounded(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        kept, limit = value.to(dtype), torch.finfo(dtype).max
        low, high = torch.aminmax(value) if value.numel() else (0.0, 0.0)
        fits = bool(-limit <= low) and bool(high <= limit)  # false for what is not finite, too
        if not fits and bool((kept.isinf() & value.isfinite()).any()):
            raise DataError(
                f"the teacher's {name} do not fit {dtype}",
                given=f"largest magnitude {value[value.isfinite()].abs().max().item():.4g}",
                allowed=f"up to {limit:.4g}",
                do="--set teacher.cache_dtype=bf16 or fp32",
            )
        return kept

    def decode(self, records_Br: NDArray[np.uint8]) -> Tensor:
        """Rows as they are kept; top-k logits as log-probabilities (B, C), float32.

        The probability of classes that were left out is shared by them equally, as in TinyViT.
        """
        if not self.record_bytes:
            return torch.empty(len(records_Br), *self.shape, dtype=_DTYPES[self.dtype])
        if self.top_k is None:
            flat = torch.from_numpy(np.ascontiguousarray(records_Br)).view(_DTYPES[self.dtype])
            return flat.reshape(len(records_Br), *self.shape)
        records = np.ascontiguousarray(records_Br).view(self.layout).reshape(-1)
        share_B = torch.from_numpy(records["log_rest"] - np.float32(log(self.shape[0] - self.top_k)))
        log_p_BK = torch.from_numpy(records["log_p"].astype(np.float32))
        classes_BK = torch.from_numpy(records["classes"].astype(np.int64))
        return share_B[:, None].repeat(1, self.shape[0]).scatter_(1, classes_BK, log_p_BK)

    def masses(self, records_Br: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Probability of the kept classes together (B,)."""
        records = np.ascontiguousarray(records_Br).view(self.layout).reshape(-1)
        return -np.expm1(records["log_rest"].astype(np.float64))


def row_digest(image: bytes, draw: bytes = b"") -> bytes:
    """The 16 bytes that a row is found by: BLAKE2b of an image's own digest and the draw of its view."""
    return hashlib.blake2b(len(image).to_bytes(8, "little") + image + draw, digest_size=DIGEST_BYTES).digest()


def bytes_for(items: Mapping[str, Item], count: int) -> int:
    """Bytes on disk of ``count`` rows of each item."""
    return count * sum(item.record_bytes + ROW_BYTES for item in items.values())


class RecordStore:
    """Rows of several items under one key. Processes may write at once; each is used by one thread.

        with RecordStore.open(cache_root(), key.to_dict(), {"logits": Item((1000,), "fp16")}) as store:
            todo = store.missing(digests)
            store.append(digests[todo], {"logits": teacher(images[todo])})
            rows = store.rows(digests)

    Digests are (B, 16) uint8, or a sequence of 16 bytes each.

    Attributes:
        folder: The key's folder.
    """

    def __init__(self, folder: Path, items: Mapping[str, Item]) -> None:
        self.folder, self.items = folder, dict(items)
        self._holding = ExitStack()
        self._records = {name: _records(folder, name, item) for name, item in items.items()}

    @classmethod
    def open(cls, root: Path, key: Mapping[str, Any], items: Mapping[str, Item]) -> "RecordStore":
        """Open, and make what is not there yet.

        Args:
            key: JSON values that decide the rows besides the image: ``CacheKey.to_dict()``.
            items: What is wanted; others that lie there stay as they are.

        Raises:
            RunError: The place cannot be written.
        """
        with ExitStack() as stack:
            store = cls(stack.enter_context(held(root, key)), items)
            store._holding = stack.pop_all()
        return store

    def __enter__(self) -> "RecordStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(*((RunError,) if kind is not None else ())):  # the first error says more
            self.close()

    @property
    def nbytes(self) -> int:
        """Bytes on disk of the wanted items."""
        return sum(records.nbytes for records in self._records.values())

    @property
    def damaged(self) -> int:
        """Records that did not fit their checksum and were given up."""
        return sum(records.damaged for records in self._records.values())

    def missing(self, digests: Sequence[bytes] | NDArray[np.uint8]) -> NDArray[np.int64]:
        """Positions in the batch of rows that lack an item.

        A record is read and its checksum compared when this store first finds it; damaged ones are missing.
        """
        digests_B16 = as_digests(digests)
        lacking_B = np.zeros(len(digests_B16), bool)
        for records in self._records.values():
            lacking_B |= records.find(digests_B16) < 0
        return np.flatnonzero(lacking_B)

    def append(self, digests: Sequence[bytes] | NDArray[np.uint8], values: Mapping[str, Tensor]) -> None:
        """Keep rows; what is there already stays. They are found at once here, by other processes after ``flush``.

        Args:
            values: Each item's rows (B, ...), on any device.

        Raises:
            RunError: The disk is full; what was kept before is whole.
            DataError: A number is too large for the dtype.
        """
        digests_B16 = as_digests(digests)
        if set(values) != set(self.items):
            raise ValueError(f"items are {sorted(self.items)}, not {sorted(values)}")
        _, first = np.unique(digests_B16, axis=0, return_index=True)
        first.sort()
        for name, records in self._records.items():
            if len(values[name]) != len(digests_B16):
                raise ValueError(f"{len(values[name])} rows of '{name}' for {len(digests_B16)} digests")
            new = first[records.find(digests_B16[first]) < 0]
            if len(new):
                value = values[name]
                if len(new) < len(value):
                    value = value[torch.from_numpy(new).to(value.device)]
                records.append(digests_B16[new], self.items[name].encode(name, value))

    def rows(self, digests: Sequence[bytes] | NDArray[np.uint8]) -> dict[str, Tensor]:
        """Rows in the order of the batch, in the dtype they are kept in (top-k logits: float32), on the CPU.

        Raises:
            RunError: One is not there, or was damaged since ``missing`` looked.
        """
        digests_B16 = as_digests(digests)
        found: dict[str, Tensor] = {}
        for name, records in self._records.items():
            found[name] = self.items[name].decode(records.read(self._places(name, digests_B16)))
        return found

    def mass(self, digests: Sequence[bytes] | NDArray[np.uint8]) -> float | None:
        """Mean probability of the classes that top-k kept, over these rows; None without such an item or rows."""
        digests_B16 = as_digests(digests)
        names = [name for name, item in self.items.items() if item.top_k is not None]
        if not names or not len(digests_B16):
            return None
        return float(
            np.mean(
                [
                    self.items[name].masses(self._records[name].read(self._places(name, digests_B16))).mean()
                    for name in names
                ]
            )
        )

    def _places(self, name: str, digests_B16: NDArray[np.uint8]) -> NDArray[np.int64]:
        places_B = self._records[name].find(digests_B16)
        if (places_B < 0).any():
            raise RunError(
                f"{int((places_B < 0).sum())} of {len(places_B)} rows are not in the teacher cache, or damaged",
                given=f"{name} in {self.folder}",
                do="run again: they will be computed again",
            )
        return places_B

    def refresh(self) -> None:
        """Take note of what other processes have flushed since."""
        for records in self._records.values():
            records.refresh()

    def flush(self) -> None:
        """Wait until all appended rows are on the disk; a killed process keeps what was flushed (every 5 s).

        Raises:
            RunError: The disk is full; what was kept before is whole.
        """
        for records in self._records.values():
            records.flush()

    def close(self) -> None:
        """Flush, and let go; ``clear`` may delete the folder afterwards."""
        with self._holding:
            for records in self._records.values():
                self._holding.callback(records.close)  # all are closed, and the first error is told


def as_digests(digests: Sequence[bytes] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Digests as (B, 16) uint8.

    Raises:
        ValueError: One has another length.
    """
    if not isinstance(digests, np.ndarray):
        if any(len(digest) != DIGEST_BYTES for digest in digests):
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes")
        digests = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
    if digests.dtype != np.uint8 or digests.ndim != 2 or digests.shape[1] != DIGEST_BYTES:
        raise ValueError(f"digests are (B, {DIGEST_BYTES}) uint8, not {digests.shape} {digests.dtype}")
    return np.ascontiguousarray(digests)


def _item_folder(folder: Path, name: str, item: Item) -> Path:
    """One folder for each name and way of keeping it. The name in it is for people, its hash tells items apart."""
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:40]
    return folder / ITEMS / f"{plain}-{cache_id(_said(name, item))[:8]}"


def _said(name: str, item: Item) -> dict[str, Any]:
    return {"name": name, **asdict(item)}


def _records(folder: Path, name: str, item: Item) -> Records:
    path = _item_folder(folder, name, item)
    if not path.is_dir():
        make_once(path, {ITEM_FILE: _said(name, item)})
    return Records(path, item.record_bytes)
