"""What a run was made with: command, versions and machine, without anything private. Imports no torch."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from remap import __version__
from remap.io.versions import package_versions


def command() -> list[str]:
    """Return this process's command line as it can be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    if Path(sys.argv[0]).stem == "remap":
        return ["remap", *sys.argv[1:]]
    return ["python", *sys.argv]


def environment() -> dict[str, Any]:
    """Return versions and machine, without anything private."""
    return {
        "time": now(),
        "remap": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "packages": package_versions(),
    }


def plain_environment(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of ``environment`` without its time and without those of resumed parts."""
    return {key: value for key, value in record.items() if key not in ("time", "resumed")}


def _cpu_model() -> str:
    """Return name and stepping of the first processor; virtual machines give many models one name."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        text = ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    if "model name" not in facts:
        return platform.processor() or "unknown"
    numbers = ", ".join(f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts)
    return f"{facts['model name']} ({numbers})"


def now() -> str:
    """Return the time, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
