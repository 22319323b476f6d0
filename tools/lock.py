"""Write requirements.lock: every package that `pip install .[test]` takes here, with its version and SHA-256.

    python tools/lock.py

Asks pip what it would install (nothing is installed; large files are fetched where an index does not serve metadata
apart). Run it with the Python and on the kind of machine that the lock is for: hashes are those of the wheels chosen.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEADER = """\
# Everything that `pip install .[test]` takes, pinned and hashed, for the tests of this project.
# For {implementation} {python} on {system} {machine} only; elsewhere the floors in pyproject.toml hold.
# Written by `python tools/lock.py`; install with `pip install --require-hashes -r requirements.lock`.
"""


def resolve(target: str) -> dict[str, Any]:
    """pip's report on what it would install into an empty environment (pip 22.2 or newer)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), target], check=True)
        return json.loads(report.read_text())


def lines(report: dict[str, Any]) -> list[str]:
    """``name==version --hash=sha256:...`` by name, without where it came from.

    Raises:
        ValueError: A package has no SHA-256, or comes from a folder or repository.
    """
    found = {}
    for entry in report["install"]:
        name, version = entry["metadata"]["name"].lower().replace("_", "-"), entry["metadata"]["version"]
        if "dir_info" in entry["download_info"] and entry.get("requested"):
            continue  # the project itself
        digest = entry["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise ValueError(f"{name} {version} comes without a SHA-256")
        found[name] = f"{name}=={version} --hash=sha256:{digest}"
    return [found[name] for name in sorted(found)]


def main() -> None:
    kind = {
        "implementation": platform.python_implementation(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "system": platform.system(),
        "machine": platform.machine(),
    }
    text = HEADER.format(**kind) + "".join(f"{line}\n" for line in lines(resolve(f"{ROOT}[test]")))
    LOCK.write_text(text)
    print(f"{LOCK.name}: {text.count('==')} packages")


if __name__ == "__main__":
    main()
