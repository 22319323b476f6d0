"""Add methods, losses and data sources from Python. Installed packages do it by entry points (``remap.registry``)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, overload

from remap.data import SOURCES
from remap.errors import PluginError, UnknownName
from remap.registry import Entry, Registry, did_you_mean
from remap.remapping import LOSSES
from remap.tuning import METHODS

_TABLES: dict[str, Registry[Any]] = {"method": METHODS, "loss": LOSSES, "source": SOURCES}

Cls = TypeVar("Cls", bound=type)


@overload
def register(kind: str, row: Entry) -> Entry: ...
@overload
def register(kind: str, **fields: Any) -> Callable[[Cls], Cls]: ...
def register(kind: str, row: Entry | None = None, **fields: Any) -> Entry | Callable[[Cls], Cls]:
    """Register a method, a loss or a data source for this process; recipes then name it like a built-in one.

    With a row, whose ``target`` is "module:Class"::

        remap.register("loss", LossEntry(name="mine", target="my_package.losses:Mine", ...))

    or as the decorator of the class, with the fields of the row::

        @remap.register("method", name="mine", category="adapter", summary="...", paper="-", trains="...", ...)
        class Mine(Method): ...

    A run, and everything that later loads it, must register the name first. A package that others install does better
    with an entry point in the group ``remap.methods``, ``remap.losses`` or ``remap.sources``, which the command line
    reads too.

    Args:
        kind: "method", "loss" or "source".
        row: A ``MethodEntry``, ``LossEntry`` or ``SourceEntry``; None to decorate a class.
        fields: The fields of that row except ``target``; only without ``row``.

    Raises:
        UnknownName: There is no such kind.
        PluginError: The name is taken, or the row does not fit the table.
    """
    if kind not in _TABLES:
        raise UnknownName(f"unknown kind '{kind}'{did_you_mean(kind, _TABLES)}", allowed=_TABLES)
    table = _TABLES[kind]
    if row is not None:
        if fields:
            raise TypeError("remap.register takes a row or the fields of one, not both")
        table.add(_of_its_package(row))
        return row

    def decorate(cls: Cls) -> Cls:
        try:
            made = table.row_type(target=cls, **fields)
        except TypeError as error:  # a field is missing, or is none of this table
            raise PluginError(f"{kind} {fields.get('name', '')!r} cannot be registered", given=error) from error
        table.add(_of_its_package(made))
        return cls

    return decorate


def _of_its_package(row: Entry) -> Entry:
    """Return the row with the top-level package of its class as the origin."""
    return replace(row, origin=row.location.partition(":")[0].partition(".")[0])
