"""The processes that ``--devices N`` starts: this command N times, watched until all of them have ended.

A process of the group is in its own session, so that Ctrl-C reaches it once, through its parent. Its stdin is a pipe
from the parent, which says two things: a byte, that another process has failed; its end, that the parent is gone.
"""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import IO

from remap.errors import RemapError

# Tells a process that it was started here.
MARK = "REMAP_LAUNCHED"
# Exit code of a process that ended because another one had, as in ``remap.distributed.launch.ProcessLost``.
LOST = 3
# Seconds after the first process has failed: others may find out by themselves, then they are told, then they are
# ended, since one that waits for a dead one in a collective call hears no signal. Longer where all were asked to stop,
# as the state may be on its way to a slow disk.
TELL, END = 1.0, 4.0
TELL_STOPPING, END_STOPPING = 4.0, 10.0
# Variables that say how many processes there are, in other launchers' words. Where a machine has them set to 1 (srun,
# Kubernetes), Accelerate would take a process for the only one.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
STOPS = (signal.SIGINT, signal.SIGTERM)
_STOP_CODES = tuple(128 + number for number in STOPS)
# Of what a failed process wrote, so much is shown.
_TAIL = 2**16


class Group:
    """The processes of one command.

    Attributes:
        ended: Exit codes by rank, in the order in which they came.
        asked: The first signal that this command got, 0 for none.
        times: How many it got. With the second one, processes have as long as beside a failed one; the third ends them.
        killed: Ranks that had to be killed here, and whether they were stopped (as by Ctrl-Z) then.
    """

    def __init__(self, command: list[str], count: int) -> None:
        self.ended: dict[int, int] = {}
        self.killed: dict[int, bool] = {}
        self.asked, self.times = 0, 0
        self.signals: list[int] = []
        self.failed_at = self.urged_at = float("inf")
        self.told = False
        self.handlers = {number: signal.signal(number, self._note) for number in (*STOPS, signal.SIGTSTP)}
        self.files = contextlib.ExitStack()
        self.port = self.files.enter_context(_held_port())
        # The first process prints where this command does; what others write is kept, in case they fail.
        self.outputs: list[IO[bytes] | None] = [None]
        self.running: list[subprocess.Popen] = []
        # A signal that comes before Python is ready for it waits: the mask is inherited, and ``begin`` takes it off.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            for _ in range(count - 1):
                self.outputs.append(self.files.enter_context(tempfile.TemporaryFile()))  # noqa: SIM115
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
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def __enter__(self) -> "Group":
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
        self.times += 1
        if self.times == 2:
            self.urged_at = time.monotonic()
        self._signal(number)

    def _signal(self, number: int) -> None:
        for rank in self._alive():
            self.running[rank].send_signal(number)

    def _alive(self) -> list[int]:
        return [rank for rank in range(len(self.running)) if rank not in self.ended]

    def _end_the_others(self) -> None:
        since = time.monotonic() - min(self.failed_at, self.urged_at)
        stopping = bool(self.asked) or any(code in _STOP_CODES for code in self.ended.values())
        if since > (TELL_STOPPING if stopping else TELL) and not self.told:
            self.told = True
            for rank in self._alive():
                with contextlib.suppress(OSError):
                    self.running[rank].stdin.write(b"!")
                    self.running[rank].stdin.flush()
        if since > (END_STOPPING if stopping else END) or self.times > 2:
            for rank in self._alive():
                if rank not in self.killed:
                    self.killed[rank] = _is_stopped(self.running[rank].pid)
                    self.running[rank].kill()

    def first_failure(self) -> tuple[int, int] | None:
        """Rank and code of the first process that failed for a reason of its own."""
        own = {rank: code for rank, code in self.ended.items() if code not in (0, LOST) and rank not in self.killed}
        return next(((rank, code) for rank, code in own.items() if rank not in self.aborted()), None)

    def aborted(self) -> list[int]:
        """Ranks whose end comes of something else.

        Where all were asked to stop, libraries abort that a signal meets while they start. And NCCL's watchdog ends
        those, by SIGABRT, that waited for one that had to be killed.
        """
        if self.asked:
            return [rank for rank, code in self.ended.items() if code < 0 and rank not in self.killed]
        return [rank for rank, code in self.ended.items() if code == -signal.SIGABRT] if self.killed else []

    def code(self) -> int:
        """0, or the code of the first failure, which is 128 + its number for a signal; 1 where none has its own."""
        if not any(self.ended.values()):
            return 0
        failure = self.first_failure()
        if failure is None:
            return 128 + self.asked if self.asked else 1
        return failure[1] if failure[1] > 0 else 128 - failure[1]

    def written_by(self, rank: int) -> str:
        """The end of what a process other than the first has written; of several things, its last words."""
        output = self.outputs[rank]
        if output is None:
            return ""
        output.seek(max(0, output.seek(0, os.SEEK_END) - _TAIL))
        lines = output.read().decode(errors="replace").splitlines(keepends=True)
        return "".join(lines[max((n for n, line in enumerate(lines) if f"[process {rank}]" in line), default=0) :])


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    defaults = {"OMP_NUM_THREADS": str(max(1, cores() // count))}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # else Gloo asks for the address of the machine's name, which may lead nowhere
        defaults["GLOO_SOCKET_IFNAME"] = loopback[0]
    inherited = {name: value for name, value in os.environ.items() if name not in SIZES}
    return {**defaults, **inherited, **{name: str(value) for name, value in own.items()}}


def _is_stopped(pid: int) -> bool:
    """Whether a process is halted by a signal, as far as the system says."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False
