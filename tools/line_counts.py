"""Print how much code there is: lines, files above 250 lines, comments per 100 lines.

python tools/line_counts.py            # with --check: exit code 1 above a target
"""

import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Most lines of .py files, tests not counted.
TARGETS = {"remap": 23_500, "cli": 1_900}
LONGEST = 250


@dataclass(frozen=True)
class Count:
    """Lines of one file, and how many of them have a comment."""

    path: str
    lines: int
    comments: int

    @property
    def folder(self) -> str:
        """The first two parts of its path: remap/engine, or remap for modules at the root."""
        return "/".join(self.path.split("/")[:-1][:2])


def counts(folder: str) -> list[Count]:
    """Count every .py file below a folder of the repository."""
    return [count(path) for path in sorted((ROOT / folder).rglob("*.py"))]


def count(path: Path) -> Count:
    """Count one file. Tokens are read, as ``#`` in a string is not a comment; directives for tools do not count."""
    with open(path, "rb") as file:
        comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    own = {token.start[0] for token in comments if not token.string.startswith(("# noqa", "# type:", "# pragma"))}
    lines = len(path.read_text(encoding="utf-8").splitlines())
    return Count(path.relative_to(ROOT).as_posix(), lines, len(own))


def unexplained(files: list[Count], text: str) -> list[Count]:
    """Return the files above 250 lines that ``text`` (CONTRIBUTING.md) does not name."""
    return [one for one in files if one.lines > LONGEST and f"`{one.path}`" not in text]


def main(arguments: list[str]) -> int:
    """Print the counts; return the exit code."""
    files = {folder: counts(folder) for folder in TARGETS}
    totals = {folder: sum(one.lines for one in found) for folder, found in files.items()}
    for folder, total in totals.items():
        state = "ok" if total <= TARGETS[folder] else f"{total - TARGETS[folder]:,} too many"
        print(f"{folder:24} {total:7,} lines, target {TARGETS[folder]:,}: {state}")
    everything = [one for found in files.values() for one in found]
    missing = unexplained(everything, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    long = [one for one in everything if one.lines > LONGEST]
    print(f"\nfiles above {LONGEST} lines: {len(long)}")
    for one in sorted(long, key=lambda one: -one.lines):
        print(f"  {one.path:48} {one.lines:5}{'  (no reason in CONTRIBUTING.md)' if one in missing else ''}")
    print("\nfolder                     lines  comments per 100")
    for folder in sorted({one.folder for one in everything}):
        inside = [one for one in everything if one.folder == folder]
        lines = sum(one.lines for one in inside)
        print(f"  {folder:22} {lines:7,}  {100 * sum(one.comments for one in inside) / lines:8.1f}")
    failed = missing or any(total > TARGETS[folder] for folder, total in totals.items())
    return 1 if failed and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
