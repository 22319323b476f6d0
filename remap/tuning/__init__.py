"""Tuning methods, one list of rows a category; listing them imports no torch.

A method's name may also be a combination: "vpt_deep+lora".
"""

from typing import Any

from remap.registry import Registry, unknown_names
from remap.tuning import adapter, finetuning, parameter, prompt, remapping
from remap.tuning.entry import CATEGORIES as CATEGORIES
from remap.tuning.entry import MethodEntry

METHODS: Registry[MethodEntry] = Registry(
    "method", "methods", [*finetuning.ROWS, *prompt.ROWS, *adapter.ROWS, *parameter.ROWS, *remapping.ROWS]
)


def parts_of(method: str) -> list[str]:
    """Return the names in "a+b"; one for a single method."""
    return [part.strip() for part in method.split("+")]


def rows_of(method: str) -> list[MethodEntry]:
    """Return the rows behind a name or a combination.

    Raises:
        UnknownName: There is no such method; all that are unknown are named.
    """
    return METHODS.rows(parts_of(method))


def combination_problems(method: str) -> list[str]:
    """Say why the methods in "a+b" cannot be combined, one line each."""
    rows = rows_of(method)
    if len(rows) == 1:
        return []
    problems = [f"'{row.name}' cannot be combined with other methods" for row in rows if row.alone]
    if len({row.name for row in rows}) < len(rows):
        problems.append(f"'{method}' names a method twice")
    tokens = [row.name for row in rows if row.adds_tokens]
    if len(tokens) > 1:
        problems.append(f"{' and '.join(tokens)} both add tokens to the sequence; keep one of them")
    return problems


def method_problems(key: str, method: str) -> list[str]:
    """Return what is wrong with a method's name or combination, which ``key`` names."""
    parts = parts_of(method)
    if len(parts) > 1 and not all(parts):
        where = "after" if parts[0] else "before"
        return [f"{key}: a name is missing {where} '+' in '{method}'"]
    listed = [word.strip() for word in method.split(",")]
    if len(listed) > 1 and all(part in METHODS for word in listed for part in parts_of(word)):
        return [f"{key}: '{method}' is a list; did you mean '{'+'.join(listed)}', one combination of them?"]
    # A list is not a method either way; its words that are not methods say more than all of it.
    words = [part for word in listed for part in parts_of(word) if part]
    unknown = [word for word in words if word not in METHODS]
    if unknown or not words or len(listed) > 1:
        return [f"{key}: {unknown_names(METHODS, unknown or [method])}"]
    return [f"{key}: {problem}" for problem in combination_problems(method)]


def category_of(method: str) -> str:
    """Return the category of a method.

    Of a combination it is that of its methods, or adapter tuning, where the survey files mixes.
    """
    categories = {row.category for row in rows_of(method)}
    return categories.pop() if len(categories) == 1 else "adapter"


def config_of(method: str) -> Any:
    """Return the pydantic class of a method's options, with a field for each method of a combination. Imports torch."""
    parts = parts_of(method)
    if len(parts) == 1:
        return METHODS.load(method).Config
    from pydantic import ConfigDict, create_model

    configs = {part: METHODS.load(part).Config for part in parts}
    fields: dict[str, Any] = {part: (config, config()) for part, config in configs.items()}
    return create_model("Combination", __config__=ConfigDict(extra="forbid", frozen=True), **fields)
