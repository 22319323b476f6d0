"""What a student that is cut from its teacher keeps, and its short form ``shrink(teacher, depth=6, width=384)``."""

import re
from collections.abc import Iterable
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
        found[option["key"]] = int(option["value"]) if option["value"].isdecimal() else option["value"]
    return found


class ShrinkSpec(BaseModel):
    """A student cut from the (first) teacher's backbone; null keeps what the teacher has.

    Width or heads alone keep the teacher's head dimension, which otherwise is width / heads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    depth: int | None = Field(default=None, ge=1, description="Number of blocks that stay.")
    width: int | None = Field(default=None, ge=1, description="Number of channels that stay.")
    heads: int | None = Field(default=None, ge=1, description="Number of attention heads per block that stay.")
    mlp: int | None = Field(default=None, ge=1, description="Number of hidden units per MLP that stay.")
    importance: Literal["taylor", "magnitude"] = Field(
        default="taylor", description="Score: first-order change of the features on images, or magnitude."
    )
    blocks: Literal["sensitivity", "uniform"] = Field(
        default="sensitivity", description="Blocks to remove: the least missed on images, or evenly spaced."
    )
    images: int = Field(default=64, ge=1, description="Number of training images that scores are measured on.")

    @model_validator(mode="after")
    def _cuts_something(self) -> "ShrinkSpec":
        if all(size is None for size in (self.depth, self.width, self.heads, self.mlp)):
            raise ValueError("nothing is to be cut (give at least one of depth, width, heads, mlp)")
        return self

    @property
    def needs_images(self) -> bool:
        """Whether anything is measured on images."""
        return (self.depth is not None and self.blocks == "sensitivity") or (
            self._cuts_inside and self.importance == "taylor"
        )

    @property
    def _cuts_inside(self) -> bool:
        return any(size is not None for size in (self.width, self.heads, self.mlp))

    def idle_problems(self, given: Iterable[str] | None = None) -> list[str]:
        """Return a line for each option that chooses nothing, of those ``given`` or of those not at their default.

        Among those given may be a seed, which draws the images, and their source, ``data``.
        """
        fields = type(self).model_fields
        named = [name for name in fields if getattr(self, name) != fields[name].default] if given is None else given
        why = {
            "importance": "" if self._cuts_inside else "only blocks are removed",
            "blocks": "no block is removed" if self.depth is None else "",
            **dict.fromkeys(("images", "seed", "data"), "" if self.needs_images else "nothing is measured on images"),
        }
        return [f"{name}: chooses nothing, since {why[name]} (leave it out)" for name in named if why.get(name)]

    @property
    def word(self) -> str:
        """``shrink(teacher, depth=6)``, with what is not the default."""
        options = self.model_dump(exclude_defaults=True).items()
        return f"shrink({', '.join(['teacher', *(f'{key}={value}' for key, value in options)])})"
