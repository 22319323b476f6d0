"""``--devices N``: this command N times on this machine, watched until all of them have ended. Imports no torch.

A process started here is in its own session, so that Ctrl-C reaches it once, through its parent. Its stdin is a pipe
from the parent, which says two things: a byte, that another process has failed; its end, that the parent is gone.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO

from remap.errors import RemapError
from remap_cli import view

# Tells a process that it was started here.
MARK = "REMAP_LAUNCHED"
# Exit code of a process that ended because another one had, as in ``remap.engine.launch.ProcessLost``.
LOST = 3
# Seconds after the first process has failed: others may find out by themselves, then they are told, then they are
# ended, since one that waits for a dead one in a collective call hears no signal. Longer where all were asked to stop,
# as the state may be on its way to a slow disk.
TELL, END = 1.0, 4.0
TELL_STOPPING, END_STOPPING = 4.0, 10.0
# Seconds that a process whose parent is gone has for saving its state.
ORPHAN = 60.0
_STOPS = (signal.SIGINT, signal.SIGTERM)
_STOP_CODES = tuple(128 + number for number in _STOPS)
# Of what a failed process wrote, so much is shown.
_TAIL = 2**16

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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


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
    return int(os.environ.get("RANK", "0")) == 0


def explained_by_parent(code: int) -> bool:
    """Whether this process, the one whose stderr the user sees, may end without a word."""
    return MARK in os.environ and is_first() and code == LOST


def has_launcher() -> bool:
    """Whether something else decides about the number of processes: torchrun, accelerate launch, mpirun, or this."""
    names = {"RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"}
    # The only trace of `accelerate launch --cpu`, which starts one process whatever it is asked for.
    return bool(names & os.environ.keys()) or "ACCELERATE_DYNAMO_MODE" in os.environ


def processes(count: int | None) -> None:
    """Start this command in ``count`` processes and exit with their code; return where that is not called for.

    It is not for one process, nor under a launcher, which has started them; ``check_processes`` compares the numbers.
    """
    if count is None or count == 1 or has_launcher() or _command is None:
        return
    cores = _cores()
    if count > cores:
        view.note(f"{count} processes share {cores} CPU core{'s' if cores > 1 else ''}")
    with _Processes(_command, count) as group:
        group.wait()
        group.explain()
    raise SystemExit(group.code())


def recorded(run: Path) -> int | None:
    """The number of processes a run was made for. What is wrong with the run, its reader says."""
    from remap.recipe import strict_yaml

    try:
        train = strict_yaml.read_mapping(run.expanduser() / "recipe.yaml").get("train")
    except (RemapError, OSError):
        return None
    count = train.get("processes") if isinstance(train, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Processes:
    """The processes of one command.

    Attributes:
        ended: Exit codes by rank, in the order in which they came.
        asked: The first signal that this command got, 0 for none.
        killed: Ranks that had to be killed here, and whether they were stopped (as by Ctrl-Z) then.
    """

    def __init__(self, command: list[str], count: int) -> None:
        self.ended: dict[int, int] = {}
        self.killed: dict[int, bool] = {}
        self.asked = 0
        self.signals: list[int] = []
        self.failed_at = self.asked_at = float("inf")
        self.told = False
        self.handlers = {number: signal.signal(number, self._note) for number in (*_STOPS, signal.SIGTSTP)}
        self.files = contextlib.ExitStack()
        self.port = self.files.enter_context(_held_port())
        # The first process prints where this command does; what others write is kept, in case they fail.
        self.outputs: list[IO[bytes] | None] = [None]
        for _ in range(count - 1):
            self.outputs.append(self.files.enter_context(tempfile.TemporaryFile()))  # noqa: SIM115
        self.running: list[subprocess.Popen] = []
        # A signal that comes before Python is ready for it waits: the mask is inherited, and ``begin`` takes it off.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            for rank, output in enumerate(self.outputs):
                self.running.append(
                    subprocess.Popen(
                        command,
                        env=_environment(rank, count, self.port.getsockname()[1]),
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
        except OSError as error:
            self.__exit__()
            raise RemapError(f"cannot start {count} processes: {error.strerror}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
        self.files.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def wait(self) -> None:
        """Until all have ended, by themselves or because one of them failed."""
        while len(self.ended) < len(self.running):
            while self.signals:
                self._pass_on(self.signals.pop(0))
            for rank, process in enumerate(self.running):
                if rank not in self.ended and process.poll() is not None:
                    self.ended[rank] = process.returncode
                    if process.returncode:
                        self.failed_at = min(self.failed_at, time.monotonic())
            self._end_the_others()
            time.sleep(0.02)

    def _pass_on(self, number: int) -> None:
        if number == signal.SIGTSTP:
            self._signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._signal(signal.SIGCONT)
            return
        self.asked = self.asked or number
        self._signal(number)

    def _signal(self, number: int) -> None:
        for rank in self._alive():
            self.running[rank].send_signal(number)

    def _alive(self) -> list[int]:
        return [rank for rank in range(len(self.running)) if rank not in self.ended]

    def _end_the_others(self) -> None:
        since = time.monotonic() - self.failed_at
        stopping = bool(self.asked) or any(code in _STOP_CODES for code in self.ended.values())
        if since > (TELL_STOPPING if stopping else TELL) and not self.told:
            self.told = True
            for rank in self._alive():
                with contextlib.suppress(OSError):
                    self.running[rank].stdin.write(b"!")
                    self.running[rank].stdin.flush()
        if since > (END_STOPPING if stopping else END):
            for rank in self._alive():
                if rank not in self.killed:
                    self.killed[rank] = _is_stopped(self.running[rank].pid)
                    self.running[rank].kill()

    def _first_failure(self) -> tuple[int, int] | None:
        """Rank and code of the first process that failed for a reason of its own."""
        own = {rank: code for rank, code in self.ended.items() if code not in (0, LOST) and rank not in self.killed}
        return next(iter(own.items()), None)

    def code(self) -> int:
        """0, or the code of the first failure, which is 128 + its number for a signal; 1 where none has its own."""
        if not any(self.ended.values()):
            return 0
        failure = self._first_failure()
        if failure is None:
            return 128 + self.asked if self.asked else 1
        return failure[1] if failure[1] > 0 else 128 - failure[1]

    def explain(self) -> None:
        """Say what went wrong, unless the first process, whose stderr is this command's, has said it."""
        failure = self._first_failure()
        if failure is not None:
            rank, code = failure
            if code < 0:
                self._show(rank)
                view.error(_ended_by(rank, signal.Signals(-code)))
            elif self.ended[0] != code:
                self._show(rank)
        elif self.killed:
            view.error(_silent(self.killed, self.asked))
        elif any(self.ended.values()):
            view.error(RemapError("the processes lost each other; all of them were ended"))
            for rank, code in self.ended.items():
                if code:
                    self._show(rank)

    def _show(self, rank: int) -> None:
        """What a process other than the first has written; of several things, its error."""
        output = self.outputs[rank]
        if output is None:
            return
        output.seek(max(0, output.seek(0, os.SEEK_END) - _TAIL))
        text = output.read().decode(errors="replace")
        _, mark, error = text.rpartition(f"error: [process {rank}]")
        sys.stderr.write(mark + error)
        sys.stderr.flush()


