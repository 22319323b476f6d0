"""Labelled images from a table: a CSV or TSV that names a file and its label in each row."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from posixpath import basename, splitext

from remap.data.file_listing import files_of, list_folder, require_few
from remap.data.folder_layout import split_named
from remap.data.image_files import Skipped, why_left_out, why_not_read
from remap.data.labeled_files import BySplit, LabeledFiles, merged
from remap.data.sources import TABLES
from remap.errors import DataError
from remap.io.checked_read import read_regular
from remap.io.names import plain
from remap.io.paths import expanded

MOST_BYTES = 2**30
# Names of columns, in lower case.
FILE = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "image_name", "image_id", "id")
LABEL = ("label", "class", "category", "target", "class_name", "label_name")
SPLIT = ("split", "subset", "partition")


class LabelTable(LabeledFiles):
    """A table, plain text in UTF-8, whose files lie in its own folder or below."""

    def recognises(self, path: Path) -> bool:
        return path.suffix.lower() in TABLES and os.path.isfile(path)

    def read(self, word: str, depth: int | None) -> tuple[BySplit, Skipped]:
        if depth not in (None, 1):
            raise DataError("data.depth is for folders of class folders", given=f"data.depth={depth}, {word}")
        root, rows = expanded(word).parent, _rows(word)
        file_at, label_at, split_at = _columns(word, rows)
        find, listing = _finder(root), files_of(root)
        splits: BySplit = {}
        skipped: list[tuple[str, str]] = []
        labels: dict[str, str] = {}
        for number, row in enumerate(rows[1:], 2):
            if not any(row):
                continue
            if len(row) != len(rows[0]):
                raise DataError(
                    f"line {number} of the table has {len(row)} cells, not {len(rows[0])}", given=plain(str(row))[:200]
                )
            path, label = find(row[file_at].strip()), row[label_at].strip()
            split = "all" if split_at is None else split_named(row[split_at])
            reason = why_left_out(path) or (None if label else "without a label")
            if split is None or reason is not None:
                skipped.append((plain(path), reason or "in no split"))
            elif labels.setdefault(path, label) != label:
                raise DataError("a file has two labels", given=f"{plain(path)}: {plain(labels[path])}, {plain(label)}")
            else:
                splits.setdefault(split, {}).setdefault(label, []).append((path, listing))
        if not (splits.get("train") or splits.get("all")):
            raise DataError("the table names no images to learn from", given=word)
        return {split: merged(by_class) for split, by_class in splits.items()}, skipped


def _rows(word: str) -> list[list[str]]:
    """Return all rows; the first one is made up where the table has no header."""
    try:
        text = read_regular(expanded(word), MOST_BYTES).decode("utf-8-sig")
        first = text.partition("\n")[0]
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True))
    except (OSError, UnicodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read {word}: {reason}", allowed="a CSV or TSV in UTF-8") from error
    require_few(len(rows), expanded(word))
    if rows and len(rows[0]) == 2 and why_not_read(rows[0][0].strip()) is None:
        rows.insert(0, [FILE[0], LABEL[0]])
    return rows


def _columns(word: str, rows: Sequence[Sequence[str]]) -> tuple[int, int, int | None]:
    """Return where the file, the label and the split are."""
    header = [name.strip().lower() for name in (rows[0] if rows else ())]
    file, label, split = (
        next((header.index(name) for name in names if name in header), None) for names in (FILE, LABEL, SPLIT)
    )
    if file is None or label is None:
        raise DataError(
            "the columns of the table are not known",
            given=f"{word}: {plain(', '.join(header))[:200] or 'empty'}",
            allowed=f"a column of files ({', '.join(FILE)}) and one of labels ({', '.join(LABEL)}),"
            f" and maybe one of splits ({', '.join(SPLIT)})",
            do="write these names into its first line",
        )
    return file, label, split


def _finder(root: Path) -> Callable[[str], str]:
    """Return what finds the file that a cell means: a path from the table's folder, or a name that is unique below it.

    The name may lack its suffix. What is not found stays as it is, and is an unreadable image.
    """
    by_name: dict[str, str | None] = {}

    def find(cell: str) -> str:
        path = cell.replace("\\", "/")
        if path.startswith("/") or ".." in path.split("/"):
            raise DataError(
                "a path in the table leads out of the table's folder",
                given=plain(cell)[:200],
                do="write paths from the folder that the table is in",
            )
        if os.path.isfile(root / path):
            return path
        if not by_name:
            for found in list_folder(root).paths:
                if why_left_out(found) is None:
                    for name in {basename(found), splitext(basename(found))[0]}:
                        by_name[name] = found if name not in by_name else None
        return by_name.get(basename(path)) or path

    return find
