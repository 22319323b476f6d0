"""``--devices N`` without torch: small scripts start themselves, fail, are stopped and killed, by real signals.

Expected values are the rules of docs/many-processes.md, section "How it ends".
"""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from remap_cli import group, launch

pytestmark = pytest.mark.slow

# Each process runs BODY; waiting times are short, since nothing is slow here.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from remap_cli import group, launch, view

group.TELL, group.END, group.TELL_STOPPING, group.END_STOPPING, launch.ORPHAN = 0.4, 1.0, 0.8, 1.6, 1.0
folder = Path(sys.argv[1])


def stopped(number, frame):
    with open(folder / f"signals-{os.environ.get('RANK')}", "a") as file:
        file.write(f"{number} ")
    leave(128 + number)


def leave(code):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ready():
    (folder / f"ready-{rank}").touch()


for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stopped)
launch.begin()
launch.processes(int(sys.argv[2]))
rank = int(os.environ.get("RANK", "0"))
BODY
"""
Ended = tuple[int, str, str]


@pytest.fixture
def begin(tmp_path: Path, started: list[subprocess.Popen]) -> Callable[..., subprocess.Popen]:
    def start(body: str, count: int = 2, **environment: str) -> subprocess.Popen:
        (tmp_path / "script.py").write_text(SCRIPT.replace("BODY", body))
        words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(count)]
        clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", launch.MARK)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, env={**clean, **environment}, start_new_session=True, **pipes))
        return started[-1]

    return start


@pytest.fixture
def run(begin: Callable[..., subprocess.Popen]) -> Callable[..., Ended]:
    def start(body: str, count: int = 2, **environment: str) -> Ended:
        process = begin(body, count, **environment)
        output, errors = process.communicate(timeout=30)
        return process.returncode, output, errors

    return start


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ready(folder: Path, count: int = 2) -> Callable[[], bool]:
    return lambda: all((folder / f"ready-{rank}").exists() for rank in range(count))


def signals(folder: Path, rank: int) -> list[int]:
    path = folder / f"signals-{rank}"
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_each_process_has_its_place_and_only_the_first_prints(run: Callable[..., Ended], tmp_path: Path) -> None:
    """The variables are those that torchrun sets."""
    body = """
import json
print(json.dumps(dict(os.environ)))
(folder / f"env-{rank}").write_text(json.dumps(dict(os.environ)))
"""
    code, output, errors = run(body, 3)
    assert (code, errors.replace("3 processes share 2 CPU cores\n", "")) == (0, "")
    assert json.loads(output)["RANK"] == "0"
    found = [json.loads((tmp_path / f"env-{rank}").read_text()) for rank in range(3)]
    for rank, environment in enumerate(found):
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["MASTER_PORT"] == found[0]["MASTER_PORT"]
        assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))


def test_a_number_of_threads_that_was_chosen_stays(run: Callable[..., Ended]) -> None:
    assert run("print(os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS="5")[:2] == (0, "5\n")


def test_more_processes_than_cores_are_said(run: Callable[..., Ended]) -> None:
    cores = len(os.sched_getaffinity(0))
    code, _, errors = run("pass", cores + 1)
    assert code == 0 and f"{cores + 1} processes share {cores} CPU core" in errors


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "0", "WORLD_SIZE": "1"}, {"ACCELERATE_DYNAMO_MODE": "default", "RANK": "0"}, {"WORLD_SIZE": "2"}],
)
def test_under_a_launcher_nothing_is_started(run: Callable[..., Ended], variables: dict[str, str]) -> None:
    assert run("print(launch.MARK in os.environ)", **variables) == (0, "False\n", "")


ALONE = {"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1", "MV2_COMM_WORLD_SIZE": "1", "WORLD_SIZE": "1"}


def test_a_machine_that_says_one_is_no_launcher(run: Callable[..., Ended], tmp_path: Path) -> None:
    """As srun and Kubernetes do. What is inherited must not make a process the only one in Accelerate's eyes."""
    from accelerate.utils import get_cpu_distributed_information

    code, _, errors = run("import json\n(folder / f'env-{rank}').write_text(json.dumps(dict(os.environ)))", **ALONE)
    assert (code, errors) == (0, "")
    for rank in (0, 1):
        environment = json.loads((tmp_path / f"env-{rank}").read_text())
        with pytest.MonkeyPatch.context() as patch:
            for name in ALONE:
                patch.delenv(name, raising=False)
            for name in (*ALONE, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                if name in environment:
                    patch.setenv(name, environment[name])
            found = get_cpu_distributed_information()
        assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (rank, 2, rank, 2)
        assert not set(environment) & set(ALONE) - {"WORLD_SIZE"}


def test_an_error_of_all_is_said_once(run: Callable[..., Ended]) -> None:
    body = "sys.stderr.write('error: a mistake\\n' if rank == 0 else f'error: [process {rank}] a mistake\\n'); leave(2)"
    assert run(body, 3, OMP_NUM_THREADS="1")[::2] in [(2, "error: a mistake\n"), (2, MORE + "error: a mistake\n")]


MORE = f"3 processes share {len(os.sched_getaffinity(0))} CPU cores\n"
# What a process that waits for a dead one in a collective call does: nothing, whatever signal comes.
DEAF = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT}); time.sleep(60)"


