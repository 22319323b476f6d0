"""What a launcher tells each of its processes in environment variables, checked. Imports no torch."""

import os
import socket

from remap.errors import TrainingError

# The rank under launchers of MPI, which are known by variables of their own.
_MPI = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Whole numbers from these on; -1 is an old way to say that there is no launcher.
_LEAST = {"RANK": 0, "LOCAL_RANK": -1, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
_INTERFACE = "GLOO_SOCKET_IFNAME"


def number(name: str, default: int) -> int:
    """One of the numbers that torchrun sets.

    Raises:
        TrainingError: It is none.
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


def require_complete() -> None:
    """The variables of a launcher are numbers that fit together, and none is missing.

    Raises:
        TrainingError: A variable is no number, one is missing, or they contradict each other.
    """
    found = {name: number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        number(name, 0)
    if any(name in os.environ for name in _MPI):
        return
    several = found["WORLD_SIZE"] > 1
    missing = [name for name in ("RANK", "MASTER_ADDR") if several and not os.environ.get(name)]
    problem = f"{' and '.join(missing)} not set" if missing else None
    if problem is None and found["RANK"] >= found["WORLD_SIZE"]:
        problem = "the rank is not below the number of processes"
    if problem is not None:
        given = {name: os.environ[name] for name in found if name in os.environ}
        raise TrainingError(
            f"the environment variables of the launcher do not fit together: {problem}",
            given=", ".join(f"{name}={word}" for name, word in given.items()),
            do=f"start it with torchrun or `remap ... --devices N`; without: env -u {' -u '.join(given)} remap ...",
        )


def require_interface() -> None:
    """The network interface that the processes are to meet at, where one is named, is there.

    Raises:
        TrainingError: The processes are to meet at a network interface that this machine does not have.
    """
    word = os.environ.get(_INTERFACE, "")
    known = [name for _, name in socket.if_nameindex()]
    if word and not set(word.split(",")) <= set(known):
        raise TrainingError(
            f"the environment variable {_INTERFACE} names no network interface of this machine",
            given=repr(word),
            allowed=known,
            do=f"name one of them, or leave it out: env -u {_INTERFACE} remap ...",
        )
