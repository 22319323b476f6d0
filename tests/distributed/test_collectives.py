"""What processes send each other, and that everything comes back where it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from remap.distributed import collectives

WORKER = Path(__file__).parent / "workers" / "collectives.py"


def _tensors() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (2, 2, 2), (), (7, 1)]
    return [torch.randn(shape).to(dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("limit", [1, 40, 10**9])
def test_messages_hold_one_dtype_and_everything_once(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(collectives, "BUCKET_BYTES", limit)
    tensors = _tensors()
    buckets = list(collectives._buckets(tensors))
    assert sorted(id(t) for bucket in buckets for t in bucket) == sorted(map(id, tensors))
    for bucket in buckets:
        assert len({tensor.dtype for tensor in bucket}) == 1
        assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket) <= limit
    assert len(buckets) == {1: 10, 10**9: 2}.get(limit, len(buckets))


def test_a_message_is_spread_over_its_tensors() -> None:
    tensors = [t for t in _tensors() if t.dtype == torch.float32]
    flat = torch.arange(sum(t.numel() for t in tensors), dtype=torch.float32)
    collectives._copy_back(flat, tensors)
    assert torch.equal(torch.cat([t.reshape(-1) for t in tensors]), flat)


def test_nothing_to_send_sends_nothing() -> None:
    assert list(collectives._buckets([])) == []


def test_two_processes_exchange_rows_and_json_without_pickle(fork_command: Callable[..., Any]) -> None:
    """Expected values stand in the worker; torch's pickling of objects raises there."""
    fork_command(str(WORKER), count=2).end()
