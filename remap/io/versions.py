"""Versions of the packages that a result depends on. Imports none of them."""

import functools
import importlib.metadata
import re

PACKAGES = (
    "torch",
    "timm",
    "torchdistill",
    "accelerate",
    "peft",
    "torch-pruning",
    "numpy",
    "pillow",
    "safetensors",
    "scikit-learn",
)
# A name and the extras asked for; and the extra that a requirement belongs to (as in PEP 508).
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^]]*)\])?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


@functools.cache
def package_versions() -> dict[str, str]:
    return {name: version_of(name) for name in PACKAGES} | _requirements("remap", set())


def _requirements(package: str, seen: set[tuple[str, ...]], extras: frozenset[str] = frozenset()) -> dict[str, str]:
    """Versions of what a package requires, and what that requires, as far as it is installed."""
    found: dict[str, str] = {}
    try:
        words = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return found
    for word in words:
        match = _REQUIREMENT.match(word)
        asked_by = _EXTRA.search(word)
        if match is None or (asked_by is not None and asked_by[1] not in extras):
            continue
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        inner = frozenset(re.split(r"\s*,\s*", match[2])) if match[2] else frozenset()
        version = version_of(name)
        if version == "missing" or (name, *sorted(inner)) in seen:
            continue
        seen.add((name, *sorted(inner)))
        found |= {name: version} | _requirements(name, seen, inner)
    return dict(sorted(found.items()))


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
