"""``--devices N``: this command in N processes, which PyTorch's elastic launcher starts and watches.

The first process prints where the command does. A process that fails writes its message into a file of the launcher's
log folder; the command prints the one of the process that failed first. Imports torch only to start processes.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from remap.distributed import launcher_env
from remap.errors import Interrupted, RemapError
from remap.io.human_size import number_of
from remap.io.names import plain
from remap_cli import console

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Set in the processes that are started here.
MARK = "REMAP_LAUNCHED"
# Where PyTorch's launcher looks for the error of a process.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# Processes at most: a run directory from elsewhere may name any number.
MOST = 1024
# Processes that the files of a run may ask for by themselves, or as many as there are cores if those are more.
UNASKED = 8
# Seconds between two looks at the processes. The others of a failed one have as long to report the same mistake.
LOOK_EVERY_S = 0.5
# Seconds that processes have for saving after Ctrl-C, and those whose parent was killed.
SAVING_S, ORPHAN_S = 600, 60.0
# Exit codes of processes that ended because another one had: ``ProcessLost``, and the launcher's SIGTERM.
CONSEQUENCES = (3, 128 + signal.SIGTERM, -signal.SIGTERM)
RESUME = "a run that had begun to train continues with --resume RUN"
# Variables in which MPI launchers give the number of processes; some machines set them to 1 for every command.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def is_first() -> bool:
    """Return whether this is the only process or the first of several, which is the one that prints."""
    return launcher_env.number("RANK", 0) == 0


def has_launcher() -> bool:
    """Return whether torchrun, accelerate launch, mpirun or this command has started the processes."""
    by_mpi = any(os.environ.get(name, "1") not in ("", "0", "1") for name in MPI_SIZES)
    several = by_mpi or launcher_env.number("WORLD_SIZE", 1) > 1
    # The other name is the only trace of `accelerate launch --cpu`, which always starts one process.
    return several or bool({"RANK", "ACCELERATE_DYNAMO_MODE"} & os.environ.keys())


def start_processes(count: int | None) -> None:
    """Run this command in ``count`` processes and exit with their code.

    Return without starting any for one process and under a launcher, where ``check_processes`` compares the numbers.

    Raises:
        RemapError: There are too many, or the system cannot start them.
        SystemExit: They have ended.
    """
    if count is None or count == 1 or has_launcher():
        return
    if count > MOST:
        raise RemapError("too many processes", given=f"--devices {count}", allowed=f"1 to {MOST}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count > cores:
        console.note(f"{count} processes share {number_of(cores, 'CPU core')}")
    _set_environment(count, cores)
    with tempfile.TemporaryDirectory(prefix="remap-", ignore_cleanup_errors=True) as folder:
        try:
            code = _launch(count, Path(folder))
        except OSError as error:
            raise RemapError(f"cannot start {count} processes: {error.strerror}") from error
    raise SystemExit(code)


def most_unasked() -> int:
    """Return how many processes or threads are started because a run's files, perhaps a stranger's, say so."""
    return max(UNASKED, os.cpu_count() or 1)


def require_few(count: int | None, run: Path, do: str) -> None:
    """Refuse to start many processes that nobody but the files of a run asks for; under a launcher none are started.

    Raises:
        RemapError: There are too many.
    """
    if count is not None and count > most_unasked() and not has_launcher():
        what = f"the files of {plain(str(run))} ask for {count:,} processes; nothing was started"
        raise RemapError(what, allowed=f"1 to {most_unasked()} unless you ask for them too", do=do)


def _set_environment(count: int, cores: int) -> None:
    """Set what the processes inherit."""
    for name in MPI_SIZES:  # at 1 they would tell Accelerate that a process is the only one
        os.environ.pop(name, None)
    os.environ[MARK] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_S))
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):  # otherwise Gloo looks up this machine's name, which may not resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    # The end of this pipe tells the processes that this command was killed; the other end stays open until then.
    os.dup2(os.pipe()[0], 0)


def _launch(count: int, folder: Path) -> int:
    """Start the processes, wait for them and report an error; return the exit code."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the launcher logs every signal it sends
    # The launcher reuses a store that this process has at the same port. Its own would listen on every interface.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    _store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach()
    )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="remap",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=LOOK_EVERY_S,
        logs_specs=DefaultLogsSpecs(str(folder), redirects={rank: Std.ALL for rank in range(1, count)}),
    )
    config.signals_to_handle = "SIGTERM,SIGINT"  # SIGHUP keeps its meaning under nohup
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [sys.argv[0]]
    words = [word.replace("$", "$$") for word in (*program, *sys.argv[1:])]  # the launcher replaces ${local_rank}
    try:
        elastic_launch(config, sys.executable)(*words)
    except (ChildFailedError, SignalException) as ended:
        for number in (signal.SIGINT, signal.SIGTERM):  # the launcher's handlers would raise while a message is printed
            signal.signal(number, signal.SIG_IGN)
        if isinstance(ended, ChildFailedError):
            return _report_failure(ended.failures, folder)
        return _report_stop(128 + ended.sigval, folder)
    return 0


def _report_failure(failures: Mapping[int, "ProcessFailure"], folder: Path) -> int:
    """Print the message of the process that failed first for a reason of its own; return its exit code."""
    first = min(failure.timestamp for failure in failures.values())

    def order(rank: int) -> tuple[bool, bool, int, int]:
        # Those that failed seconds later were ended by the launcher.
        time, code = failures[rank].timestamp, failures[rank].exitcode
        return time > first + 2, code in CONSEQUENCES, time, rank

    rank = min(failures, key=order)
    code = failures[rank].exitcode
    if Path(failures[rank].error_file).is_file():
        _print(failures[rank].message, code)
    elif rank > 0:  # what it wrote before it ended; the first process wrote where this command does
        for log in folder.glob(f"*/*/{rank}/std*.log"):
            sys.stderr.write(log.read_text(errors="replace")[-(2**16) :])
    if code >= 0:
        return code
    number = signal.Signals(-code)
    hint = "the system kills processes when memory runs out" if number == signal.SIGKILL else None
    what = f"[process {rank}] was ended by {number.name}; the other processes were ended too"
    console.error(RemapError(what, given=hint, do=f"start again; {RESUME}"))
    return 128 + number


def _report_stop(code: int, folder: Path) -> int:
    """Print the message of the first process that was stopped; return the exit code."""
    files = sorted(folder.glob("*/*/*/error.json"))
    text = f"stopped\n  do:      {RESUME}"
    with contextlib.suppress(ValueError, OSError):  # one that had to be killed while it wrote
        text = json.loads(files[0].read_text())["message"] if files else text
    _print(text, code)
    return code


def _print(text: str, code: int) -> None:
    if code == 1:  # a bug: its traceback
        sys.stderr.write(text)
    else:
        console.error(Interrupted(text) if code > 128 else RemapError(text))


def watch_parent() -> None:
    """In a process that was started here: stop as after SIGTERM when the parent is killed, which stdin tells."""
    if MARK in os.environ:
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    with contextlib.suppress(OSError):
        os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)  # a process that is stuck in a collective call handles no signal
    os._exit(128 + signal.SIGTERM)


def report(error: BaseException) -> int:
    """Print an error, or leave it to the parent to print; return the exit code."""
    code = error.exit_code if isinstance(error, RemapError) else 1
    text = console.with_rank(str(error)) if code != 1 else "".join(traceback.format_exception(error))
    if MARK in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ[ERROR_FILE]).write_text(json.dumps({"message": text, "timestamp": int(time.time())}))
    elif isinstance(error, RemapError):
        console.error(error)
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    return code
