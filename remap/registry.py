"""A table of lazy rows: names, what they are, and where the class lives. Listing a table imports nothing."""

import difflib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from remap.errors import UnknownName


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row. ``target`` is "module:Class"; ``paper`` is "Author et al. year, arXiv id"."""

    name: str
    target: str
    category: str
    summary: str
    paper: str

    def load(self) -> Any:
        """Import the module and return the class."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


Row = TypeVar("Row", bound=Entry)


class Registry(Generic[Row]):
    """An ordered, closed set of rows of one kind ("method", "loss")."""

    def __init__(self, kind: str, plural: str, rows: Iterable[Row]) -> None:
        self.kind, self.plural = kind, plural
        self._rows: dict[str, Row] = {}
        for row in rows:
            if row.name in self._rows:
                raise ValueError(f"{kind} {row.name!r} is in the table twice")
            self._rows[row.name] = row

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._rows)

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            UnknownName: With the nearest names and all names.
        """
        if name not in self._rows:
            raise UnknownName(
                f"unknown {self.kind} '{name}'{did_you_mean(name, self.names)}",
                allowed=self.names,
                do=f"`remap {self.plural}` lists them",
            )
        return self._rows[name]

    def load(self, name: str) -> Any:
        """Import and return the class behind ``name``."""
        return self.row(name).load()


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate a reader most likely meant, or None."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.55)
    return by_lower[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """ "; did you mean 'x'?" or an empty string."""
    match = nearest(word, candidates)
    return f"; did you mean '{match}'?" if match else ""
