"""The run directory: enough to explain and repeat a run. Imports no torch."""

import contextlib
import fcntl
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from remap.errors import MissingData, RunError
from remap.io import atomic_write
from remap.io.checked_read import (
    MOST_JSON_BYTES,
    expanded,
    is_number,
    parse_json,
    plain,
    read_json,
    read_regular,
    sha256_of,
    unfit_for_a_place,
)
from remap.recipe import Recipe, dump, load
from remap.runs.curves import curves
from remap.runs.environment import command, environment, now, plain_environment
from remap.runs.summary_schema import summary_problem

# What ``create`` leaves when it is killed before recipe.yaml is there.
_DRAFT = re.compile(r"\.?recipe\.yaml\.\d+\.tmp(\.\d+\.tmp)?")

# The folder of a student that was cut from its teacher.
STUDENT_MODEL = "student_model"
# What to do about a record that cannot be one of a run.
_OWN = "name a run directory that `remap` wrote"


@dataclass(frozen=True)
class RunDir:
    """Paths and records of one run.

    recipe.yaml (resolved), command.txt, environment.json, status.json, metrics.jsonl (one line an epoch), curves.svg,
    summary.json, trainables.json (what is trained), task/ (what the tuned student costs to keep), teacher/ (the
    prepared teacher), checkpoint/, student_model/ (a student that was cut from its teacher), fault/ (the batch that
    broke training), stop (a file that asks the run to save and leave; removed when it is seen).

    ``seconds`` in status.json and summary.json is the time of all parts of a run that was stopped and resumed; a part
    that was killed counts up to its last epoch.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expanded(self.path))

    @property
    def task(self) -> Path:
        return self.path / "task"

    @property
    def teacher(self) -> Path:
        return self.path / "teacher"

    @property
    def stop(self) -> Path:
        """A file that anybody may make to let the run save its state and leave."""
        return self.path / "stop"

    @property
    def fault(self) -> Path:
        """What is kept of a step that stopped the run."""
        return self.path / "fault"

    @property
    def trainables(self) -> Path:
        return self.path / "trainables.json"

    @property
    def student_model(self) -> Path:
        """The student, where it was cut from its teacher for this run."""
        return self.path / STUDENT_MODEL

    @property
    def checkpoint(self) -> Path:
        """The folder of the generations; see ``remap.engine.checkpoint``."""
        return self.path / "checkpoint"

    @staticmethod
    def create(path: Path, recipe: Recipe) -> "RunDir":
        """Make a new run directory; an empty folder may be there already.

        Raises:
            RunError: It holds something, or cannot be written.
        """
        run = RunDir(path)
        unfit = unfit_for_a_place(run.path) or _unfit_for_tensors(run.path)
        if unfit:
            raise RunError("no run directory can be made there", given=plain(f"{path}: {unfit}"), do="name another")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            taken = any(not _DRAFT.fullmatch(entry.name) for entry in run.path.iterdir())
        except FileExistsError:
            taken = True
        except OSError as error:
            raise RunError(f"cannot make {path}: {error.strerror}", do="choose another --output") from error
        if taken:
            raise run._exists_already()
        run._claim(dump(recipe.written_out()))
        # File names on the command line need not be UTF-8; their bytes stay what they are.
        atomic_write.write_bytes(
            run.path / "command.txt", f"{shlex.join(command())}\n".encode(errors="surrogateescape")
        )
        atomic_write.write_json(run.path / "environment.json", environment())
        run.set_status("running")
        return run

    def require_free(self) -> None:
        """Refuse a place that ``create`` would refuse, before anything is done for it.

        Raises:
            RunError: Something is there already.
        """
        with contextlib.suppress(OSError):  # which ``create`` explains
            if self.path.is_dir() and any(not _DRAFT.fullmatch(entry.name) for entry in self.path.iterdir()):
                raise self._exists_already()

    def _claim(self, recipe: str) -> None:
        """Write recipe.yaml, which makes a folder a run: whole, and by one process only."""
        draft = self.path / f"recipe.yaml.{os.getpid()}.tmp"
        atomic_write.write_text(draft, recipe)
        try:
            os.link(draft, self.path / "recipe.yaml")
        except (FileExistsError, FileNotFoundError):  # another process has it, and swept the draft
            raise self._exists_already() from None
        except OSError:  # a file system without hard links; two runs at the same instant are not told apart there
            atomic_write.write_text(self.path / "recipe.yaml", recipe)
        finally:
            draft.unlink(missing_ok=True)

    def _exists_already(self) -> RunError:
        what = f"{self.path} exists already; nothing in it was touched"
        if not os.path.isdir(self.path):
            return RunError(what, given="it is no folder", do="name another --output")
        if not os.path.isfile(self.path / "recipe.yaml"):
            return RunError(what, given="it is no run directory, and not empty", do="name another --output")
        if self.became()[0] == "failed" and not any(self.checkpoint.glob("*.json")):
            return RunError(
                what, given="a run that failed before it trained", do="name another --output, or remove that folder"
            )
        return RunError(
            what, do=f"name another --output, or go on with that run: --resume {shlex.quote(str(self.path))}"
        )

    @staticmethod
    def open(path: Path) -> "RunDir":
        """An existing run directory.

        Raises:
            RunError: It is none.
        """
        run = RunDir(path)
        if not os.path.isfile(run.path / "recipe.yaml"):
            name = plain(str(path))
            if not os.path.lexists(run.path):
                raise RunError(f"there is no run directory {name}", given="no such folder", do="see `ls runs`")
            raise RunError(f"{name} is no run directory", given="recipe.yaml is missing", do="see `ls runs`")
        return run

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this process works in the directory, no other one does.

        Raises:
            RunError: One does, or a link in the directory leads elsewhere.
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
            atomic_write.require_no_links(self.path)
            self._sweep()
            yield

    def _to_lock(self) -> IO[bytes]:
        try:
            return open(self.path / "recipe.yaml", "r+b")  # some network drives lock only what may be written
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror}", do="let this place be written, or name another --output"
            ) from error

    def _sweep(self) -> None:
        """Delete what processes that were killed here left half-written."""
        atomic_write.sweep(self.path)
        for entry in self.path.iterdir():
            if _DRAFT.fullmatch(entry.name):
                entry.unlink(missing_ok=True)

    def recipe(self) -> Recipe:
        return load(self.path / "recipe.yaml")

    def note_machine(self, machine: dict[str, Any], *, resuming: bool) -> None:
        """Complete environment.json by what a module that imports no torch cannot know.

        A run that goes on somewhere else keeps the environment it began in, and adds the other one under "resumed".
        """
        if not (self.path / "command.txt").is_file():  # killed right after it was made
            atomic_write.write_text(self.path / "command.txt", shlex.join(command()) + "\n")
        path, current = self.path / "environment.json", environment() | machine
        first = self.environment() if resuming and path.is_file() else {}
        if not machine.keys().isdisjoint(first):  # else it was killed before anything was made
            legs = [first, *first.get("resumed", [])]
            if all(plain_environment(leg) != plain_environment(current) for leg in legs):
                atomic_write.write_json(path, first | {"resumed": [*first.get("resumed", []), current]})
        else:
            atomic_write.write_json(path, current)

    def environment(self) -> dict[str, Any]:
        found = self._record("environment.json")
        legs = found.get("resumed", [])
        if not isinstance(legs, list) or not all(isinstance(leg, dict) for leg in legs):
            raise RunError(f"cannot read {self.path / 'environment.json'}: resumed is no list of records", do=_OWN)
        return found

    def _record(self, name: str) -> dict[str, Any]:
        found = atomic_write.read_json(self.path / name)
        if not isinstance(found, dict):
            raise RunError(f"cannot read {self.path / name}: it is no record", do=_OWN)
        return found

    def set_status(self, status: str, message: str = "", seconds: float = 0.0) -> None:
        """Note where the run stands.

        Args:
            seconds: It has worked so far, all its parts together.
        """
        record = {"status": status, "message": message, "time": now(), "seconds": round(seconds, 2)}
        atomic_write.write_json(self.path / "status.json", record)

    def seconds(self) -> float:
        """For how long it has worked so far, as ``set_status`` noted it."""
        recorded = self._noted().get("seconds") if os.path.isfile(self.path / "status.json") else None
        return max(0.0, float(recorded)) if isinstance(recorded, int | float) and is_number(recorded) else 0.0

    def status(self) -> str:
        return str(self._noted().get("status", ""))

    def became(self) -> tuple[str, str | None]:
        """What became of a run that is not done, as in "it was stopped", and the first line of its message."""
        try:
            noted = self._noted() if os.path.isfile(self.path / "status.json") else {}
        except RunError:  # a damaged record
            noted = {}
        words = {"failed": "failed", "stopped": "was stopped"}
        message = str(noted.get("message", "")).partition("\n")[0]
        return words.get(str(noted.get("status")), "has not finished"), message or None

    def _noted(self) -> dict[str, Any]:
        found = atomic_write.read_json(self.path / "status.json")
        return found if isinstance(found, dict) else {}

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl and curves.svg anew."""
        atomic_write.write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))
        atomic_write.write_text(self.path / "curves.svg", curves(history, self.path.name))

    def metrics(self) -> list[dict[str, Any]]:
        """The records that ``write_metrics`` wrote.

        Raises:
            RunError: They are missing or damaged.
        """
        path = self.path / "metrics.jsonl"
        try:
            records = [parse_json(line) for line in read_regular(path, MOST_JSON_BYTES).splitlines()]
            if not all(isinstance(record, dict) and all(map(is_number, record.values())) for record in records):
                raise ValueError("a line is no record of numbers")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else plain(str(error))
            raise RunError(f"cannot read {path}: {reason}", do=_OWN) from error
        return records

    def write_trainables(self, trained: Mapping[str, Any]) -> None:
        """Write name, shape and size of every trained parameter."""
        rows = [
            {"name": name, "shape": list(parameter.shape), "parameters": parameter.numel()}
            for name, parameter in trained.items()
        ]
        atomic_write.write_json(self.trainables, rows)

    def write_summary(self, summary: dict[str, Any]) -> None:
        atomic_write.write_json(self.path / "summary.json", summary)

    def summary(self) -> dict[str, Any]:
        return self._record("summary.json")

    @contextmanager
    def images(self, instead: str = "") -> Iterator[None]:
        """While the images of its recipe are looked for: where they are gone, say how to go on without the old place.

        Args:
            instead: What else can be done, as in ", or name others".
        """
        try:
            yield
        except MissingData as error:
            do = (
                f"bring the images back that the run was made with; {self.path / 'recipe.yaml'} names their place."
                " If they have moved, write the new place there (source, val_source and unlabeled, under data)"
            )
            raise MissingData(error.what, given=error.given, do=do + instead) from error

    @property
    def is_done(self) -> bool:
        return (self.path / "summary.json").is_file() and self.status() == "done"

    @property
    def is_whole(self) -> bool:
        """Whether it is done, and nothing is wrong with what that leaves."""
        return self.is_done and self.damage() is None

    def damage(self) -> str | None:
        """What is wrong with the files that a run that is done leaves; None if nothing."""
        path = self.path / "summary.json"
        try:
            problem = summary_problem(read_json(path))
            if problem is not None:
                return f"{path} is no summary of a finished run: {problem}"
            path = self.task / "task.json"
            meta = read_json(path)
            path = self.task / "task.safetensors"
            differs = not isinstance(meta, dict) or sha256_of(path) != meta.get("sha256")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            return f"{path} cannot be read: {reason}"
        return f"{path} is not the one that task.json is about" if differs else None


def _unfit_for_tensors(path: Path) -> str | None:
    """Safetensors opens no other names, so that a run could be neither resumed nor used."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "it holds a byte that is no UTF-8"
    return None


def default_path() -> Path:
    """The folder that holds run directories unless --output names one."""
    return Path("runs")


def next_path(root: Path, stem: str) -> Path:
    """``root/stem-001``, or the first number that is free."""
    taken = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    number = next(n for n in range(1, len(taken) + 2) if f"{stem}-{n:03d}" not in taken)
    return root / f"{stem}-{number:03d}"
