"""``--devices N``: whether to start a group of processes, what one of them knows of it, and what is said of its end.

Imports no torch.
"""

import contextlib
import os
import resource
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

from remap.distributed import launcher_env
from remap.errors import RemapError
from remap.io.paths import expanded
from remap_cli import group, view
from remap_cli.group import LOST, MARK, STOPS, Group, cores

# Seconds that a process whose parent is gone has for saving its state.
ORPHAN = 60.0
# Processes at most: more than a machine has places for.
MOST = 1024
_command: list[str] | None = None
_told = threading.Event()


def begin() -> None:
    """Called once by ``main``, after its signal handlers are in place."""
    global _command
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [sys.argv[0]]
    _command = [sys.executable, *program, *sys.argv[1:]]
    if MARK in os.environ:
        threading.Thread(target=_listen_to_parent, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _listen_to_parent() -> None:
    with contextlib.suppress(OSError):
        if os.read(0, 1):
            _told.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN)
    os._exit(128 + signal.SIGTERM)


def told_of_failure() -> bool:
    """Whether the parent has said that another process failed; whatever comes of that needs no message."""
    return _told.is_set()


def is_first() -> bool:
    """Whether this is the only process, or the first of a launcher's: the one that prints."""
    return launcher_env.number("RANK", 0) == 0


def explained_by_parent(code: int) -> bool:
    """Whether this process, the one whose stderr the user sees, may end without a word."""
    return MARK in os.environ and is_first() and code == LOST


def has_launcher() -> bool:
    """Whether something else decides about the number of processes: torchrun, accelerate launch, mpirun, or this."""
    # Some machines say 1 to every process that nobody has multiplied.
    by_mpi = any(os.environ.get(name, "1") not in ("", "0", "1") for name in group.SIZES)
    several = by_mpi or launcher_env.number("WORLD_SIZE", 1) > 1
    # The other name is the only trace of `accelerate launch --cpu`, which starts one process whatever it is asked for.
    return several or bool({"RANK", "ACCELERATE_DYNAMO_MODE"} & os.environ.keys())


def processes(count: int | None) -> None:
    """Start this command in ``count`` processes and exit with their code; return where that is not called for.

    It is not for one process, nor under a launcher, which has started them; ``check_processes`` compares the numbers.
    """
    if count is None or count == 1 or has_launcher():
        return
    _require_few(count)
    if _command is None:
        return
    available = cores()
    if count > available:
        view.note(f"{count} processes share {available} CPU core{'s' if available > 1 else ''}")
    with Group(_command, count) as started:
        started.wait()
        _explain(started)
    raise SystemExit(started.code())


def _require_few(count: int) -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # Each takes two open files here, and those of a group two for each of the others.
    most = MOST if files == resource.RLIM_INFINITY else max(1, min(MOST, (files - 64) // 2))
    if count > most:
        raise RemapError(
            "so many processes cannot be started",
            given=f"--devices {count}",
            allowed=f"1 to {most}" + (f", by the limit of open files (ulimit -n: {files})" if most < MOST else ""),
        )


def recorded(run: Path) -> int | None:
    """The number of processes a run was made for. What is wrong with the run, its reader says."""
    from remap.recipe import strict_yaml

    try:
        train = strict_yaml.read_mapping(expanded(run) / "recipe.yaml").get("train")
    except (RemapError, OSError):
        return None
    count = train.get("processes") if isinstance(train, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def _explain(started: Group) -> None:
    """Say what went wrong, unless the first process, whose stderr is this command's, has said it."""
    failure = started.first_failure()
    if failure is not None:
        rank, code = failure
        if code < 0:
            _show(started, rank)
            view.error(_ended_by(rank, signal.Signals(-code)))
        elif started.ended[0] != code:
            _show(started, rank)
    elif started.killed:
        for rank in started.aborted():
            _show(started, rank)
        view.error(_silent(started))
    elif started.asked:
        ended = [f"process {rank} ended by {signal.Signals(-started.ended[rank]).name}" for rank in started.aborted()]
        what = f"interrupted ({', '.join(ended) or 'the processes lost each other'})"
        view.error(RemapError(what, do=f"a run that had begun to train {_goes_on()}"))
    elif any(started.ended.values()):
        view.error(RemapError("the processes lost each other; all of them were ended"))
        for rank, code in started.ended.items():
            if code:
                _show(started, rank)


def _show(started: Group, rank: int) -> None:
    sys.stderr.write(started.written_by(rank))
    sys.stderr.flush()


def _ended_by(rank: int, number: signal.Signals) -> RemapError:
    hints = {
        signal.SIGKILL: "somebody, or the system because memory ran out, killed it",
        signal.SIGBUS: "memory that files share may be full (/dev/shm)",
    }
    return RemapError(
        f"[process {rank}] was ended by {number.name}; the other processes were ended too",
        given=hints.get(number),
        do=f"start again; a run that had begun to train {_goes_on()}",
    )


def _goes_on() -> str:
    """With the folder of the run, if this command's words say it."""
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    folders = [name for word, name in zip(words, words[1:], strict=False) if word in ("--output", "--resume")]
    return f"goes on with --resume {shlex.quote(folders[-1]) if folders else 'RUN'}"


def _silent(started: Group) -> RemapError:
    names, others = (", ".join(map(str, ranks)) for ranks in (started.killed, started.aborted()))
    if started.asked:
        when = "before the third signal" if started.times > 2 else f"within {group.END_STOPPING:g} s"
        return RemapError(
            f"[process {names}] did not leave {when} and was killed",
            do=f"a run that had begun to train {_goes_on()}",
        )
    state = "it was halted by a signal (SIGSTOP)" if any(started.killed.values()) else None
    if others and state is None:
        state = f"[process {others}] was ended by SIGABRT: by NCCL's watchdog, or by an error of its own"
    return RemapError(
        f"[process {names}] did not answer the others in time and was killed; all processes were ended",
        given=state,
        do="see what holds it up; REMAP_TIMEOUT (seconds, 600 by default) says how long the others wait."
        f" A run that had begun to train {_goes_on()}",
    )
