"""Numbers of bytes in words."""


def size(nbytes: float) -> str:
    """Return bytes in the unit a reader would choose: 1,500 gives "1.5 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
