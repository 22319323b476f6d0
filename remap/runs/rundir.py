"""The run directory: enough to explain and repeat a run. Imports no torch."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remap import files
from remap.errors import RunError
from remap.recipe import Recipe, dump, load
from remap.runs.curves import curves

PACKAGES = ("torch", "timm", "torchdistill", "accelerate", "peft", "numpy", "pillow", "safetensors", "scikit-learn")


@dataclass(frozen=True)
class RunDir:
    """Paths and records of one run.

    recipe.yaml (resolved), command.txt, environment.json, status.json, metrics.jsonl (one line an epoch), curves.svg,
    summary.json, task/ (what the tuned student costs to keep), teacher/ (the prepared teacher), checkpoint/.
    """

    path: Path

    @property
    def task(self) -> Path:
        return self.path / "task"

    @property
    def teacher(self) -> Path:
        return self.path / "teacher"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint" / "last.safetensors"

    @staticmethod
    def create(path: Path, recipe: Recipe) -> "RunDir":
        """Make a new run directory.

        Raises:
            RunError: It exists already, or cannot be written.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise RunError(
                f"{path} exists already; nothing in it was touched",
                do=f"name another --output, or go on with that run: --resume {path}",
            ) from None
        except OSError as error:
            raise RunError(f"cannot make {path}: {error.strerror}", do="choose another --output") from error
        run = RunDir(path)
        files.write_text(path / "recipe.yaml", dump(recipe.written_out()))
        files.write_text(path / "command.txt", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\n")
        files.write_json(path / "environment.json", environment())
        run.set_status("running")
        return run

    @staticmethod
    def open(path: Path) -> "RunDir":
        """An existing run directory.

        Raises:
            RunError: It is none.
        """
        if not (path / "recipe.yaml").is_file():
            raise RunError(f"{path} is no run directory", given="recipe.yaml is missing", do="see `ls runs`")
        return RunDir(path)

    def recipe(self) -> Recipe:
        return load(self.path / "recipe.yaml")

    def set_status(self, status: str, message: str = "") -> None:
        files.write_json(self.path / "status.json", {"status": status, "message": message, "time": _now()})

    def status(self) -> str:
        return files.read_json(self.path / "status.json")["status"]

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl and curves.svg anew."""
        files.write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))
        files.write_text(self.path / "curves.svg", curves(history, self.path.name))

    def write_summary(self, summary: dict[str, Any]) -> None:
        files.write_json(self.path / "summary.json", summary)

    def summary(self) -> dict[str, Any]:
        return files.read_json(self.path / "summary.json")

    @property
    def is_done(self) -> bool:
        return (self.path / "summary.json").is_file() and self.status() == "done"


def default_path() -> Path:
    """The folder that holds run directories unless --output names one."""
    return Path("runs")


def is_run(word: str) -> bool:
    """Whether a word names a run directory (or the task folder inside one)."""
    path = Path(word).expanduser()
    return (path / "task" / "task.json").is_file() or (path / "task.json").is_file()


def next_path(root: Path, stem: str) -> Path:
    """``root/stem-001``, or the first number that is free."""
    taken = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    number = next(n for n in range(1, len(taken) + 2) if f"{stem}-{n:03d}" not in taken)
    return root / f"{stem}-{number:03d}"


def environment() -> dict[str, Any]:
    """Versions and machine, without anything private."""
    return {
        "time": _now(),
        "remap": importlib.metadata.version("remap"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
