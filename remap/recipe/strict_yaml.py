"""YAML as data: safe loader, plain scalars, no repeated keys, tags or anchors, bounded. Home of the yaml package."""

import errno
import math
import re
from pathlib import Path
from typing import Any

import yaml

from remap.errors import RecipeError
from remap.io.checked_read import read_regular
from remap.io.names import plain
from remap.io.paths import LONGEST_PATH

MAX_BYTES, MAX_DEPTH = 256_000, 32
# Words, numbers, lists and mappings, keys counted too: a large recipe has two hundred. And letters of one of them.
MAX_VALUES, MAX_WORD = 2_000, LONGEST_PATH
# Lists of class names, which may be long: a name in one counts a tenth.
NAME_LISTS = ("classes", "known_classes", "only")
# The largest whole number; sizes and seeds are far below.
MAX_NUMBER = 2**64


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2's numbers and booleans and without aliases, anchors and tags."""

    _depth = _tenths = 0
    _names = False  # whether the items of this list are class names

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.events.AliasEvent):
            raise _error("aliases (*name) are not allowed", event)
        if event.anchor is not None:
            raise _error("anchors (&name) are not allowed", event)
        if event.tag is not None:
            raise _error("tags (!name) are not allowed", event)
        if self._depth == MAX_DEPTH:
            raise _error(f"more than {MAX_DEPTH} levels deep", event)
        listed = self._names and isinstance(event, yaml.events.ScalarEvent)
        self._tenths += 1 if listed else 10
        if self._tenths > 10 * MAX_VALUES:
            raise _error(f"more than {MAX_VALUES:,} values", event)
        if len(getattr(event, "value", "")) > MAX_WORD:
            raise _error(f"a word of more than {MAX_WORD:,} letters", event)
        self._depth += 1
        outside = self._names
        self._names = isinstance(parent, yaml.MappingNode) and getattr(index, "value", None) in NAME_LISTS
        node = super().compose_node(parent, index)
        self._depth, self._names = self._depth - 1, outside
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _error(f"key {key!r} is not a word", key_node)
            if key in seen:
                raise _error(f"key '{key}' is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


# YAML 1.1 reads 3e-4 as text and off as False; YAML 1.2 reads a number and a word.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+)([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    """Read 010 as ten, not eight; refuse 1e999."""
    kind = int if node.tag.endswith(":int") else float
    try:
        value = kind(loader.construct_scalar(node))
    except ValueError:  # thousands of digits
        value = math.inf
    if not -MAX_NUMBER <= value <= MAX_NUMBER and (isinstance(value, int) or not math.isfinite(value)):
        raise _error("the number is too large", node)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every word that this module's reader, or an ordinary YAML reader, takes for a number."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _word(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'  # else rare line breaks such as U+0085 are folded away
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _word)


def parse(text: str, where: str) -> Any:
    """Parse YAML text.

    Raises:
        RecipeError: It is not YAML, or uses tags, aliases or a repeated key; names ``where`` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError([plain(f"{position}{error.problem}")], where) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of escapes and versions beyond all numbers
        raise RecipeError([plain(f"not readable as YAML: {str(error).splitlines()[0]}")], where) from None


def read_text(path: Path) -> str:
    """Return the text of a recipe file.

    Raises:
        RecipeError: It cannot be read, is too large, or is not UTF-8.
    """
    try:
        return read_regular(path, MAX_BYTES).decode()
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        if error.errno == errno.EFBIG:
            problem = f"is larger than {MAX_BYTES:,} bytes; a recipe is names and numbers"
    raise RecipeError([problem], str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a recipe file.

    Raises:
        RecipeError: It cannot be read, is too large, or is not a mapping.
    """
    value = parse(read_text(path), str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError([f"should be a mapping of keys, got {type(value).__name__}"], str(path))
    return value


def dump(value: Any) -> str:
    """Return YAML text that ``parse`` reads back to an equal value.

    Raises:
        RecipeError: It is longer than what is read back.
    """
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    if (count := _tenths(value) / 10) > MAX_VALUES or len(text.encode()) > MAX_BYTES:
        what = f"{count:,.0f} values in {len(text.encode()):,} bytes could not be read back from a recipe"
        allowed = f"allowed: {MAX_VALUES:,} values, {MAX_BYTES:,} bytes"
        raise RecipeError([f"{what} ({allowed}; lists of classes, templates and descriptions can be files)"], "recipe")
    return text


def _tenths(value: Any, key: Any = None) -> int:
    """Return what the reader counts, in tenths: words, numbers, lists and mappings, keys too."""
    if isinstance(value, dict):
        return 10 + sum(10 + _tenths(one, name) for name, one in value.items())
    if not isinstance(value, list | tuple):
        return 10
    plain_words = sum(not isinstance(one, dict | list | tuple) for one in value) if key in NAME_LISTS else 0
    return 10 + sum(map(_tenths, value)) - 9 * plain_words
