"""Recipes shipped with remap: YAML files, read through `remap recipes`."""
