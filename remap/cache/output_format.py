"""How a teacher output is stored: as records of bytes. Letters: B images, C classes, K stored classes, r bytes."""

from dataclasses import dataclass
from functools import cached_property
from math import log, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remap.errors import DataError

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class OutputFormat:
    """How one output is stored.

    Args:
        shape: Of one image's row.
        dtype: "fp32", "fp16" or "bf16".
        top_k: For logits (C,): store the K most probable classes and the probability of all others together, as TinyViT
            does (Wu et al. 2022, arXiv 2207.10666); log-probabilities are then fp32, or fp16 for both short types.
    """

    shape: tuple[int, ...]
    dtype: str = "fp32"
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {self.dtype!r}")
        if self.top_k is None:
            return
        if len(self.shape) != 1 or self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} does not fit rows of shape {self.shape}")
        if self.top_k >= self.shape[0]:
            raise DataError(
                f"there is nothing to leave out: the teacher has {self.shape[0]} classes",
                given=f"top_k = {self.top_k}",
                allowed=f"1 to {self.shape[0] - 1}",
                do="store all logits: leave top_k out",
            )

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        if self.top_k is not None:
            return self.layout.itemsize
        return prod(self.shape) * _DTYPES[self.dtype].itemsize

    @cached_property
    def layout(self) -> np.dtype:
        """A record of top-k classes: their numbers, the log-probability of all others together, their own."""
        real = "<f4" if self.dtype == "fp32" else "<f2"
        return np.dtype([("classes", "<i4", (self.top_k,)), ("log_rest", "<f4"), ("log_p", real, (self.top_k,))])

    def encode(self, name: str, value: Tensor) -> NDArray[np.uint8]:
        """Return rows of a batch as records (B, r).

        Raises:
            DataError: A number is too large for the dtype.
        """
        value = value.detach()
        if tuple(value.shape[1:]) != self.shape:
            raise ValueError(f"rows of '{name}' are {tuple(value.shape[1:])}, not {self.shape}")
        if self.top_k is not None:
            return self._encode_top(name, value, self.top_k)
        # Rounded on the device, so that half the bytes travel to the CPU for a short type.
        rounded = _rounded(name, value, _DTYPES[self.dtype])
        return rounded.cpu().contiguous().reshape(len(value), prod(self.shape)).view(torch.uint8).numpy()

    def _encode_top(self, name: str, logits_BC: Tensor, top_k: int) -> NDArray[np.uint8]:
        # float64: the probability of the other classes may be far below what float32 can tell from 0.
        log_p_BC = torch.log_softmax(logits_BC.cpu().double(), dim=1)
        log_p_BK, classes_BK = log_p_BC.topk(top_k, dim=1)
        # One structured array, so that a record is one piece of bytes with all its parts.
        records = np.empty(len(logits_BC), self.layout)
        records["classes"] = classes_BK.numpy()
        records["log_rest"] = log_p_BC.scatter(1, classes_BK, -torch.inf).logsumexp(dim=1).numpy()
        # Never bf16: numpy has no such type, and log-probabilities of the largest classes fit fp16 well.
        real = torch.float32 if self.dtype == "fp32" else torch.float16
        records["log_p"] = _rounded(name, log_p_BK, real).numpy()
        return records.view(np.uint8).reshape(len(records), self.record_bytes)

    def decode(self, records_Br: NDArray[np.uint8]) -> Tensor:
        """Return rows as they are stored; top-k logits as log-probabilities (B, C), float32.

        The probability of the classes that were left out is shared by them equally, as in TinyViT.
        """
        # A shape with a 0 in it has no bytes, which torch cannot view as another type.
        if not self.record_bytes:
            return torch.empty(len(records_Br), *self.shape, dtype=_DTYPES[self.dtype])
        if self.top_k is None:
            flat = torch.from_numpy(np.ascontiguousarray(records_Br)).view(_DTYPES[self.dtype])
            return flat.reshape(len(records_Br), *self.shape)
        # All classes start with an equal share of the rest; the stored ones then get their own.
        records = self._structured(records_Br)
        share_B = torch.from_numpy(records["log_rest"] - np.float32(log(self.shape[0] - self.top_k)))
        log_p_BK = torch.from_numpy(records["log_p"].astype(np.float32))
        classes_BK = torch.from_numpy(records["classes"].astype(np.int64))
        return share_B[:, None].repeat(1, self.shape[0]).scatter_(1, classes_BK, log_p_BK)

    def masses(self, records_Br: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return the probability of the stored classes together (B,)."""
        # Not 1 - exp: a certain teacher leaves others less than float32 can tell from 0.
        return -np.expm1(self._structured(records_Br)["log_rest"].astype(np.float64))

    def _structured(self, records_Br: NDArray[np.uint8]) -> np.ndarray:
        return np.ascontiguousarray(records_Br).view(self.layout).reshape(-1)


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    rounded, limit = value.to(dtype), torch.finfo(dtype).max
    low, high = torch.aminmax(value) if value.numel() else (0.0, 0.0)
    # One pass over the numbers decides for most batches; it is false for what is not finite, too.
    fits = bool(-limit <= low) and bool(high <= limit)
    if not fits and bool((rounded.isinf() & value.isfinite()).any()):
        raise DataError(
            f"the teacher's {name} do not fit {dtype}",
            given=f"largest magnitude {value[value.isfinite()].abs().max().item():.4g}",
            allowed=f"up to {limit:.4g}",
            do="--set teacher.cache_dtype=bf16 or fp32",
        )
    return rounded
