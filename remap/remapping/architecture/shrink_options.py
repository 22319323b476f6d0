"""What a student that is cut from its teacher keeps, and its short form ``shrink(teacher, depth=6, width=384)``."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_WORD = re.compile(r"\s*shrink\s*\((?P<inside>[^()]*)\)\s*")
_OPTION = re.compile(r"\s*(?P<key>[a-z_]+)\s*=\s*(?P<value>[0-9]{1,9}|[a-z_]+)\s*")
EXAMPLE = "shrink(teacher, depth=6, width=384, heads=6, mlp=1536)"


def is_shrink_word(word: Any) -> bool:
    """Return whether a model's name is meant as the short form, right or wrong."""
    return isinstance(word, str) and re.match(r"\s*shrink\s*(\(|$)", word) is not None


def read_shrink_word(word: str) -> dict[str, Any]:
    """Return the options in a short form; their names and values are for the schema to check.

    Raises:
        ValueError: It is not ``shrink(teacher, key=value, ...)``, or names a key twice.
    """
    whole = _WORD.fullmatch(word)
    first, *others = whole["inside"].split(",") if whole else ("",)
    if first.strip() != "teacher":
        raise ValueError(f"'{word}' cannot be read (write {EXAMPLE})")
    found: dict[str, Any] = {}
    for other in others:
        option = _OPTION.fullmatch(other)
        if option is None:
            raise ValueError(f"'{other.strip()}' in '{word}' cannot be read (write {EXAMPLE})")
        if option["key"] in found:
            raise ValueError(f"'{option['key']}' is given twice in '{word}'")
        found[option["key"]] = int(option["value"]) if option["value"].isdigit() else option["value"]
    return found


def shrink_word(options: Mapping[str, Any]) -> str:
    """Return the short form of some options."""
    return f"shrink({', '.join(['teacher', *(f'{key}={value}' for key, value in options.items())])})"


class ShrinkSpec(BaseModel):
    """A student cut from the (first) teacher's backbone; null keeps what the teacher has.

    Attributes:
        depth, width, heads, mlp: Blocks, channels, heads a block and hidden units of an MLP. The head dimension is
            width / heads; width or heads alone keep the teacher's.
        importance: Of channels, heads and units: "taylor" (change of the pooled features, to first order, on images)
            or "magnitude" of the weights.
        blocks: Which go: "sensitivity" (one by one, the least missed on images) or "uniform" (even distances).
        images: Training images to measure on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    depth: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    mlp: int | None = Field(default=None, ge=1)
    importance: Literal["taylor", "magnitude"] = "taylor"
    blocks: Literal["sensitivity", "uniform"] = "sensitivity"
    images: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _cuts_something(self) -> "ShrinkSpec":
        if all(size is None for size in (self.depth, self.width, self.heads, self.mlp)):
            raise ValueError("nothing is to be cut (give at least one of depth, width, heads, mlp)")
        return self

    @property
    def word(self) -> str:
        """``shrink(teacher, depth=6)``, with what is not the default."""
        return shrink_word(self.model_dump(exclude_defaults=True))
