"""The run directory: enough to explain and repeat a run. Imports no torch."""

import contextlib
import fcntl
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

from remap.errors import DiskFull, MissingData, RunError, naming
from remap.io import atomic_write, links
from remap.io.names import plain
from remap.io.paths import path_problem
from remap.recipe import Recipe, dump
from remap.runs.environment import command, environment
from remap.runs.run_records import RunRecords

# What ``create`` leaves when it is killed before recipe.yaml is there.
_DRAFT = re.compile(r"\.?recipe\.yaml\.\d+\.tmp(\.\d+\.tmp)?")


@dataclass(frozen=True)
class RunDir(RunRecords):
    """One run: makes, opens and locks its directory; see ``RunRecords`` for what it holds."""

    @staticmethod
    def create(path: Path, recipe: Recipe) -> "RunDir":
        """Make a new run directory; an empty folder may be there already.

        Raises:
            RunError: It holds something, or cannot be written.
        """
        run = RunDir(path)
        unfit = path_problem(run.path) or _unfit_for_tensors(run.path)
        if unfit:
            raise RunError("a run directory cannot be made there", given=plain(f"{path}: {unfit}"), do="name another")
        text = dump(recipe.written_out())
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            taken = any(not _DRAFT.fullmatch(entry.name) for entry in run.path.iterdir())
        except FileExistsError:
            taken = True
        except OSError as error:
            raise RunError(f"cannot make {path}: {error.strerror}", do="choose another --output") from error
        if taken:
            raise run._exists_already()
        run._claim(text)
        # File names on the command line need not be UTF-8; their bytes stay what they are.
        atomic_write.write_bytes(
            run.path / "command.txt", f"{shlex.join(command())}\n".encode(errors="surrogateescape")
        )
        atomic_write.write_json(run.path / "environment.json", environment())
        run.set_status("running")
        return run

    def require_free(self) -> None:
        """Refuse a path that ``create`` would refuse, before anything is computed.

        Raises:
            RunError: Something is there already.
        """
        with contextlib.suppress(OSError):  # which ``create`` explains
            if os.path.lexists(self.path) and not os.path.isdir(self.path):
                raise self._exists_already()
            if self.path.is_dir() and any(not _DRAFT.fullmatch(entry.name) for entry in self.path.iterdir()):
                raise self._exists_already()

    def _claim(self, recipe: str) -> None:
        """Write recipe.yaml, which makes a folder a run: atomically, and by one process only."""
        draft = self.path / f"recipe.yaml.{os.getpid()}.tmp"
        try:
            with naming(self.path / "recipe.yaml", draft):
                atomic_write.write_text(draft, recipe)
        except DiskFull:
            raise
        except RunError as error:  # the first file of a run: the command can be given another folder
            raise RunError(error.what, do="choose another --output, or make this folder writable") from error
        try:
            os.link(draft, self.path / "recipe.yaml")
        except (FileExistsError, FileNotFoundError):  # another process made it, and removed the draft
            raise self._exists_already() from None
        except OSError:  # a file system without hard links: it cannot tell two runs of the same instant apart
            atomic_write.write_text(self.path / "recipe.yaml", recipe)
        finally:
            draft.unlink(missing_ok=True)

    def _exists_already(self) -> RunError:
        what = f"{self.path} exists already; nothing in it was touched"
        if not os.path.isdir(self.path):
            return RunError(what, given="it is not a folder", do="name another --output")
        if not os.path.isfile(self.path / "recipe.yaml"):
            return RunError(what, given="it is not a run directory, and not empty", do="name another --output")
        if self.outcome()[0] == "failed" and not any(self.checkpoint.glob("*.json")):
            return RunError(
                what, given="a run that failed before it trained", do="name another --output, or remove that folder"
            )
        if self.is_done:
            return RunError(what, given="a finished run", do="name another --output")
        return RunError(what, do=f"name another --output, or resume that run: --resume {shlex.quote(str(self.path))}")

    @staticmethod
    def open(path: Path) -> "RunDir":
        """An existing run directory.

        Raises:
            RunError: It is not a run directory.
        """
        run = RunDir(path)
        if not os.path.isfile(run.path / "recipe.yaml"):
            require_there(run.path)
            given = "recipe.yaml is missing" if os.path.isdir(run.path) else not_a_folder(run.path)
            raise RunError(f"{plain(str(path))} is not a run directory", given=given, do=see_runs(run.path))
        return run

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the directory while this process works in it.

        Raises:
            RunError: Another process works in it, or a link in the directory leads elsewhere.
        """
        with self._to_lock() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"another process is working in {self.path}; nothing in it was touched",
                    do=f"wait for it, or stop it: touch {shlex.quote(str(self.stop))}",
                ) from None
            except OSError:  # a file system without locks
                pass
            links.require_no_links(self.path)
            self._sweep()
            yield

    def _to_lock(self) -> IO[bytes]:
        try:
            return open(self.path / "recipe.yaml", "r+b")  # some network drives lock only what may be written
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror}", do="make it writable, or name another --output"
            ) from error

    def _sweep(self) -> None:
        """Delete what processes that were killed here left half-written."""
        atomic_write.remove_temporary_files(self.path)
        for entry in self.path.iterdir():
            if _DRAFT.fullmatch(entry.name):
                entry.unlink(missing_ok=True)

    @contextmanager
    def images(self, instead: str = "") -> Iterator[None]:
        """While the images of its recipe are opened: where they are missing, say how to name their new path.

        Args:
            instead: Another way, as in ", or name others".
        """
        try:
            yield
        except MissingData as error:
            do = (
                f"bring the images back that the run was made with; {self.path / 'recipe.yaml'} names their path."
                " If they have moved, write the new path there (source, val_source and unlabeled, under data)"
            )
            raise MissingData(error.what, given=error.given, do=do + instead) from error


def _unfit_for_tensors(path: Path) -> str | None:
    """Return why safetensors, which opens UTF-8 names only, could not open files there; None if it can."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "it holds a byte that is not UTF-8"
    return None


def require_there(path: Path) -> None:
    """Refuse a path at which nothing is.

    Raises:
        RunError: Nothing is there.
    """
    if not os.path.lexists(path):
        raise RunError(f"there is no run directory {plain(str(path))}", given=not_a_folder(path), do=see_runs(path))


def not_a_folder(path: Path) -> str:
    """Return what is at a path where a folder is meant."""
    return "it is a file" if os.path.lexists(path) else "no such folder"


def see_runs(path: Path) -> str:
    """Return what to do about a path that is not a run: name one of the runs in it, or look where runs usually are."""
    inside = min(path.glob("*/recipe.yaml"), default=None) if os.path.isdir(path) else None
    if inside is not None:
        return f"name a run in it, such as {shlex.quote(plain(str(inside.parent)))}"
    printed = "name a folder that `remap distill` or `remap tune` has printed"
    return "see `ls runs`" if default_path().is_dir() else printed


def default_path() -> Path:
    """Return the folder of run directories unless --output names one."""
    return Path("runs")


def make_next(root: Path, stem: str) -> Path:
    """Make the folder ``root/stem-001``, or that of the first number that is free, and return its path.

    No other process gets the same one. Where it cannot be made, ``RunDir.create`` says why.
    """
    for number in count(1):
        path = root / f"{stem}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except (OSError, ValueError):
            if os.path.lexists(path):
                continue
        return path
    raise AssertionError("numbers do not end")
