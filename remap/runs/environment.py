"""What a run was made with: command, versions and machine, without anything private. Imports no torch."""

import functools
import importlib.metadata
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

from remap import __version__

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


def command() -> list[str]:
    """This process's command line as it can be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    if Path(sys.argv[0]).stem == "remap":
        return ["remap", *sys.argv[1:]]
    return ["python", *sys.argv]


def environment() -> dict[str, Any]:
    """Versions and machine, without anything private."""
    return {
        "time": now(),
        "remap": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "packages": _packages(),
    }


def plain_environment(record: dict[str, Any]) -> dict[str, Any]:
    """A record of ``environment`` without its time and without later ones."""
    return {key: value for key, value in record.items() if key not in ("time", "resumed")}


def _cpu_model() -> str:
    """Name and stepping of the first processor; virtual machines give many models one name."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        text = ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    if "model name" not in facts:
        return platform.processor() or "unknown"
    numbers = ", ".join(f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts)
    return f"{facts['model name']} ({numbers})"


@functools.cache
def _packages() -> dict[str, str]:
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


def now() -> str:
    """The time of day, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
