"""Images, labels, views and the order they are seen in. The table of data sources; listing it imports no torch."""

from dataclasses import dataclass

from remap.registry import Entry, Registry


@dataclass(frozen=True, kw_only=True)
class SourceEntry(Entry):
    """One kind of data source; its target is a subclass of ``remap.data.sources.Source``.

    Attributes:
        by_path: It is recognised by what lies at a path; the others are chosen by name.
    """

    category: str = "data"
    paper: str = ""
    by_path: bool = False


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
            name="folders",
            target="remap.data.class_folders:ClassFolders",
            summary="a folder of class folders, with or without train, val and test; or a tar or zip of one",
            by_path=True,
        ),
        SourceEntry(
            name="csv",
            target="remap.data.label_table:LabelTable",
            summary="a CSV or TSV of files and labels, with or without a column of splits",
            by_path=True,
        ),
    ],
)
# What a run without data learns from.
DEFAULT_SOURCE = "digits"


def is_source(word: str) -> bool:
    """Return whether a word names a source, as NAME or NAME:REST; any other word is a path."""
    name = word.partition(":")[0]
    return name in SOURCES and not SOURCES.row(name).by_path
