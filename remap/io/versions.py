"""Versions of the packages that a result depends on, and how others are installed. Imports none of them."""

import functools
import importlib.metadata
import re
import shlex

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
# A name with its extras, and the extra that a requirement belongs to (as in PEP 508).
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^]]*)\])?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the version of each of ``PACKAGES`` and of all that remap requires, as far as it is installed."""
    return {name: version_of(name) for name in PACKAGES} | _requirements("remap", set())


def _requirements(package: str, seen: set[tuple[str, ...]], extras: frozenset[str] = frozenset()) -> dict[str, str]:
    versions: dict[str, str] = {}
    try:
        words = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return versions
    for word in words:
        match = _REQUIREMENT.match(word)
        only_for = _EXTRA.search(word)
        if match is None or (only_for is not None and only_for[1] not in extras):
            continue
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        inner = frozenset(re.split(r"\s*,\s*", match[2])) if match[2] else frozenset()
        version = version_of(name)
        if version == "missing" or (name, *sorted(inner)) in seen:
            continue
        seen.add((name, *sorted(inner)))
        versions |= {name: version} | _requirements(name, seen, inner)
    return dict(sorted(versions.items()))


@functools.cache
def install_command(extra: str) -> str:
    """Return the command that installs what an extra of remap adds, by name: it fits wherever remap came from."""
    words = [word.partition(";") for word in importlib.metadata.requires("remap") or []]
    packages = [
        package.strip() for package, _, marker in words if (found := _EXTRA.search(marker)) and found[1] == extra
    ]
    return f"pip install {shlex.join(packages)}"


def version_of(package: str) -> str:
    """Return the version of an installed package, or "missing"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
