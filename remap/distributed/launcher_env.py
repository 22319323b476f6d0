"""What a launcher tells each of its processes in environment variables, checked. Imports no torch."""

import os

from remap.errors import TrainingError

# The rank under launchers of MPI, which are known by variables of their own.
_MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# The smallest value of each number; -1 is an old way to say that there is no launcher.
_LEAST = {"RANK": 0, "LOCAL_RANK": -1, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}


def number(name: str, default: int) -> int:
    """Return one of the numbers that torchrun sets.

    Raises:
        TrainingError: It is not a number, or not one that is possible.
    """
    word = os.environ.get(name)
    if word is None:
        return default
    try:
        value = int(word)
    except ValueError:
        value = None
    if value is None or not _LEAST[name] <= value < 2**31:
        raise TrainingError(
            f"the environment variable {name} must be a whole number",
            given=repr(word),
            allowed=f"from {_LEAST[name]}; a launcher such as torchrun sets it",
            do=f"without a launcher, leave it out: env -u {name} remap ...",
        )
    return value


def without_launcher() -> dict[str, str]:
    """Return the environment for a process that is not one of the launcher's, and must not join their group."""
    names = {*_LEAST, *_MPI_RANKS, "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in names and "ELASTIC" not in name}


def require_complete() -> None:
    """Check that the variables of a launcher are all set and fit together.

    Raises:
        TrainingError: A variable is not a number, one is missing, or they contradict each other.
    """
    rank, _, size, _ = [number(name, least) for name, least in _LEAST.items()]
    if any(name in os.environ for name in _MPI_RANKS):
        return
    missing = [name for name in ("RANK", "MASTER_ADDR") if size > 1 and not os.environ.get(name)]
    if missing or rank >= size:
        given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
        problem = f"{' and '.join(missing)} not set" if missing else "the rank is not below the number of processes"
        raise TrainingError(
            f"the environment variables of the launcher do not fit together: {problem}",
            given=", ".join(f"{name}={os.environ[name]}" for name in given),
            do=f"start it with torchrun or `remap ... --devices N`; without: env -u {' -u '.join(given)} remap ...",
        )
