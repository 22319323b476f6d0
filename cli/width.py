"""How much of a line there is on stdout, and the line under the head of a table."""

import os
import stat
import sys
from contextlib import suppress

# Of a file, and of a pipe without a terminal anywhere: what the cells of all tables need.
FULL_WIDTH = 160


def width_of_stdout() -> int | None:
    """Return the width of stdout where rich does not know it: of a pipe, as to ``less``, that of its terminal.

    0 is how a width is given that is not known: in so many columns rich would print nothing.
    """
    if not os.environ.get("COLUMNS", "").strip("0"):
        os.environ.pop("COLUMNS", None)
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal():
        return None  # rich looks
    with suppress(OSError, ValueError, AttributeError):
        if stat.S_ISFIFO(os.fstat(1).st_mode):
            return os.get_terminal_size(2).columns or FULL_WIDTH
    return FULL_WIDTH


def rule_of(length: int) -> str:
    """Return a rule, of a letter that stdout can show."""
    letter = "\u2500"
    try:
        letter.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        letter = "-"
    return letter * length
