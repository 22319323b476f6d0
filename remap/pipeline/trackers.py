"""Experiment trackers, through Accelerate: TensorBoard, Weights & Biases, MLflow, Trackio."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from remap.data import METRIC
from remap.engine.callback import Callback
from remap.errors import RunError
from remap.io import atomic_write, checked_json
from remap.recipe import Recipe
from remap.runs.run_dir import RunDir

# Steps between two that are logged; epochs all are. What of a step is not logged: of the screen, or of epochs.
STEPS_BETWEEN = 10
NOT_LOGGED = ("left", "best", *METRIC.values())
# In the order in which those of one step are logged.
KINDS = ("step", "epoch", "summary")


def require_installed(recipe: Recipe) -> None:
    """Refuse trackers that are not installed.

    Raises:
        RunError: One is missing.
    """
    missing = [name for name in recipe.train.track if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise RunError(f"{names}: not installed", given="train.track (--track)", do=f"pip install {' '.join(missing)}")


class Tracker(Callback):
    """Logs a run to one tracker: its recipe, ``step/...``, ``epoch/...`` and, at the end, ``summary/...``.

    It starts with the first figures, so that a run that is refused leaves nothing there. A resumed run continues the
    same run of the tracker, after the last figures that it has: those after the checkpoint come again.
    """

    def __init__(self, name: str, recipe: Recipe, run_dir: RunDir) -> None:
        self.name, self._recipe, self._run_dir = name, recipe, run_dir
        self._tracker: GeneralTracker | None = None
        self._path = run_dir.path / "trackers.json"
        # Of each tracker its run's id, and under "NAME logged" step and kind of the last figures.
        self._known: dict[str, Any] = checked_json.read_run_json(self._path) if self._path.is_file() else {}
        self._logged: list[int] = self._known.get(f"{name} logged", [0, 0])
        self._step: int | None = self._logged[0] or None

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        if step == 1 or step % STEPS_BETWEEN == 0:
            self._log("step", {name: value for name, value in values.items() if name not in NOT_LOGGED}, step)

    def on_epoch(self, step: int, record: Mapping[str, Any]) -> None:
        self._log("epoch", record, step)

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._log("summary", summary, self._step)
        if self._tracker is not None:
            with self._explained():
                self._tracker.finish()

    def _log(self, kind: str, values: Mapping[str, Any], step: int | None) -> None:
        # MLflow takes no "@", as in the names of losses with several teachers.
        numbers = {
            f"{kind}/{name.replace('@', '.')}": value
            for name, value in flat(values)
            # A bool is an int in Python, and is no figure.
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        now = [step or 0, 1 + KINDS.index(kind)]
        if not numbers or now <= self._logged:
            return
        with self._explained():
            self._tracker, self._step = self._tracker or self._started(step), step
            self._tracker.log(numbers, step=step)
        # TensorBoard's files are cut where a run resumes (purge_step), so all that follows is logged again.
        if self.name != "tensorboard":
            self._logged = now
            self._write({f"{self.name} logged": now})

    def _write(self, values: dict[str, Any]) -> None:
        """Add to trackers.json; other trackers of the run have their own keys in it."""
        known = checked_json.read_run_json(self._path) if self._path.is_file() else {}
        # Not durable: it is written with every figure, and waiting for the disk would slow the steps down.
        atomic_write.write_text(self._path, atomic_write.json_text(known | values), durable=False)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: these are other people's services
            raise RunError(
                f"{self.name} did not take the figures of the run",
                given=f"{type(error).__name__}: {str(error)[:200]}",
                do=f"mend it, or remove it from train.track in {self._run_dir.path / 'recipe.yaml'}; then resume with:"
                f" {self._run_dir.resume_command()}",
            ) from error

    def _started(self, step: int | None) -> GeneralTracker:
        """Start the tracker's run, or continue the one that its id in trackers.json names."""
        name, known = self._run_dir.path.name, self._known.get(self.name)
        make = LOGGER_TYPE_TO_CLASS[self.name]
        project = os.environ.get("WANDB_PROJECT", self._recipe.name) if self.name == "wandb" else self._recipe.name
        if self.name == "tensorboard":  # its files may lack what was logged last: they are cut, and it is logged again
            tracker = make(self.name, self._run_dir.path, **({"purge_step": step} if known else {}))
        elif self.name == "mlflow":
            tracker = make(project, **({"run_id": known} if known else {"run_name": name}))
        else:
            which = {"id": known} if known and self.name == "wandb" else {}
            tracker = make(project, name=known if self.name == "trackio" and known else name, resume="allow", **which)
        tracker.start()
        if known is None:
            tracker.store_init_configuration({key: value for key, value in flat(self._recipe.model_dump(mode="json"))})
            self._write({self.name: _id(tracker, name)})
        return tracker


def _id(tracker: GeneralTracker, name: str) -> str:
    if tracker.name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.tracker.id) if tracker.name == "wandb" else name


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is inside of mappings by dotted key; lists of named mappings by those names, other lists as text."""
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
            value = {one["name"]: {k: v for k, v in one.items() if k != "name"} for one in value}
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)
