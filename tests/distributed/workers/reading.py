"""One of two processes of tests/distributed/test_reading.py; each compares what they read with what it reads alone."""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from remap.data import sources, webdataset
from remap.data.fingerprint import Contents
from remap.data.splits import ImageData, Split
from remap.data.views import View, ViewSource
from remap.distributed.launch import ProcessLost, accelerator
from remap.distributed.reading import listing_together, load_together, read_digests
from remap.errors import DataError
from remap.progress import Silent

folder, rank = Path(sys.argv[1]), accelerator().process_index
word, listed, list_tar = f"webdataset:{folder}", list[str](), webdataset.list_tar
webdataset.list_tar = lambda path, *more: listed.append(path.name) or list_tar(path, *more)  # type: ignore[assignment]


def opened(word: str = word) -> ImageData:
    return sources.open_data(word, None, 0.5)


# Listing: of the plain shards, 0 and 2, each process lists one; the compressed one is held by both.
alone = opened()
assert sorted(listed) == ["train-0.tar", "train-1.tar", "train-2.tar"]
listed.clear()
with listing_together(accelerator()):
    data = opened()
assert listed == [f"train-{2 * rank}.tar", "train-1.tar"]
everything = data.everything
assert data.fingerprint() == alone.fingerprint() and len(everything) == 9
assert [everything.read(i) for i in range(9)] == [alone.everything.read(i) for i in range(9)]

# Decoding and digests: nine images in parts of four and five.
reads = list[int]()
split = Split(everything.names, everything.labels, lambda i: reads.append(i) or everything.read(i))  # type: ignore[func-returns-value]
part = list(range(4)) if rank == 0 else list(range(4, 9))
view = View(8, 1.0, "bicubic")
single = ViewSource(everything, view, memory_bytes=1e9, workers=2)
single.load(Silent(), "images")
together = ViewSource(split, view, memory_bytes=1e9, workers=2)
load_together(accelerator(), together, Silent(), "images")
assert sorted(reads) == part and together.bad == single.bad and len(single.bad) == 1
assert torch.equal(together.batch(range(9))[0], single.batch(range(9))[0])
assert together.digests(range(9)) == single.digests(range(9)) and len(reads) == len(part)

reads.clear()
contents = Contents(split)
contents.of([8, 0])  # both know some already
read_digests(accelerator(), contents, Silent(), "images")
assert sorted(reads) == sorted({0, 8, *part})
assert np.array_equal(contents.complete(Silent(), "images"), single.contents.complete(Silent(), "images"))

# What one process cannot list, or sees otherwise, ends both.
own = folder.parent / f"own-{rank}"
shutil.copytree(folder, own)
for change, kinds in (
    (lambda: (own / "train-0.tar").write_bytes(b"x" * 512), (DataError, ProcessLost)),
    (lambda: (own / f"train-{8 + rank}.tar").symlink_to(folder / "train-2.tar"), (DataError, DataError)),
):
    if rank == 0 or kinds[1] is DataError:
        change()
    try:
        with listing_together(accelerator()):
            opened(f"webdataset:{own}")
    except kinds[rank] as error:
        assert type(error) is kinds[rank], error
    else:
        raise AssertionError("nothing was raised")
    shutil.copytree(folder, own, dirs_exist_ok=True)
