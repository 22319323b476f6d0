"""Safetensors files that may come from anybody: what the header says is checked before a tensor is read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from remap.errors import WeightsError
from remap.io.checked_json import parse_json
from remap.io.checked_read import open_regular
from remap.io.names import plain

# Of torch, and the largest header that safetensors itself reads.
MOST_DIMENSIONS, MOST_HEADER_BYTES = 64, 100_000_000
# What is in memory takes at most this many times the bytes on the disk (8-bit weights in float32, and file systems
# that compress), and FREE_BYTES are allowed for any file.
MOST_UNPACKED, FREE_BYTES = 8, 2**24


def read_safetensors(path: Path, wanted: Callable[[str], bool] = lambda _name: True) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: all, or those of wanted names.

    Raises:
        WeightsError: It is missing, truncated, mostly holes or not a safetensors file.
    """
    try:
        _require_readable(path)
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118 - not a mapping
    except Exception as error:  # of strange types and sizes, torch and the reader raise many kinds
        raise WeightsError(f"cannot read {path} as safetensors: {_reason(error)}") from error


def file_problem(path: Path) -> str:
    """Return why a safetensors file cannot be read, by its header and length; empty where it can. Reads no tensor."""
    try:
        _require_readable(path)
        with safe_open(path, framework="pt"):
            return ""
    except Exception as error:  # as above
        return _reason(error)


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_lines(error)
    return reason or type(error).__name__


def read_metadata(path: Path) -> dict[str, str]:
    """Return the text beside the tensors; empty where there is none.

    Raises:
        OSError: As ``open_regular``.
        ValueError: It is not a safetensors file.
    """
    return dict(_header(path).get("__metadata__") or {})


def stored_bytes(path: Path) -> int:
    """Return the bytes of a regular file that are really on the disk: holes do not count.

    Raises:
        OSError: As ``open_regular``.
    """
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
    # File systems of other machines may not count blocks; a header takes one, so 0 cannot be true of a large file.
    held = getattr(status, "st_blocks", 0) * 512
    return min(status.st_size, held) if held else status.st_size


def first_lines(error: Exception) -> str:
    """Return the text of another library's error in one line, short and fit for a terminal."""
    return plain(" ".join(str(error).split()))[:300]


def _header(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MOST_HEADER_BYTES:
            raise ValueError(f"its header would be {length:,} bytes long")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    return header


def _require_readable(path: Path) -> None:
    """Check what neither safetensors nor torch refuses without a crash: shapes of very many dimensions."""
    for name, row in _header(path).items():
        shape = row.get("shape", ()) if isinstance(row, dict) else ()
        if name != "__metadata__" and isinstance(shape, list) and len(shape) > MOST_DIMENSIONS:
            given = f"{plain(name)[:80]} has {len(shape):,} dimensions"
            raise ValueError(f"a tensor of more than {MOST_DIMENSIONS} dimensions ({given})")
