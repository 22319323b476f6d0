"""Names that strangers chose (classes, files, tensors): how they are shown, and which are refused."""

import unicodedata
from collections.abc import Iterable

# Marks, embeddings, overrides and isolates, which change the direction of text (Unicode Annex 9, section 2). Other
# invisible characters stay: Persian words and many emoji need the joiners U+200C and U+200D.
_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: str, *, keep: str = "") -> str:
    """Return text that a terminal, a log and an XML file show as it is.

    Control characters, stray bytes of file names and characters that change the direction of the text become escapes,
    as ``repr`` writes them; those in ``keep`` stay.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def name_problem(text: str) -> str | None:
    """Return the control character that makes a text unfit to be a name people read and type; None without one."""
    for c in text:
        if c in _DIRECTION or unicodedata.category(c) in ("Cc", "Zl", "Zp"):
            return f"the control character {c!r}"
    return None


def same_name(text: str) -> str:
    """Return what is equal for names that look the same: é is one character (NFC), or e and an accent as on Macs."""
    return unicodedata.normalize("NFC", text)


def look_alike(name: str, names: Iterable[str]) -> str | None:
    """Return in words which of some names differs from this one only in capitals, kinds of spaces and the like."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    other = next((one for one in names if unicodedata.normalize("NFKC", one).casefold() == folded), None)
    return None if other is None else f"{name!a} and {other!a} differ in capitals or in characters that look alike"
