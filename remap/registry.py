"""Tables of lazy rows: names, what they are, and where the class is. Listing a table imports no class.

Installed packages add rows by entry points (``PLUGIN_GROUPS``), and ``remap.register`` adds them from Python.
"""

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, TypeVar

from remap.errors import PluginError, UnknownName

# Entry-point group of each table that other packages may add rows to, by the table's plural.
PLUGIN_GROUPS = {plural: f"remap.{plural}" for plural in ("methods", "losses", "sources")}
# ``Entry.origin`` of the rows in this repository.
BUILT_IN = "remap"
# Names are parts of command lines and recipes ("a+b", "name:weight"), so they have no other characters.
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# In the type of an option, ``Annotated[..., LATER]``: it was added when runs without it existed. At its default it is
# not in the digest of a recipe, so that those runs can be resumed and compared.
LATER = object()
# In the type of an option: it may name a file or folder, which a saved recipe names by its absolute path.
MAY_BE_PATH = object()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row.

    Attributes:
        target: "module:Class", imported when the class is needed; or the class itself.
        paper: "Author et al. year, arXiv id", or "-".
        origin: The package that registered the row.
    """

    name: str
    target: str | type
    category: str
    summary: str
    paper: str
    origin: str = BUILT_IN

    @property
    def location(self) -> str:
        """Where the class is, as "module:Class"."""
        return self.target if isinstance(self.target, str) else f"{self.target.__module__}:{self.target.__qualname__}"

    def load(self) -> Any:
        """Import the module and return the class.

        Raises:
            PluginError: The class of another package cannot be imported.
        """
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:
            if self.origin == BUILT_IN:
                raise
            raise _cannot_load(self.origin, f"'{self.name}' ({self.target})", error) from error


Row = TypeVar("Row", bound=Entry)


class Registry(Generic[Row]):
    """An ordered table of rows of one kind ("method", "loss", "data source").

    Entry points of installed packages are read when the table is first used, not when it is made: `remap --help` must
    not import plug-ins.
    """

    def __init__(self, kind: str, plural: str, rows: Iterable[Row]) -> None:
        self.kind, self.plural = kind, plural
        self._rows: dict[str, Row] = {}
        for row in rows:
            if row.name in self._rows:
                raise ValueError(f"{kind} {row.name!r} is in the table twice")
            self._rows[row.name] = row
        self._categories = tuple(dict.fromkeys(row.category for row in self._rows.values()))
        self._unread = plural in PLUGIN_GROUPS

    def __iter__(self) -> Iterator[Row]:
        return iter(self._complete().values())

    def __contains__(self, name: object) -> bool:
        return name in self._complete()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the table."""
        return tuple(self._complete())

    @property
    def row_type(self) -> type[Row]:
        """The class of the rows."""
        return type(next(iter(self._rows.values())))

    def row(self, name: str) -> Row:
        """Return the row of that name.

        Raises:
            UnknownName: With the nearest name, or where none is near all names.
        """
        return self.rows([name])[0]

    def rows(self, names: Iterable[str], also: Iterable[str] = ()) -> list[Row]:
        """Return the rows of those names; ``also`` are further words that a user may have meant.

        Raises:
            UnknownName: With all that are unknown, as ``row`` says of one.
        """
        rows, names = self._complete(), list(names)
        if wrong := [name for name in names if name not in rows]:
            what, near = _unknown(self, wrong, [*rows, *also])
            do = f"`remap {self.plural}` lists them; those of other packages must be installed"
            raise UnknownName(what, allowed=None if near else rows, do=do)
        return [rows[name] for name in names]

    def load(self, name: str) -> Any:
        """Import and return the class behind ``name``."""
        return self.row(name).load()

    def add(self, row: Row) -> None:
        """Add a row of another package; ``row.origin`` names the package.

        A row of the same package and class takes the place of the earlier one (a notebook cell that is run again).

        Raises:
            PluginError: The row is of another kind, or its name or category cannot be used or is taken.
        """
        if not isinstance(row, self.row_type):
            raise PluginError(
                f"package '{row.origin}' registers a {self.kind} with a row of the wrong type",
                given=f"{type(row).__name__} '{row.name}'",
                allowed=self.row_type.__name__,
            )
        if not _NAME.fullmatch(row.name):
            raise PluginError(
                f"package '{row.origin}' registers a {self.kind} whose name cannot be used",
                given=repr(row.name),
                allowed="lower-case letters, digits and _, beginning with a letter",
            )
        if row.category not in self._categories:
            raise PluginError(
                f"package '{row.origin}' registers the {self.kind} '{row.name}' under an unknown category",
                given=row.category,
                allowed=self._categories,
            )
        taken = self._rows.get(row.name)
        if taken is not None and (taken.origin, taken.location) != (row.origin, row.location):
            raise PluginError(
                f"the {self.kind} '{row.name}' is registered twice",
                given=f"{taken.location} (package '{taken.origin}') and {row.location} (package '{row.origin}')",
                do=f"rename one of them, or uninstall its package: pip uninstall {row.origin}",
            )
        self._rows[row.name] = row

    def _complete(self) -> dict[str, Row]:
        """Return all rows, reading those of installed packages the first time."""
        if self._unread:
            self._unread = False  # before the loop: the module of a plug-in may use this table while it is imported
            try:
                for row in _plugin_rows(PLUGIN_GROUPS[self.plural]):
                    self.add(row)
            except PluginError:
                self._unread = True  # the next use reports it again instead of working with half of the rows
                raise
        return self._rows