def test_an_error_of_one_is_said_with_its_number_and_ends_the_others(run: Callable[..., Ended]) -> None:
    """The first process would wait for ever; warnings of the other one are left out."""
    body = f"""
if rank == 1:
    sys.stderr.write("a warning\\nerror: [process 1] no such image\\n")
    leave(2)
{DEAF}
"""
    started = time.monotonic()
    assert run(body) == (2, "", "error: [process 1] no such image\n")
    assert time.monotonic() - started < 10


def test_one_that_was_stopped_alone_is_named(run: Callable[..., Ended]) -> None:
    """Its message has no `error:` in front."""
    body = """
if rank == 1:
    sys.stderr.write("a warning\\n[process 1] stopped by SIGTERM\\n")
    leave(143)
time.sleep(0.3)
leave(launch.LOST)
"""
    assert run(body) == (143, "", "[process 1] stopped by SIGTERM\n")


def test_what_comes_of_an_error_elsewhere_is_not_said(run: Callable[..., Ended]) -> None:
    """Code 3 means: another process ended. The first one to end is then not the cause."""
    body = """
if rank == 1:
    time.sleep(0.3)
    sys.stderr.write("error: [process 1] the cause\\n")
    leave(2)
leave(launch.LOST)
"""
    assert run(body) == (2, "", "error: [process 1] the cause\n")


def test_a_traceback_of_another_process_is_shown_whole(run: Callable[..., Ended]) -> None:
    code, _, errors = run("if rank == 1: raise ValueError('a bug')\ntime.sleep(60)")
    assert code == 1
    assert errors.startswith("Traceback") and errors.endswith("ValueError: a bug\n")


@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSEGV, 1)])
def test_a_process_that_a_signal_ended_is_named(run: Callable[..., Ended], number: int, victim: int) -> None:
    body = f"if rank == {victim}: os.kill(os.getpid(), {int(number)})\n{DEAF}"
    code, _, errors = run(body)
    assert code == 128 + number
    assert f"error: [process {victim}] was ended by {signal.Signals(number).name}" in errors
    assert ("memory ran out" in errors) == (number == signal.SIGKILL)
    assert errors.count("error:") == 1


def test_a_process_that_does_not_answer_is_named(run: Callable[..., Ended]) -> None:
    """The others give up waiting, as they do in a collective call; the halted one cannot."""
    code, _, errors = run("if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(0.3)\nleave(launch.LOST)")
    assert code == 1
    assert "error: [process 1] did not answer the others in time" in errors and "SIGSTOP" in errors


@pytest.mark.parametrize("halted", [True, False])
def test_one_that_was_aborted_while_it_waited_is_not_the_cause(run: Callable[..., Ended], halted: bool) -> None:
    """NCCL's watchdog ends its own process, which waited for another one; that one had to be killed."""
    silent = "os.kill(os.getpid(), signal.SIGSTOP)" if halted else DEAF
    code, _, errors = run(f"if rank == 1:\n    {silent}\ntime.sleep(0.3)\nos.abort()")
    assert code == 1
    assert "error: [process 1] did not answer the others in time" in errors
    assert errors.count("error:") == 1 and ("SIGSTOP" in errors) == halted
    assert ("[process 0] was ended by SIGABRT" in errors) != halted


@pytest.mark.parametrize(("times", "seconds"), [(2, (1.2, 4.0)), (3, (0.0, 1.0))])
def test_impatience_ends_processes_that_hear_nothing(
    begin: Callable[..., subprocess.Popen], tmp_path: Path, times: int, seconds: tuple[float, float]
) -> None:
    """Two signals give them the time to leave, 1.6 s here; the third one gives none."""
    process = begin(f"ready()\n{DEAF}")
    wait_for(ready(tmp_path))
    for _ in range(times):
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert seconds[0] < time.monotonic() - started < seconds[1]
    assert "error: [process 0, 1] did not leave" in errors and "--resume" in errors


