"""Images, labels, views and the order they are seen in. The table of data sources; listing it imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from remap.registry import Entry, Registry

# What an image's label is: one class, or any number of them.
CLASSES: Final = "classes"
MULTILABEL: Final = "multilabel"
# What networks are compared by, in summaries and on the screen.
METRIC = {CLASSES: "accuracy", MULTILABEL: "mAP"}
# What makes probabilities of logits.
ACTIVATION = {CLASSES: "softmax", MULTILABEL: "sigmoid"}


def metric_in(record: Mapping[str, Any]) -> str | None:
    """Return which of these a record of metrics has; None where it has none."""
    return next((name for name in METRIC.values() if name in record), None)


@dataclass(frozen=True, kw_only=True)
class SourceEntry(Entry):
    """One kind of data source; its target is a subclass of ``remap.data.sources.Source``.

    Attributes:
        by_path: It is recognised by what lies at a path; the others are chosen by name.
        takes: What follows "NAME:", one of "path", "name" and "path or name"; empty where the source says it itself.
        options: Keys that may follow, as in NAME:REST,KEY=VALUE; "folder" and "root" are paths.
    """

    category: str = "data"
    paper: str = ""
    by_path: bool = False
    takes: str = ""
    options: tuple[str, ...] = ()


SOURCES: Registry[SourceEntry] = Registry(
    "data source",
    "sources",
    [
        SourceEntry(
            name="digits",
            target="remap.data.digits:Digits",
            summary="1,797 scanned digits that come with scikit-learn: 1,000 to learn from, 797 to evaluate on",
        ),
        SourceEntry(
            name="drawings",
            target="remap.data.drawings:Drawings",
            summary="588 emoji of 16 classes, which clip:mini has not seen: 372 to learn from, 216 to evaluate on",
        ),
        SourceEntry(
            name="folders",
            target="remap.data.class_folders:ClassFolders",
            summary="a folder of class folders, with or without train, val and test; or a tar or zip of one",
            by_path=True,
        ),
        SourceEntry(
            name="csv",
            target="remap.data.label_table:LabelTable",
            summary="a CSV, TSV or list (.txt) of files and labels, with or without a column of splits",
            by_path=True,
            takes="path",
            options=("path", "label", "split_column", "split", "separator", "folder"),
        ),
        SourceEntry(
            name="vtab",
            target="remap.data.vtab:Vtab",
            summary="a folder of VTAB-1k: train800val200.txt to learn from, test.txt to evaluate on, images/",
            by_path=True,
            takes="path",
        ),
        SourceEntry(
            name="parquet",
            target="remap.data.parquet:Parquet",
            summary="Parquet files with encoded images (extra: parquet)",
            by_path=True,
            takes="path",
            options=("image", "label", "split"),
        ),
        SourceEntry(
            name="hf",
            target="remap.data.hugging_face:HuggingFace",
            summary="a data set of Hugging Face: saved by save_to_disk, or a name on the hub (extra: datasets)",
            by_path=True,
            takes="path or name",
            options=("image", "label", "split", "config", "revision"),
        ),
        SourceEntry(
            name="webdataset",
            target="remap.data.webdataset:WebDataset",
            summary="tars of samples, KEY.jpg with KEY.cls or KEY.json, as WebDataset writes them",
            takes="path",
            options=("image", "label", "split"),
        ),
        SourceEntry(
            name="torchvision",
            target="remap.data.torchvision_sets:TorchvisionSet",
            summary="a data set of torchvision by its class name, below root=FOLDER",
            takes="name",
            options=("root", "split"),
        ),
    ],
)
# What a run without data learns from.
DEFAULT_SOURCE = "digits"


def is_source(word: str) -> bool:
    """Return whether a word names a source, as NAME or NAME:REST; any other word is a path."""
    name, colon, _ = word.partition(":")
    if name not in SOURCES:
        return False
    row = SOURCES.row(name)
    return bool(colon and row.takes) or not (row.by_path or row.takes)
