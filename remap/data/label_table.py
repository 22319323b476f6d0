"""Labelled images from a table: a CSV or TSV that names a file and its label in each row, or a list without header."""

import csv
import io
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from posixpath import basename, splitext

from remap.data import MULTILABEL
from remap.data.file_listing import files_of, list_folder, require_few
from remap.data.image_files import why_left_out, why_not_read
from remap.data.rows import LABEL, LABELS, Row, Rows, labels_of
from remap.data.sources import LISTS, TABLES
from remap.data.words import Word
from remap.errors import DataError
from remap.io.checked_read import read_regular
from remap.io.human_size import number_of
from remap.io.names import plain, same_name
from remap.io.paths import absolute, expanded

MOST_BYTES = 2**30
# Names of columns, in lower case.
FILE = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "image_name", "image_id", "id")
SPLIT = ("split", "subset", "partition")


class LabelTable(Rows):
    """Plain text in UTF-8, whose files lie in its own folder or below, or in the folder that ``folder=`` names.

    Other options: ``path=``, ``label=`` and ``split_column=`` name columns; ``separator=`` stands between the labels
    of an image. With ``task: multilabel`` the labels may also be columns of 0 and 1, one a class: those that ``label=``
    lists (A|B|C), or all others where no column has the usual name of a label.
    """

    several_labels = True

    def recognises(self, path: Path) -> bool:
        return path.suffix.lower() in TABLES + LISTS and os.path.isfile(path)

    def rows(self, word: Word, labeled: bool) -> Iterator[Row]:
        options = word.options
        rows = _cells(word.rest)
        header = [name.strip().lower() for name in (rows[0] if rows else ())]
        file_at = _column("files", options.get("path"), FILE, header, word.rest, needed=True)
        split_at = _column("splits", options.get("split_column"), SPLIT, header, word.rest, needed=False)
        several = labeled and self.task == MULTILABEL
        classes = _class_columns(options.get("label"), rows[0], {file_at, split_at}) if several else {}
        named, needed = None if classes else options.get("label"), labeled and not classes
        label_at = _column("labels", named, LABEL + LABELS, header, word.rest, needed=needed)
        separator = options.get("separator")
        if needed and separator is None and (several or header[label_at] in LABELS):
            do = f"state what stands between them: {shlex.quote(f'csv:{word.rest},separator=;')}"
            raise DataError("a column of several labels needs a separator", given=header[label_at], do=do)
        root = expanded(options.get("folder", expanded(word.rest).parent))
        find, listing = _finder(root), files_of(root)
        for number, row in enumerate(rows[1:], 2):
            if not any(row):
                continue
            if len(row) != len(header):
                what = f"line {number} of {word.rest} has {number_of(len(row), 'cell')}, not {len(header)}"
                raise DataError(plain(what), given=plain(str(row))[:200])
            if not row[file_at].strip():
                yield Row(f"line {number}", listing, (), reason="no file is named")
                continue
            path = find(row[file_at].strip())
            labels: tuple[str, ...] = ()
            if labeled:
                labels = _set_classes(row, classes, number) if classes else labels_of(row[label_at], separator)
            yield Row(path, listing, labels, None if split_at < 0 else row[split_at].strip(), why_left_out(path))


def _class_columns(named: str | None, header: list[str], others: set[int]) -> dict[str, int]:
    """Return the columns of 0 and 1 by their class; none where one column holds all labels."""
    names = [name.strip() for name in header]
    if named is not None:
        listed = [name.strip() for name in named.split("|")] if "|" in named else []
        if missing := [name for name in listed if name not in names]:
            raise DataError(
                "there are no such columns", given=", ".join(missing), allowed=plain(", ".join(names))[:200]
            )
        return {name: names.index(name) for name in listed}
    if any(name.lower() in LABEL + LABELS for name in names):
        return {}
    return {name: at for at, name in enumerate(names) if at not in others}


