"""Which files count as images: one rule for training, evaluation, prediction and images without labels."""

from collections import Counter
from collections.abc import Sequence
from posixpath import splitext

from remap.data.images import HEIC, HEIC_SUFFIXES, SUFFIXES
from remap.io.human_size import number_of
from remap.io.names import plain
from remap.io.versions import install_command

# What systems, drives, file servers and archivers make, in lower case; also whatever begins with a dot.
_FILES = ("_ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_FOLDERS = ("__macosx", "thumbs", "_thumbs", "@eadir", "@recycle", "#recycle", "@recently-snapshot", "#snapshot")
_DRIVES = ("$recycle.bin", "system volume information", "lost+found")
LEFTOVERS = frozenset((*_FILES, *_FOLDERS, *_DRIVES))
# Kinds of tables that are not read, though labels may be in them.
OTHER_TABLES = (".json", ".jsonl", ".xlsx")
# Files left out, as (name, reason).
Skipped = Sequence[tuple[str, str]]


def is_leftover(name: str) -> bool:
    """Return whether systems and tools make files or folders of this name: .DS_Store, @eaDir, lost+found."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def why_left_out(path: str) -> str | None:
    """Return why a file, relative to the folder that the user named, is not taken for an image; None where it is."""
    *folders, name = path.split("/")
    folder = next(filter(is_leftover, folders), None)
    if folder is not None:
        return f"in {plain(folder)}"
    return "hidden or made by the system" if is_leftover(name) else why_not_read(name)


def why_not_read(name: str) -> str | None:
    """Return why files of this kind are not read, by the end of the name alone; None where they are."""
    suffix = splitext(name)[1].rstrip(".")
    if suffix.lower() in SUFFIXES or (HEIC and suffix.lower() in HEIC_SUFFIXES):
        return None
    if suffix.lower() in HEIC_SUFFIXES:
        return f"{suffix} files need pillow-heif: {install_command('heic')}"
    return f"{plain(suffix)[:20]} files are not read" if suffix else "files without a suffix are not read"


def counted(skipped: Skipped) -> str:
    """Return how many files were left out for which reason, the most frequent first."""
    kinds = Counter(reason for _, reason in skipped).most_common()
    more = [f"{sum(count for _, count in kinds[8:])} of other kinds"] if len(kinds) > 8 else []
    return ", ".join([f"{count} ({reason})" for reason, count in kinds[:8]] + more)


def also_left_out(skipped: Skipped) -> str:
    """Return it as the end of what was given to a command; empty where nothing was left out."""
    return f"; left out: {counted(skipped)}" if skipped else ""


def left_out(skipped: Skipped) -> str:
    """Return how many files were left out and why, in one line."""
    reasons = {reason for _, reason in skipped}
    why = reasons.pop() if len(reasons) == 1 else counted(skipped)
    return f"left out {number_of(len(skipped), 'other file')}: {why}"
