"""What a run directory records: recipe, environment, status, metrics, summary. Imports no torch."""

import contextlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remap.errors import RecipeError, RemapError, RunError
from remap.io import atomic_write, checked_json
from remap.io.checked_json import MOST_JSON_BYTES, is_number, parse_json, read_json
from remap.io.checked_read import read_regular, sha256_of
from remap.io.names import plain
from remap.io.paths import expanded
from remap.io.sealed_json import parse_sealed
from remap.recipe import Recipe, dump, load, load_finished
from remap.runs.environment import command, environment, now, plain_environment
from remap.runs.summary_schema import summary_problem

# The folder of a student that was cut from its teacher.
STUDENT_MODEL = "student_model"
# What networks were worth before training, in a run directory and beside its prepared teachers.
JUDGED = "judged.json"
_NOT_A_RECORD = "name a run directory that `remap` wrote; of such a run, bring back the file as it was"


@dataclass(frozen=True)
class RunRecords:
    """Paths and records of one run; ``remap.runs.run_dir.RunDir`` also makes, opens and locks it.

    recipe.yaml (resolved), command.txt, environment.json, status.json, metrics.jsonl (one line an epoch), summary.json,
    answers.json and the pictures in report/ (what report.html is made from), trainables.json (what is trained),
    judged.json (accuracies before training), task/ (what the tuned student costs to keep), teacher/ (the prepared
    teacher), teacher-fold-1/ ... (those of ``teacher.folds``), teacher-trial-full/ ... (while the way to prepare it is
    chosen), baseline/ (the same student by labels alone), trials/ (short runs of the objectives that one was chosen
    of), checkpoint/, student_model/ (a student that was cut from its teacher), backbone/ (the student of a run without
    labels, for timm), fault/ (the batch that broke training), stop (a file that asks the run to save and leave; removed
    when it is seen).

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
    def baseline(self) -> Path:
        """The run directory of the same student trained on labels alone."""
        return self.path / "baseline"

    @property
    def trials(self) -> Path:
        """The short runs of several objectives, of which one is chosen (losses: auto)."""
        return self.path / "trials"

    @property
    def stop(self) -> Path:
        """A file that asks the run to save its state and leave, as soon as it exists."""
        return self.path / "stop"

    @property
    def fault(self) -> Path:
        """The images of a step that stopped the run."""
        return self.path / "fault"

    @property
    def trainables(self) -> Path:
        return self.path / "trainables.json"

    @property
    def student_model(self) -> Path:
        """The student, where it was cut from its teacher for this run."""
        return self.path / STUDENT_MODEL

    @property
    def backbone(self) -> Path:
        """The tuned backbone of a run without labels, as a model folder of timm."""
        return self.path / "backbone"

    @property
    def checkpoint(self) -> Path:
        """The folder of checkpoints; see ``remap.engine.checkpoint``."""
        return self.path / "checkpoint"

    def recipe(self, *, to_run: bool = False) -> Recipe:
        """Return the recipe; its images were read once, so that their level is no longer in question.

        Args:
            to_run: It is to be run again: a combination that this version refuses is an error for a finished run too.

        Raises:
            RunError: The file is empty, which elsewhere is a recipe of defaults.
            RecipeError: It is not a recipe.
        """
        try:
            recipe = load(self.path / "recipe.yaml")
        except RecipeError:
            if to_run or not self.is_done:
                raise
            recipe = load_finished(self.path / "recipe.yaml")
        if not recipe.model_fields_set:
            raise RunError(
                f"{self.path / 'recipe.yaml'} is empty", do="copy that file again: a run cannot be known without it"
            )
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"depth": recipe.data.depth or 1})})

    def settle(self, recipe: Recipe) -> None:
        """Write the recipe once more, when the run has decided what was left to it."""
        atomic_write.write_text(self.path / "recipe.yaml", dump(recipe.written_out()))

    def resume_command(self) -> str:
        """Return the command line that resumes the run: `remap tune` where no recipe names a teacher."""
        try:
            teachers = self.recipe().named_teachers
        except RemapError:
            teachers = None
        return f"remap {'distill' if teachers else 'tune'} --resume {shlex.quote(str(self.path))}"

    def note_machine(self, machine: dict[str, Any], *, resuming: bool) -> None:
        """Complete environment.json by what only torch knows.

        A run that is resumed on another machine keeps the environment it began in, and adds that one under "resumed".
        """
        if not (self.path / "command.txt").is_file():  # the run was killed right after it was made
            atomic_write.write_text(self.path / "command.txt", shlex.join(command()) + "\n")
        path, current = self.path / "environment.json", environment() | machine
        first = self.environment() if resuming and path.is_file() else {}
        if not machine.keys().isdisjoint(first):  # else it was killed before it built anything
            legs = [first, *first.get("resumed", [])]
            if all(plain_environment(leg) != plain_environment(current) for leg in legs):
                atomic_write.write_json(path, first | {"resumed": [*first.get("resumed", []), current]})
        else:
            atomic_write.write_json(path, current)

    def environment(self) -> dict[str, Any]:
        found = self._record("environment.json")
        legs = found.get("resumed", [])
        if not isinstance(legs, list) or not all(isinstance(leg, dict) for leg in legs):
            raise RunError(f"cannot read {self.path / 'environment.json'}: 'resumed' is not a list", do=_NOT_A_RECORD)
        return found

    def _record(self, name: str) -> dict[str, Any]:
        found = checked_json.read_run_json(self.path / name)
        if not isinstance(found, dict):
            raise RunError(f"cannot read {self.path / name}: it is not a JSON object", do=_NOT_A_RECORD)
        return found

    def set_status(self, status: str, message: str = "", seconds: float = 0.0) -> None:
        """Write status.json; ``seconds`` is the working time so far, of all parts of the run."""
        record = {"status": status, "message": message, "time": now(), "seconds": round(seconds, 2)}
        atomic_write.write_json(self.path / "status.json", record)

    def seconds(self) -> float:
        """Return the working time so far in seconds, as in status.json."""
        recorded = self._status().get("seconds") if os.path.isfile(self.path / "status.json") else None
        return max(0.0, float(recorded)) if isinstance(recorded, int | float) and is_number(recorded) else 0.0

    def status(self) -> str:
        return str(self._status().get("status", ""))

    def outcome(self) -> tuple[str, str | None]:
        """Return how a run ended that is not done, as in "it was stopped", and the first line of its message."""
        if not os.path.isfile(self.path / "status.json"):  # killed at once, or a recipe that `remap init` wrote
            return "has not begun", None
        recorded = dict[str, Any]()
        with contextlib.suppress(RunError):  # a damaged record
            recorded = self._status()
        words = {"failed": "failed", "stopped": "was stopped"}
        message = str(recorded.get("message", "")).partition("\n")[0] or None
        return words.get(str(recorded.get("status")), "has not finished"), message

    def _status(self) -> dict[str, Any]:
        found = checked_json.read_run_json(self.path / "status.json")
        return found if isinstance(found, dict) else {}

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Rewrite metrics.jsonl."""
        atomic_write.write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records that ``write_metrics`` wrote.

        Raises:
            RunError: They are missing or damaged.
        """
        path = self.path / "metrics.jsonl"
        records: list[dict[str, Any]] = []
        try:
            for line in read_regular(path, MOST_JSON_BYTES).splitlines():
                if not isinstance(record := parse_json(line), dict) or not all(map(is_number, record.values())):
                    raise ValueError("it is not an object of numbers")
                records.append(record)
        except (OSError, ValueError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            reason = error.strerror if isinstance(error, OSError) else f"line {len(records) + 1}: {plain(what)}"
            raise RunError(f"cannot read {path}: {reason}", do=_NOT_A_RECORD) from error
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

    @property
    def is_done(self) -> bool:
        return (self.path / "summary.json").is_file() and self.status() == "done"

    @property
    def is_complete(self) -> bool:
        """Whether it is done, and its summary and task files are undamaged."""
        return self.is_done and self.damage() is None

    def damage(self) -> str | None:
        """Return what is wrong with the files of a run that is done; None if nothing."""
        path = self.path / "summary.json"
        try:
            problem = summary_problem(read_json(path))
            if problem is not None:
                return f"{path} is not a summary of a finished run: {problem}"
            path = self.task / "task.json"
            meta, _ = parse_sealed(read_regular(path, MOST_JSON_BYTES))
            path = self.task / "task.safetensors"
            differs = not isinstance(meta, dict) or sha256_of(path) != meta.get("sha256")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            return f"{path} cannot be read: {reason}"
        return f"{path} does not match its SHA-256 in task.json" if differs else None