def _set_classes(row: list[str], classes: dict[str, int], line: int) -> tuple[str, ...]:
    """Return the classes that a row marks with 1."""
    for name, at in classes.items():
        if row[at].strip() not in ("0", "1"):
            given = plain(f"line {line}, column {name}: {row[at]}")[:200]
            do = "name the columns of 0 and 1: csv:FILE,label=A|B|C, or the one column of labels: label=COLUMN"
            raise DataError("a column of a class holds something other than 0 and 1", given=given, do=do)
    return tuple(name for name, at in classes.items() if row[at].strip() == "1")


def _cells(word: str) -> list[list[str]]:
    """Return all rows; the first one is made up where the table has no header."""
    path = expanded(word)
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8-sig")
        first = text.partition("\n")[0]
        if path.suffix.lower() in LISTS and not any(mark in first for mark in ",;\t"):
            rows = [line.strip().rsplit(None, 1) for line in text.splitlines()]  # names may hold spaces
        else:
            marks = "\t,;" if path.suffix.lower() == ".tsv" else ",;\t"  # of as many the first one
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(marks, key=first.count), strict=True))
    except (OSError, UnicodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read {word}: {reason}", allowed="a CSV or TSV in UTF-8") from error
    require_few(len(rows), path)
    if rows and len(rows[0]) == 2 and why_not_read(rows[0][0].strip()) is None:
        rows.insert(0, [FILE[0], LABEL[0]])
    return rows


def _column(what: str, named: str | None, names: Sequence[str], header: list[str], word: str, needed: bool) -> int:
    """Return where a column is, by the name that the user gave or by the usual ones; -1 where it need not be there."""
    wanted = names if named is None else [named.strip().lower()]
    at = next((header.index(name) for name in wanted if name in header), -1)
    if at < 0 and (needed or named is not None):
        raise DataError(
            "the columns of the table are not known",
            given=f"{word}: {plain(', '.join(header))[:200] or 'empty'}",
            allowed=f"a column of {what}: {', '.join(wanted)}",
            do="write such a name into its first line, or name the columns: csv:FILE,path=COLUMN,label=COLUMN"
            " (of a column of 0 and 1 a class: --set task=multilabel; remap data check and init: --multilabel)",
        )
    return at


def _finder(root: Path) -> Callable[[str], str]:
    """Return what finds the file that a cell means: a path from the root or below it, or a name that is unique below.

    The name may lack its suffix. What is not found stays as it is, and is an unreadable image.
    """
    by_name: dict[str, list[str]] = {}

    def find(cell: str) -> str:
        path = cell.replace("\\", "/")
        if path.startswith("/") and "\0" not in path:
            folder, name = os.path.split(path)
            path = os.path.relpath(os.path.join(absolute(folder), name), absolute(root)).replace(os.sep, "/")
        if path.startswith("/") or ".." in path.split("/"):
            raise DataError(
                "a path in the table leads out of the table's folder",
                given=plain(cell)[:200],
                do="write paths from the folder that the table is in, or name another: csv:FILE,folder=FOLDER",
            )
        path = "/".join(part for part in path.split("/") if part not in ("", "."))  # ./images/1.jpg, as find writes
        if os.path.isfile(root / path):
            return path
        if not by_name:
            for found in list_folder(root).paths:
                if why_left_out(found) is None:
                    for name in {same_name(basename(found)), same_name(splitext(basename(found))[0])}:
                        by_name.setdefault(name, []).append(found)
        path_there = same_name(path)  # tables are typed on one system, and files come from another
        # With its folders, or train/1.jpg that is missing would be test/1.jpg.
        fitting = [
            found
            for found in by_name.get(basename(path_there), ())
            if any(f"/{same_name(one)}".endswith(f"/{path_there}") for one in (found, splitext(found)[0]))
        ]
        if len(fitting) > 1:
            raise DataError(
                "a name in the table fits several files",
                given=plain(f"{cell}: {', '.join(fitting[:3])}")[:200],
                do="write its folder before it, or name the folder of the images: csv:FILE,folder=FOLDER",
            )
        return fitting[0] if fitting else path

    return find
