"""Rows of predictions as JSONL, CSV or Parquet, by the ending of the file; never more than a chunk in memory."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from remap.errors import RunError
from remap.io.checked_json import parse_json
from remap.io.names import plain
from remap.io.versions import install_command

FORMATS = (".jsonl", ".csv", ".parquet")
# Rows of one row group of a Parquet file.
CHUNK = 4096


def require_writable(path: Path) -> None:
    """Refuse a file whose ending is unknown, or whose format needs a package that is not installed.

    Raises:
        RunError: It is one.
    """
    if path.suffix not in FORMATS:
        raise RunError(
            "predictions are not written in such a file",
            given=path,
            allowed=f"a name that ends in {', '.join(FORMATS)}",
        )
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise RunError("Parquet needs pyarrow", given=path, do=f"{install_command('parquet')}, or write .jsonl or .csv")


def write_rows(
    path: Path, lines: Iterable[bytes], settings: Mapping[str, Any], classes: Mapping[str, Sequence[str]]
) -> None:
    """Write JSON rows to a new file in its format.

    Args:
        settings: ``tasks``, ``top``, ``probabilities`` and ``embeddings`` decide the columns.
        classes: By task; a Parquet file holds them in its metadata, as JSON under "classes".
    """
    if path.suffix == ".parquet":
        _write_parquet(path, map(_flat, lines), _columns(settings), classes)
        return
    with open(path, "wb") as file:
        if path.suffix == ".jsonl":
            file.writelines(lines)
            return
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        table = csv.DictWriter(text, _columns(settings), extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({name: _cell(value) for name, value in _flat(line).items()} for line in lines)
        text.detach()


def _columns(settings: Mapping[str, Any]) -> list[str]:
    given = {
        "task": any(settings["tasks"]),
        "top": settings.get("top") != 1,  # not there where an image has any number of classes
        "probabilities": settings["probabilities"],
        "embedding": settings["embeddings"],
    }
    names = ("path", "task", "class", "index", "probability", "top", "probabilities", "embedding", "error")
    return [name for name in names if given.get(name, True)]


def _flat(line: bytes) -> dict[str, Any]:
    """Return a row with its likeliest class in cells of its own, and names that every reader takes."""
    row = parse_json(line)
    names = {name: plain(row[name]) for name in ("path", "task") if name in row}
    top = [{**one, "class": plain(one["class"])} for one in row["top"]]
    return {**row, **(top[0] if top else {}), **names, "top": top}


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _write_parquet(
    path: Path, rows: Iterator[dict[str, Any]], columns: list[str], classes: Mapping[str, Sequence[str]]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    text, number = pa.string(), pa.float32()
    best = pa.struct([("class", text), ("index", pa.int32()), ("probability", number)])
    types = {"index": pa.int32(), "probability": number, "top": pa.list_(best)}
    types |= {"probabilities": pa.list_(number), "embedding": pa.list_(number)}
    schema = pa.schema([(name, types.get(name, text)) for name in columns])
    named = {name: list(names) for name, names in classes.items()}
    schema = schema.with_metadata({"classes": json.dumps(named)})
    with parquet.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(rows, CHUNK)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