def _held_port() -> socket.socket:
    """A free port. Being bound, nobody else is given it, and PyTorch's store can listen on it all the same."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What PyTorch, Accelerate and this program read; as torchrun sets it."""
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        MARK: 1,
    }
    # Each process taking all cores is slower than one process.
    defaults = {"OMP_NUM_THREADS": str(max(1, _cores() // count))}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # else Gloo asks for the address of the machine's name, which may lead nowhere
        defaults["GLOO_SOCKET_IFNAME"] = loopback[0]
    return {**defaults, **os.environ, **{name: str(value) for name, value in own.items()}}


def _is_stopped(pid: int) -> bool:
    """Whether a process is halted by a signal, as far as the system says."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def _ended_by(rank: int, number: signal.Signals) -> RemapError:
    hints = {
        signal.SIGKILL: "somebody, or the system because memory ran out, killed it",
        signal.SIGBUS: "memory that files share may be full (/dev/shm)",
    }
    return RemapError(
        f"[process {rank}] was ended by {number.name}; the other processes were ended too",
        given=hints.get(number),
        do="start again; a run that had begun to train goes on with --resume RUN",
    )


def _silent(killed: dict[int, bool], asked: int) -> RemapError:
    names = ", ".join(str(rank) for rank in killed)
    if asked:
        return RemapError(f"[process {names}] did not leave within {END_STOPPING:g} s and was killed")
    state = "it was halted by a signal (SIGSTOP)" if any(killed.values()) else None
    return RemapError(
        f"[process {names}] did not answer the others in time and was killed; all processes were ended",
        given=state,
        do="see what holds it up; REMAP_TIMEOUT (seconds, 600 by default) says how long the others wait."
        " A run that had begun to train goes on with --resume RUN",
    )
