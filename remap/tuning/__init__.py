"""Tuning methods, one list of rows a category; listing them imports no torch.

A method's name may also be a combination: "vpt_deep+lora".
"""

from typing import Any

from remap.registry import Registry
from remap.tuning import adapter, finetuning, parameter, prompt, remapping
from remap.tuning.entry import CATEGORIES, MethodEntry

METHODS: Registry[MethodEntry] = Registry(
    "method", "methods", [*finetuning.ROWS, *prompt.ROWS, *adapter.ROWS, *parameter.ROWS, *remapping.ROWS]
)

__all__ = [
    "CATEGORIES",
    "METHODS",
    "MethodEntry",
    "category_of",
    "combination_problems",
    "config_of",
    "parts_of",
    "rows_of",
]


def parts_of(method: str) -> list[str]:
    """The names in "a+b"; one for a single method."""
    return [part.strip() for part in method.split("+")]


def rows_of(method: str) -> list[MethodEntry]:
    """The rows behind a name or a combination.

    Raises:
        UnknownName: A part is in no row.
    """
    return [METHODS.row(part) for part in parts_of(method)]


def combination_problems(method: str) -> list[str]:
    """Why the methods in "a+b" cannot be combined, one line each."""
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


def category_of(method: str) -> str:
    """The category of a method; of a combination that of its parts, or adapter tuning, where the survey files mixes."""
    found = {row.category for row in rows_of(method)}
    return found.pop() if len(found) == 1 else "adapter"


def config_of(method: str) -> Any:
    """The pydantic class of a method's options; for a combination one field a part. Imports the methods, so torch."""
    parts = parts_of(method)
    if len(parts) == 1:
        return METHODS.load(method).Config
    from pydantic import ConfigDict, create_model

    configs = {part: METHODS.load(part).Config for part in parts}
    fields = {part: (config, config()) for part, config in configs.items()}
    return create_model("Combination", __config__=ConfigDict(extra="forbid", frozen=True), **fields)