def _plugin_rows(group: str) -> Iterator[Any]:
    """Yield the rows that installed packages give under an entry-point group, by package and name.

    Raises:
        PluginError: A package cannot be imported, or gives something else than rows.
    """
    points = [(point.dist.name if point.dist else "?", point) for point in installed_entry_points().select(group=group)]
    for package, point in sorted(points, key=lambda pair: (pair[0], pair[1].name)):
        try:
            given = point.load()
        except PluginError:
            raise
        except Exception as error:
            raise _cannot_load(package, f"entry point {point.name} = {point.value} in {group}", error) from error
        for row in given if isinstance(given, list | tuple) else [given]:
            if not isinstance(row, Entry):
                raise PluginError(
                    f"the plug-in package '{package}' gives something that is not a row",
                    given=f"{type(row).__name__}, from entry point {point.name} = {point.value} in {group}",
                    do=f"update it, or remove it: pip uninstall {package}",
                )
            yield replace(row, origin=package)


@cache
def installed_entry_points() -> Any:
    """Return the entry points of all installed packages, which takes a look at each of them."""
    import importlib.metadata  # tens of milliseconds, which `remap --help` does not need

    return importlib.metadata.entry_points()


def _cannot_load(package: str, what: str, error: Exception) -> PluginError:
    return PluginError(
        f"the plug-in package '{package}' cannot be loaded: {type(error).__name__}: {error}",
        given=what,
        do=f"update it, or remove it: pip uninstall {package}",
    )


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate a reader most likely meant, or None."""
    word, by_lower = word.lower(), {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word, by_lower, n=5, cutoff=0.55)
    # Of equally near ones the one of the same letters: "lroa" is "lora", not "road".
    near.sort(key=lambda one: (-difflib.SequenceMatcher(None, one, word).ratio(), sorted(one) != sorted(word)))
    return by_lower[near[0]] if near else None


def unknown_names(table: Registry[Any], words: Iterable[str]) -> str:
    """Return one text for words that are not in a table: what is probably meant, or where none is near all names."""
    what, near = _unknown(table, words, table.names)
    return f"{what} (`remap {table.plural}` lists all)" if near else f"{what} (allowed: {', '.join(table.names)})"


def _unknown(table: Registry[Any], words: Iterable[str], candidates: Sequence[str]) -> tuple[str, bool]:
    """Return a text that names all words, and whether a candidate is near to one of them."""
    meant = {word: nearest(word, candidates) for word in words}
    if len(meant) == 1:
        (word,) = meant
        return f"unknown {table.kind} '{word}'{did_you_mean(word, candidates)}", meant[word] is not None
    shown = [f"'{word}'" + (f" (did you mean '{near}'?)" if near else "") for word, near in meant.items()]
    return f"unknown {table.plural} {', '.join(shown)}", any(meant.values())


def choices(word: str, candidates: Iterable[str], listing: str) -> str:
    """Return the name that was probably meant and the command that lists all, or where none is near all names."""
    meant = did_you_mean(word, names := list(candidates))
    return f"{meant} (`remap {listing}` lists all)" if meant else f" (allowed: {', '.join(names)})"


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" or an empty string."""
    return f"; did you mean '{match}'?" if (match := nearest(word, candidates)) else ""
