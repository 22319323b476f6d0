"""``--devices N`` without a run: a small command starts itself, fails, is stopped and killed, by real signals.

Expected values are the rules of docs/many-processes.md, section "How it ends".
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from remap.errors import RemapError
from remap_cli import launch

pytestmark = pytest.mark.slow

# Each process runs BODY.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from remap.errors import Interrupted, RemapError
from remap_cli import launch
from remap_cli.app import app
from remap_cli.main import main

folder = Path(os.environ["FOLDER"])


def note(number, frame):
    with open(folder / f"signals-{os.environ.get('RANK')}", "a") as file:
        file.write(f"{int(number)} ")
    raise Interrupted("stopped, and saved", exit_code=128 + number)


@app.command()
def work(words: list[str]) -> None:
    launch.start_processes(int(os.environ["COUNT"]))
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    BODY


main()
"""
NOTES = "signal.signal(signal.SIGINT, note); signal.signal(signal.SIGTERM, note); (folder / f'ready-{rank}').touch()"
Ended = tuple[int, str, str]


@pytest.fixture
def begin(tmp_path: Path, started: list[subprocess.Popen]) -> Callable[..., subprocess.Popen]:
    def start(body: str, count: int = 2, *words: str, **environment: str) -> subprocess.Popen:
        (tmp_path / "script.py").write_text(SCRIPT.replace("BODY", body.replace("\n", "\n    ")))
        command = [sys.executable, str(tmp_path / "script.py"), "work", *(words or ("word",))]
        own = {"FOLDER": str(tmp_path), "COUNT": str(count), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **own, **environment}, **pipes))
        return started[-1]

    return start


@pytest.fixture
def run(begin: Callable[..., subprocess.Popen]) -> Callable[..., Ended]:
    def start(body: str, count: int = 2, *words: str, **environment: str) -> Ended:
        process = begin(body, count, *words, **environment)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, "".join(errors.splitlines(True)[_shared(errors) :])

    return start


def _shared(errors: str) -> int:
    """1 if the first line is the remark on more processes than cores, as on this machine perhaps."""
    return int("processes share" in errors.partition("\n")[0])


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def all_ready(folder: Path, count: int = 2) -> Callable[[], bool]:
    return lambda: all((folder / f"ready-{rank}").exists() for rank in range(count))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening(port: int) -> set[str]:
    """Addresses as the system lists them, in hexadecimal; state 0A is LISTEN (proc(5))."""
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, number in places if int(number, 16) == port}


def test_each_process_has_its_place_and_only_the_first_prints(
    begin: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    """The variables are those that torchrun sets; words reach each process as they were typed."""
    body = f"""
import json
{NOTES}
(folder / f"env-{{rank}}").write_text(json.dumps(dict(os.environ)))
print(words)
while not (folder / "go").exists():
    time.sleep(0.02)
"""
    alone = {"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1", "WORLD_SIZE": "1"}  # as srun and Kubernetes set
    process = begin(body, 3, "a$$b", "${local_rank}", **alone)
    wait_for(all_ready(tmp_path, 3))
    found = [json.loads((tmp_path / f"env-{rank}").read_text()) for rank in range(3)]
    for rank, environment in enumerate(found):
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["MASTER_PORT"] == found[0]["MASTER_PORT"]
        assert environment["OMP_NUM_THREADS"] == "1"  # as the test chose
        assert not environment.keys() & {"PMI_SIZE", "OMPI_COMM_WORLD_SIZE"}  # Accelerate would believe them
    assert listening(int(found[0]["MASTER_PORT"])) == {"0100007F"}, "127.0.0.1 and no other interface"
    (tmp_path / "go").touch()
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, "['a$$b', '${local_rank}']\n"), errors
    assert "".join(errors.splitlines(True)[_shared(errors) :]) == ""


def test_more_processes_than_cores_are_said(run: Callable[..., Ended], begin: Callable[..., subprocess.Popen]) -> None:
    cores = len(os.sched_getaffinity(0))
    process = begin("pass", cores + 1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and f"{cores + 1} processes share {cores} CPU core" in errors


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "0", "WORLD_SIZE": "1"}, {"ACCELERATE_DYNAMO_MODE": "default", "RANK": "0"}, {"WORLD_SIZE": "2"}],
)
def test_under_a_launcher_nothing_is_started(run: Callable[..., Ended], variables: dict[str, str]) -> None:
    assert run("print(launch.MARK in os.environ, 'torch' in sys.modules)", **variables) == (0, "False False\n", "")


