"""Images in a column of an Arrow table: what Parquet and Hugging Face data sets hold."""

import errno
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isnan
from posixpath import basename, splitext
from typing import Any

from remap.data.file_listing import Listing
from remap.data.image_files import why_not_read
from remap.data.images import MAX_BYTES
from remap.data.rows import LABEL, LABELS, Row
from remap.errors import DataError
from remap.io.names import plain

IMAGE = ("image", "img", "picture", "photo", "jpg", "png", "bytes")


def table_rows(table: Any, where: str, split: str | None, options: Mapping[str, str], labeled: bool) -> Iterator[Row]:
    """Yield the rows of a ``pyarrow.Table``, whose images stay where they are until they are read.

    An image is its encoded content, alone or as "bytes" beside its "path", which gives the suffix and is never opened.
    A label is a text or a number; numbers have the class names that the table's metadata of Hugging Face give them.

    Args:
        where: What the rows' names begin with.

    Raises:
        DataError: The table is damaged, its columns are not known, or it holds the paths of its images only.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    image_at, label_at = columns(table.schema, options, labeled)
    table = table.select([image_at] if label_at is None else [image_at, label_at])
    try:
        table.validate(full=True)  # offsets of a stranger's file may lead anywhere
    except pa.ArrowInvalid as error:
        raise DataError("a table is damaged", given=f"{where}: {plain(str(error))[:200]}") from error
    images, paths = table[image_at], [None] * len(table)
    if pa.types.is_struct(images.type):
        if images.type.get_field_index("path") >= 0:
            paths = pc.struct_field(images, "path").to_pylist()
        images = pc.struct_field(images, "bytes")
    if len(images) and images.null_count == len(images):
        do = "write the data set with its images: Dataset.save_to_disk does"
        raise DataError("a table holds the paths of images, not the images", given=where, do=do)
    sizes_N = pc.fill_null(pc.binary_length(images), -1).to_numpy()

    def index_of(name: str) -> int:
        return int(basename(name).partition(".")[0])

    def read(name: str) -> bytes:
        index = index_of(name)
        if not 0 <= sizes_N[index] <= MAX_BYTES:
            raise OSError(errno.EFBIG, "not in the table" if sizes_N[index] < 0 else f"larger than {MAX_BYTES:,} bytes")
        content: bytes = images[index].as_py()
        return content

    listing = Listing((), (), read, lambda name: int(sizes_N[index_of(name)]))
    labels: Iterable[str | tuple[str, ...]] = [""] * len(table)
    if label_at is not None:
        labels = _labels(table, label_at, where)
    for index, (path, label) in enumerate(zip(paths, labels, strict=True)):
        suffix = splitext(path or "")[1]  # without one the content decides alone
        name = f"{where}/{index:07d}{suffix}"
        yield Row(name, listing, label, split, why_not_read(name) if suffix else None)


def columns(schema: Any, options: Mapping[str, str], labeled: bool) -> tuple[str, str | None]:
    """Return the names of the columns of images and of labels; None for the latter where they are not needed.

    Raises:
        DataError: There are none, or several.
    """
    import pyarrow.types as types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            at = kind.get_field_index("bytes")
            return at >= 0 and holds_bytes(kind.field(at).type)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    images = [field.name for field in schema if holds_bytes(field.type)]
    image = _one(schema, "image", options.get("image"), images, IMAGE, images)
    if not labeled:
        return image, None
    others = [field.name for field in schema if field.name != image]
    classes = [name for name in others if class_names(schema, name)]
    return image, _one(schema, "label", options.get("label"), others, LABEL + LABELS, classes)


def _one(
    schema: Any, what: str, named: str | None, allowed: Sequence[str], usual: Sequence[str], typed: Sequence[str]
) -> str:
    """Return the column that the user named, else the only one of the right type, else the only one of a usual name."""
    found = [name for name in (typed if named is None else allowed) if named in (None, name)]
    if len(found) != 1 and named is None:
        found = [name for name in found or allowed if name.lower() in usual]
    usually = [name for name in allowed if name.lower() in usual]
    sure = named is not None or not usually or found[0] in usually if found else False  # else two may be meant
    if len(found) == 1 and sure:
        return found[0]
    kinds = {field.name: field.type for field in schema}
    if named is not None and named in kinds and what == "image":
        raise DataError(
            f"the column {plain(named)} holds no images",
            given=f"{plain(named)} ({kinds[named]})",
            allowed=plain(", ".join(allowed)) or "columns of bytes, or of bytes and paths",
            do="name another column; a table of paths and labels is read as a CSV: --data csv:FILE",
        )
    or_split = "; or take the split that has labels: ,split=NAME" if what == "label" else ""
    raise DataError(
        f"the column of the {what}s is not known",
        given=plain(", ".join(f"{field.name} ({field.type})" for field in schema))[:300],
        allowed=plain(", ".join(allowed)) or None,
        do=f"name it: parquet:FILE,{what}=COLUMN (or hf: in place of parquet:){or_split}",
    )


def class_names(schema: Any, column: str) -> tuple[str, ...]:
    """Return the class names that ``datasets`` stores with a column of class numbers or of lists of them; else none."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if "names" in feature else feature["feature"]["names"]
        return tuple(names) if all(isinstance(name, str) for name in names) else ()
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()


def _labels(table: Any, column: str, where: str) -> Iterator[str | tuple[str, ...]]:
    """Yield the label of each row; of lists all labels. Without a value, with NaN or class -1, there is none."""
    names = class_names(table.schema, column)
    for index, value in enumerate(table[column].to_pylist()):
        values = value if isinstance(value, list) else [value]
        if names and not all(one is None or (isinstance(one, int) and -1 <= one < len(names)) for one in values):
            raise DataError("a label has no class name", given=plain(f"{where}, row {index}: {value}")[:200])
        try:
            texts = [
                names[one] if names else _text(one) for one in values if one is not None and not (names and one < 0)
            ]
        except UnicodeDecodeError as error:
            raise DataError("a label is not text", given=plain(f"{where}, row {index}: {value}")[:200]) from error
        yield tuple(text for text in texts if text) if isinstance(value, list) else "".join(texts)


def _text(value: Any) -> str:
    if isinstance(value, bytes):  # what some writers store texts as
        return value.decode()
    return "" if isinstance(value, float) and isnan(value) else str(value)