def test_one_signal_waits_for_as_long_as_it_takes(begin: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    """A save may take its time: nothing counts before one process has failed."""
    body = "signal.signal(signal.SIGINT, lambda *_: (time.sleep(2.2), leave(130)))\nready()\ntime.sleep(60)"
    process = begin(body)
    wait_for(ready(tmp_path))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")


@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_reaches_each_process_once(
    begin: Callable[..., subprocess.Popen], tmp_path: Path, number: int, to_group: bool
) -> None:
    """A second one would mean: leave at once. Ctrl-C in a terminal goes to the process group."""
    body = """
def noted(number, frame):
    with open(folder / f"signals-{rank}", "a") as file:
        file.write(f"{number} ")

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, noted)
ready()
deadline = time.monotonic() + 1.0
while time.monotonic() < deadline:
    time.sleep(0.1)
received = int((folder / f"signals-{rank}").read_text().split()[0])
leave(128 + received)
"""
    process = begin(body)
    wait_for(ready(tmp_path))
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.wait(timeout=20) == 128 + number
    assert [signals(tmp_path, rank) for rank in (0, 1)] == [[number], [number]]


@pytest.mark.parametrize("victims", ["rank == 1", "rank == 0", "True"])
def test_what_dies_of_being_asked_to_stop_was_stopped(
    begin: Callable[..., subprocess.Popen], tmp_path: Path, victims: str
) -> None:
    """A library that is just being loaded may abort where a signal meets it."""
    body = f"if {victims}: signal.signal(signal.SIGINT, lambda *_: os.abort())\nready()\ntime.sleep(60)"
    process = begin(body)
    wait_for(ready(tmp_path))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.count("error:") == (victims == "True")


def test_more_processes_than_the_system_can_hold_are_refused(run: Callable[..., Ended]) -> None:
    code, _, errors = run("", 100_000)
    assert "RemapError: so many processes cannot be started" in errors and "--devices 100000" in errors
    assert "allowed: 1 to " in errors and code == 1  # a script without ``main``, which would say 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["distill"], "--resume RUN"),
        (["distill", "--output", "runs/my run"], "--resume 'runs/my run'"),
        (["tune", "--output=x", "--set", "data.workers=1"], "--resume x"),
        (["tune", "--resume", "y"], "--resume y"),
    ],
)
def test_the_way_to_go_on_names_the_folder(monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str) -> None:
    monkeypatch.setattr(sys, "argv", ["remap", *words])
    assert launch._goes_on() == f"goes on with {expected}"


def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """The terminal itself turns the key into signals, for all that belong to it."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("BODY", "ready()\ntime.sleep(60)"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(tmp_path / "script.py"), str(tmp_path), "2"])
    wait_for(ready(tmp_path))
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert [signals(tmp_path, rank) for rank in (0, 1)] == [[signal.SIGINT], [signal.SIGINT]]


def test_a_signal_before_a_process_is_ready_waits(begin: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    """Python starting up would end without a word, or with a traceback."""
    process = begin("time.sleep(60)")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: len(children.read_text().split()) == 2)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (143, "")
    assert [signals(tmp_path, rank) for rank in (0, 1)] == [[signal.SIGTERM], [signal.SIGTERM]]


def test_processes_that_do_not_leave_are_killed(begin: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    process = begin(f"ready()\nif rank == 0: time.sleep(60)\n{DEAF}")
    wait_for(ready(tmp_path))
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "Traceback" not in errors


def test_processes_leave_when_their_parent_is_gone(begin: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    """SIGKILL cannot be passed on; they are asked to stop as by SIGTERM, and may save."""
    process = begin("(folder / f'pid-{rank}').write_text(str(os.getpid()))\nready()\ntime.sleep(60)", 3)
    wait_for(ready(tmp_path, 3))
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(3)]
    process.kill()
    wait_for(lambda: not any(map(is_alive, pids)), 10)
    assert [signals(tmp_path, rank) for rank in range(3)] == [[signal.SIGTERM]] * 3


def test_ctrl_z_halts_all_and_they_go_on(begin: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    process = begin("(folder / f'pid-{rank}').write_text(str(os.getpid()))\nready()\ntime.sleep(1.5)")
    wait_for(ready(tmp_path))
    pids = [process.pid, *(int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1))]
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: all(group._is_stopped(pid) for pid in pids))
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=20) == 0


def test_the_code_of_a_lost_process_is_that_of_the_engine() -> None:
    from remap.distributed.launch import ProcessLost

    assert ProcessLost("x").exit_code == launch.LOST


@pytest.mark.parametrize(
    ("text", "expected"),
    [("train:\n  processes: 4\n", 4), ("train: {epochs: 2}\n", None), ("train: 3\n", None), ("a: b: c\n", None)],
)
def test_the_number_of_a_run_is_read(tmp_path: Path, text: str, expected: int | None) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert launch.recorded(tmp_path) == expected
    assert launch.recorded(tmp_path / "absent") is None
