"""YAML as data: safe loader, plain scalars, no repeated keys, no anchors, bounded size. Home of the yaml package."""

import re
from pathlib import Path
from typing import Any

import yaml

from remap.errors import RecipeError

MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2's numbers and booleans and without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


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


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _int)  # 010 is ten, not eight
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))


def parse(text: str, where: str) -> Any:
    """Parse YAML text.

    Raises:
        RecipeError: It is not YAML, or uses tags, aliases or a repeated key; names ``where`` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError([f"{place}{error.problem}"], where) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError([f"not readable as YAML: {str(error).splitlines()[0]}"], where) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        RecipeError: It cannot be read, is too large, or is not a mapping.
    """
    try:
        data = path.read_bytes()[: MAX_BYTES + 1]
        text = data.decode()
    except OSError as error:
        raise RecipeError([f"cannot be read: {error.strerror}"], str(path)) from None
    except UnicodeDecodeError:
        raise RecipeError(["is not UTF-8 text"], str(path)) from None
    if len(data) > MAX_BYTES:
        raise RecipeError([f"is larger than {MAX_BYTES:,} bytes; a recipe is names and numbers"], str(path))
    value = parse(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError([f"should be a mapping of keys, got {type(value).__name__}"], str(path))
    return value


def dump(value: Any) -> str:
    """YAML text that ``parse`` reads back to an equal value."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
