"""Parquet files with encoded images. Each is copied when it is opened, since its rows cannot be read one by one."""

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from remap.data.arrow_rows import columns, table_rows
from remap.data.rows import Row, Rows, require_package
from remap.data.shards import Shard, of_split, shards
from remap.data.tar_listing import FREE_GROWTH, MOST_GROWTH
from remap.data.words import Word, parsed
from remap.errors import DataError
from remap.io.checked_read import open_regular
from remap.io.names import first_line

# Rows that are in memory while a file is copied.
CHUNK = 64


class Parquet(Rows):
    """A file, a folder or a pattern of files, whose names may say their split: train-00000-of-00004.parquet."""

    several_labels = True

    def recognises(self, path: Path) -> bool:
        return path.suffix.lower() == ".parquet" and os.path.isfile(path)

    def shards(self, word: str) -> list[Shard]:
        found = parsed(word)
        return of_split(shards(found.rest, (".parquet",)), found.options.get("split"))

    def rows(self, word: Word, labeled: bool) -> Iterator[Row]:
        require_package("pyarrow", "parquet", "Parquet")
        for path, name, split in of_split(shards(word.rest, (".parquet",)), word.options.get("split")):
            yield from table_rows(_copied(path, word.options, labeled), name, split, word.options, labeled)


def _copied(path: Path, options: Mapping[str, str], labeled: bool) -> Any:
    """Return a file as a table on the disk: a temporary file without a name, which is gone with the process.

    Raises:
        DataError: It cannot be read, it grows out of bounds, or there is no room for it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(path) as source, tempfile.TemporaryFile() as target:
            file = pq.ParquetFile(source)
            chosen = [name for name in columns(file.schema_arrow, options, labeled) if name is not None]
            limit, written = max(FREE_GROWTH, MOST_GROWTH * os.path.getsize(path)), 0
            schema = pa.schema([file.schema_arrow.field(name) for name in chosen], file.schema_arrow.metadata)
            with pa.ipc.new_stream(target, schema) as writer:
                for batch in file.iter_batches(CHUNK, columns=chosen, use_threads=False):
                    written += batch.nbytes
                    if written > limit:
                        raise DataError(f"{path} grows out of bounds when it is decompressed", given=f"{limit:,} bytes")
                    writer.write_batch(batch)
            target.flush()
            mapped = mmap.mmap(target.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
    except (OSError, pa.ArrowException) as error:  # ArrowInvalid among them
        do = f"it is copied to {tempfile.gettempdir()} when it is opened; TMPDIR names another disk"
        raise DataError(f"cannot read {path} as a Parquet file: {first_line(error)[:200]}", do=do) from error
