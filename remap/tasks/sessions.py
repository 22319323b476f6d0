"""What ``remap tasks verify RUN`` finds of a run that extends others: its sessions' files, features and answers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from remap.errors import RunError
from remap.io.paths import expanded
from remap.network import Network
from remap.pipeline.sessions import sessions_of
from remap.runs.session_figures import sessions_problem
from remap.runs.task import load_task
from remap.tuning.finetuning.ranpac import PATH as RANDOM_FEATURES


@dataclass(frozen=True)
class SessionRow:
    """One session of a chain of runs.

    Attributes:
        same_features: Whether its features, before the fixed projection of ``ranpac``, are those of the newest session
            bit for bit; so it is after sessions that fit the classifier at once.
        same_answers: Whether all it learned, its classifier too, stands in the newest session bit for bit, and an image
            that gets its set of ``domains`` has the same answer as then.
        then, now: Accuracy on its images right after it, and by the newest run; None where it was not measured.
        problem: What is wrong with its files; empty where nothing is.
    """

    run: str
    classes: int
    same_features: bool
    same_answers: bool
    then: float | None
    now: float | None
    problem: str = ""

    @property
    def drop(self) -> float | None:
        """How much accuracy was lost since."""
        return None if self.then is None or self.now is None else self.then - self.now


def verify_sessions(path: str | Path) -> list[SessionRow]:
    """Compare every session of an extended run with the newest one; nothing is trained or evaluated.

    Raises:
        RunError: The run extends no other, or is damaged.
    """
    sessions = sessions_of(expanded(path))
    found = sessions[-1].run.summary().get("sessions")
    if found is None or len(sessions) < 2 or sessions_problem(found) is not None:
        raise RunError(f"{path} is neither a shelf of tasks nor a run that extends another", do="see `remap extend`")
    networks, matrix = [load_task(one.run.path)[0] for one in sessions], found["accuracy"]
    return [
        SessionRow(
            str(one.run.path),
            len(one.classes),
            _has_same_features(networks[number], networks[-1]),
            _is_kept(networks[number], networks[-1]),
            matrix[number][number],
            matrix[-1][number],
            one.run.damage() or "",
        )
        for number, one in enumerate(sessions)
    ]


def _has_same_features(old: Network, new: Network) -> bool:
    """Whether what the classifier reads is the same, with or without a random projection of it."""
    if (old.identity.sha256, old.preprocess) != (new.identity.sha256, new.preprocess):
        return False
    then, now = (
        {k: t for k, t in one.tensors.items() if not one.anatomy.is_head(k) and not k.startswith(f"{RANDOM_FEATURES}.")}
        for one in (old, new)
    )
    return then.keys() == now.keys() and all(torch.equal(tensor, now[name]) for name, tensor in then.items())


def _is_kept(old: Network, new: Network) -> bool:
    """Whether all that a run learned is part of a later one, with the same backbone, classes and pixels."""
    same = (old.identity.sha256, old.classes, old.preprocess) == (new.identity.sha256, new.classes, new.preprocess)
    now = new.tensors
    return same and all(name in now and torch.equal(tensor, now[name]) for name, tensor in old.tensors.items())
