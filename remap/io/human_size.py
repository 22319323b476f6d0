"""Numbers of bytes, seconds and things in words."""


def number_of(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 image", "2,000 images", "2 processes"; ``plural`` where that rule fails."""
    several = plural or f"{noun}{'es' if noun.endswith('s') else 's'}"
    return f"{count:,} {noun if count == 1 else several}"


def part(count: float, whole: float) -> str:
    """Return a part of a whole in per cent: "2.4%", and two digits of one below 0.1 %, "0.038%"."""
    percent = 100 * count / whole
    return f"{percent:.2g}%" if 0 < percent < 0.1 else f"{percent:.1f}%"


def size(nbytes: float) -> str:
    """Return bytes in the unit a reader would choose: 1,500 gives "1.5 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them: 90.0 s, 3.5 min, 2.1 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
