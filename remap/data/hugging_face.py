"""Data sets of Hugging Face: saved by ``save_to_disk``, a folder of Parquet files, or a name on the hub."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remap.data.arrow_rows import table_rows
from remap.data.folder_layout import split_named
from remap.data.rows import Row, Rows, require_package
from remap.data.shards import of_split, shards
from remap.data.words import Word
from remap.errors import DataError, RemapError
from remap.io.names import first_line, plain
from remap.io.paths import expanded

# What ``save_to_disk`` writes into a folder of splits, or of one data set.
SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))


class HuggingFace(Rows):
    """Read by ``datasets``, which keeps what it downloads, and copies of Parquet files, in its own cache (HF_HOME).

    No code of a data set is run. Other options: ``config=`` and ``revision=`` of a data set on the hub.
    """

    several_labels = True

    def recognises(self, path: Path) -> bool:
        return any(all(os.path.isfile(path / name) for name in names) for names in SAVED)

    def rows(self, word: Word, labeled: bool) -> Iterator[Row]:
        require_package("datasets", "datasets", "a data set of Hugging Face")
        opened = _opened(self, word)
        for split, one in opened:
            if split == "all" and len(opened) == 1 and "split" not in word.options:
                split = None  # everything there is
            # The table itself, not a copy; its metadata name the classes.
            table = one.with_format("arrow")[:].replace_schema_metadata(one.features.arrow_schema.metadata)
            where = "all" if split is None else split or "unnamed"
            yield from table_rows(table, where, split, word.options, labeled)


def _opened(source: HuggingFace, word: Word) -> list[tuple[str | None, Any]]:
    """Return the ``datasets.Dataset`` of each split; of None where there are no splits."""
    import datasets

    path, options = expanded(word.rest), word.options
    try:
        if source.recognises(path):
            found = datasets.load_from_disk(str(path))
            if isinstance(found, dict):
                return list(found.items())
            name = str(found.split)  # "train[:1000]" of a part, which is everything there is
            return [(name if split_named(name) or name == options.get("split") else None, found)]
        if os.path.exists(path):
            files: dict[str, list[str]] = {}
            names: dict[str, str | None] = {}
            for file, _, split in of_split(shards(word.rest, (".parquet",)), options.get("split")):
                # datasets wants letters, and not "all"; "" is the split of files that say none beside others that do.
                key = re.sub(r"\W|^all$", "_", split or "unnamed")
                files.setdefault(key, []).append(str(file))
                names[key] = key if split else split
            return [(names[key], one) for key, one in datasets.load_dataset("parquet", data_files=files).items()]
        if word.rest.count("/") != 1:  # datasets would take "imagefolder" for a reader of the current folder
            raise DataError("not the name of a data set on the hub", given=word.rest, allowed="OWNER/NAME, or a folder")
        names = {"name": options.get("config"), "split": options.get("split"), "revision": options.get("revision")}
        found = datasets.load_dataset(word.rest, **names)
        return list(found.items()) if isinstance(found, dict) else [(options.get("split"), found)]
    except RemapError:
        raise
    except Exception as error:  # of its many kinds; all mean that there is no such data set, or no way to it
        reason = plain(first_line(error))[:300]
        raise DataError(
            f"cannot open the data set: {reason}",
            given=word.rest,
            allowed="a folder of save_to_disk or of Parquet files, or a name on the hub, as uoft-cs/cifar10",
        ) from error
