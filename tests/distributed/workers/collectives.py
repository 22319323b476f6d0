"""One of two processes of tests/distributed/test_collectives.py; each checks what it got from the other."""

import sys
from types import SimpleNamespace

import numpy as np
import torch

from remap.distributed import collectives
from remap.distributed.launch import accelerator, broadcast_str


def refuse(*arguments: object) -> None:
    raise AssertionError("something was pickled or unpickled")


# What torch's own gathering of objects goes through.
torch.distributed.distributed_c10d._object_to_tensor = torch.distributed.distributed_c10d._tensor_to_object = refuse
rank = accelerator().process_index
assert accelerator().num_processes == 2

# Rows of different numbers on each process, none on one of them, and none at all.
for numbers in ((3, 5), (0, 2), (4, 0), (0, 0)):
    sent = [np.arange(2 * n, dtype=np.int64).reshape(n, 2) - 7 for n in numbers]
    for dtype in (np.int64, np.uint8, np.float32):
        received = collectives.all_gather_rows(accelerator(), sent[rank].astype(dtype))
        assert [rows.dtype for rows in received] == [dtype, dtype]
        assert all(np.array_equal(one, other.astype(dtype)) for one, other in zip(received, sent, strict=True))

values = [{"é": [1, None]}, {"\udc80": 0.1, "x": "y" * 1000}]
assert collectives.all_gather_json(accelerator(), values[rank]) == values
assert broadcast_str(["runs/\udcff-1", "another"][rank]) == "runs/\udcff-1"

# Unreadable images: each process has found its own.
known: dict[int, str] = {}
source = SimpleNamespace(bad=[{3: "not an image"}, {5: "empty", 8: "gone"}][rank], note_bad=known.update)
collectives.share_unreadable(accelerator(), source)
assert known == {3: "not an image", 5: "empty", 8: "gone"}

# Five chunks on two processes: the last round has one. The image number 4 cannot be read.
chunks = collectives.index_chunks(9, 2)
computed = []


def load(chunk: np.ndarray | None) -> tuple[torch.Tensor, np.ndarray]:
    readable = np.asarray([i for i in ([] if chunk is None else chunk) if i != 4], dtype=np.int64)
    return torch.from_numpy(readable), readable


def compute(images: torch.Tensor) -> dict[str, torch.Tensor]:
    computed.extend(images.tolist())
    return {"rows": images[:, None].expand(-1, 3).to(torch.bfloat16), "square": images.double() ** 2}


gathered = list(collectives.compute_and_gather(accelerator(), chunks, load, compute, lambda: None))
assert [chunk.tolist() for chunk, _, _ in gathered] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
assert [indices.tolist() for _, indices, _ in gathered] == [[0, 1], [2, 3], [5], [6, 7], [8]]
for _, indices, rows in gathered:
    assert rows["rows"].tolist() == [[i] * 3 for i in indices] and rows["square"].tolist() == [i * i for i in indices]
assert computed == [[0, 1, 5, 8], [2, 3, 6, 7]][rank]
sys.exit(0)
