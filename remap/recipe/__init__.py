"""Recipes: the schema, strict YAML, overrides and the shipped catalogue. Imports no torch."""

from remap.recipe.resolve import dump, load, resolve, resolve_distill, validate
from remap.recipe.schema import Recipe

__all__ = ["Recipe", "dump", "load", "resolve", "resolve_distill", "validate"]