def test_an_error_of_all_is_said_once(run: Callable[..., Ended]) -> None:
    code, output, errors = run("raise RemapError('a mistake', given='this')", 3)
    assert (code, output) == (2, "")
    assert errors in [f"error: {who}a mistake\n  given:   this\n" for who in ("", "[process 1] ", "[process 2] ")]


def test_an_error_of_one_is_said_with_its_number_and_ends_the_others(run: Callable[..., Ended]) -> None:
    """The first process would wait; warnings of the other one are left out."""
    body = "if rank == 1:\n    print('a warning')\n    raise RemapError('no such image')\ntime.sleep(60)"
    assert run(body) == (2, "", "error: [process 1] no such image\n")


def test_what_comes_of_an_error_elsewhere_is_not_said(run: Callable[..., Ended]) -> None:
    """The first process loses the second one, and is seen to have failed at the same time."""
    body = """
from remap.distributed.launch import ProcessLost
if rank == 1:
    raise RemapError("the cause")
while not list(Path(os.environ[launch.ERROR_FILE]).parents[1].glob("1/error.json")):
    time.sleep(0.02)
raise ProcessLost("another process has ended")
"""
    assert run(body) == (2, "", "error: [process 1] the cause\n")


def test_a_traceback_of_another_process_is_shown(run: Callable[..., Ended]) -> None:
    code, _, errors = run("if rank == 1: raise ValueError('a bug')\ntime.sleep(60)")
    assert code == 1
    assert errors.startswith("Traceback") and errors.endswith("ValueError: a bug\n")


def test_an_exit_code_without_a_message_is_that_of_the_command(run: Callable[..., Ended]) -> None:
    """As of `remap repeat`, whose 4 means that something differs."""
    assert run("if rank == 0: raise SystemExit(4)") == (4, "", "")


@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 0), (signal.SIGSEGV, 1)])
def test_a_process_that_a_signal_ended_is_named(run: Callable[..., Ended], number: int, victim: int) -> None:
    code, _, errors = run(f"if rank == {victim}: os.kill(os.getpid(), {int(number)})\ntime.sleep(60)")
    assert code == 128 + number
    assert f"error: [process {victim}] was ended by {signal.Signals(number).name}" in errors
    assert ("memory runs out" in errors) == (number == signal.SIGKILL)
    assert errors.count("error:") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_process_once(
    begin: Callable[..., subprocess.Popen], tmp_path: Path, number: int
) -> None:
    """A second one would mean: leave at once. What the first process saved is said."""
    process = begin(f"{NOTES}\ntime.sleep(60)")
    wait_for(all_ready(tmp_path))
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "".join(errors.splitlines(True)[_shared(errors) :]) == "stopped, and saved\n"
    for rank in (0, 1):
        assert (tmp_path / f"signals-{rank}").read_text() == f"{int(number)} "


def test_a_signal_that_finds_nothing_to_save_is_said_once(
    begin: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    process = begin("(folder / f'ready-{rank}').touch()\ntime.sleep(60)")
    wait_for(all_ready(tmp_path))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors.count("interrupted; there was nothing to save") == 1
    assert "Traceback" not in errors


def test_processes_leave_when_their_parent_is_gone(begin: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    """SIGKILL cannot be passed on; they are asked to stop as by SIGTERM, and may save."""
    process = begin(f"{NOTES}\ntime.sleep(60)")
    wait_for(all_ready(tmp_path))
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    process.kill()
    wait_for(lambda: not any(map(is_alive, pids)), 60)
    for rank in (0, 1):
        assert (tmp_path / f"signals-{rank}").read_text() == f"{int(signal.SIGTERM)} "


def test_a_number_that_no_machine_has_is_refused() -> None:
    with pytest.raises(RemapError, match="too many processes") as caught:
        launch.start_processes(100_000)
    assert "--devices 100000" in str(caught.value) and caught.value.exit_code == 2


def test_the_code_of_a_lost_process_is_that_of_the_engine() -> None:
    from remap.distributed.launch import ProcessLost

    assert ProcessLost("x").exit_code in launch.CONSEQUENCES


@pytest.mark.parametrize(("rank", "says"), [("0", "No such option"), ("1", "")])
def test_a_wrong_option_is_said_by_the_first_process_alone(rank: str, says: str) -> None:
    words = [sys.executable, "-m", "remap_cli", "distill", "--epoch", "1"]
    environment = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and says in done.stderr and bool(done.stderr) is bool(says) and not done.stdout
