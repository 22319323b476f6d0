"""Recipes: the schema, strict YAML, overrides and the shipped catalogue. Imports no torch, the schema on demand."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remap.recipe.resolution import dump, load, load_finished, resolve, resolve_distill, validate
    from remap.recipe.schema import Recipe

__all__ = ["Recipe", "dump", "load", "load_finished", "resolve", "resolve_distill", "validate"]


def __getattr__(name: str) -> Any:
    """Import a public name; listings need the modules beside them alone."""
    if name not in __all__:
        raise AttributeError(f"module 'remap.recipe' has no attribute {name!r}")
    from remap.recipe import resolution, schema

    return getattr(schema if name == "Recipe" else resolution, name)
