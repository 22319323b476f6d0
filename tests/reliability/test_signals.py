"""Real processes and real signals: what is saved, how soon they leave, and that they go on to the same bytes.

The processes are forked from this one, which has imported everything, so that twenty of them cost seconds; each is a
process group of its own and calls the command line's ``main``. Expected values: an undisturbed twin.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import be_one_of, fork, free_port, wait
from PIL import Image

from remap.distributed import interrupts
from remap.errors import Interrupted
from remap.runs.run_dir import RunDir
from remap_cli import app, console
from remap_cli.main import main

pytestmark = pytest.mark.slow

STEPS, EPOCHS = 6, 3
SETTINGS = (
    *(f"train.epochs={EPOCHS}", "train.batch_size=16", "train.checkpoint_seconds=3600"),
    *("data.workers=2", "data.augment=shift", "data.views=2", "teacher.allow_weak=true"),
)
# Waits as progress names them: six steps an epoch, four batches of evaluation, twelve of teacher outputs.
TRAINING, EVALUATION, UNTRAINED = "epoch ", "evaluating the student", "evaluating the network before training"
LESSONS, HEAD, READING = "teacher outputs", "fitting the classifier", "reading training images"
# Seconds from a signal to the exit of a process, of two of them, and of one that is told twice.
SOON, TOGETHER, AT_ONCE = 5.0, 10.0, 1.0


class Telling(console.Reporter):
    """The command line's reporter, which also tells another process of each wait and each step, and slows one down."""

    pipe = -1
    slow, pause = "", 0.0

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Any]:
        os.write(self.pipe, f"{what}\n".encode())
        with super().wait(what, total) as shown:
            yield _Slowly(shown, self.pipe, self.pause if what.startswith(self.slow) else 0.0)


class _Slowly:
    def __init__(self, shown: Any, pipe: int, pause: float) -> None:
        self.shown, self.pipe, self.pause = shown, pipe, pause

    def advance(self, amount: int = 1, **values: float) -> None:
        if values and amount:
            os.write(self.pipe, b"step\n")
        self.shown.advance(amount, **values)
        time.sleep(self.pause if amount else 0.0)


@dataclass
class Child:
    """A forked command; ``told`` are the lines of its ``Telling`` reporter so far."""

    pid: int
    pipe: int
    output: Path
    told: list[str] = field(default_factory=list)
    rest: bytes = b""

    def hear(self, wanted: str, times: int = 1, seconds: float = 60.0) -> None:
        """Wait until a line that begins so has come this often."""
        deadline = time.monotonic() + seconds
        while sum(line.startswith(wanted) for line in self.told) < times:
            assert self.read(), f"it ended before {wanted!r}: {self.output.read_text()}"
            assert time.monotonic() < deadline

    def read(self) -> bool:
        data = os.read(self.pipe, 4096)
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.told += [line.decode() for line in lines]
        return bool(data)

    def leave(self) -> tuple[int | None, float]:
        """The exit code, and seconds until then."""
        started = time.monotonic()
        code = wait(self.pid)
        seconds = time.monotonic() - started
        while self.read():
            pass
        os.close(self.pipe)
        return code, seconds

    @property
    def steps(self) -> int:
        return self.told.count("step")


@dataclass
class House:
    """Where runs are made, and the twin they are compared with."""

    folder: Path
    arguments: list[str]
    children: list[Child] = field(default_factory=list)

    def call(
        self, *words: str, slow: str = "", pause: float = 0.0, last: float = 0.0, rank: int = 0, port: int = 0
    ) -> Child:
        """Fork a command; with a port it is one of two processes. ``last`` are seconds that its last words take."""
        heard, pipe = os.pipe()
        told = console.error

        def work() -> None:
            os.close(heard)
            os.environ["REMAP_CACHE"] = f"{output}-cache"  # teacher outputs on disk are its own
            Telling.pipe, Telling.slow, Telling.pause = pipe, slow, pause
            console.Reporter = Telling
            if last:
                console.error = lambda problem: (os.write(pipe, b"last words\n"), time.sleep(last), told(problem))
            sys.argv = ["remap", *words]
            if port:
                be_one_of(2, rank, port)
            main()

        output = self.folder / f"output{len(self.children)}"
        child = Child(fork(work, output), heard, output)
        os.close(pipe)
        self.children.append(child)
        return child

    def start(self, run: Path, *words: str, **how: Any) -> Child:
        return self.call("distill", *self.arguments, *words, f"--output={run}", **how)

    def go_on(self, run: Path) -> None:
        child = self.call("distill", f"--resume={run}")
        assert child.leave()[0] == 0, child.output.read_text()

    def pair(self, *words: str, **how: Any) -> list[Child]:
        port = free_port()
        return [self.call(*words, **how, rank=rank, port=port) for rank in range(2)]


@pytest.fixture(scope="module")
def house(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> House:
    """96 + 200 pictures, and an undisturbed run on them."""
    root = tmp_path_factory.mktemp("signals")
    draws = np.random.default_rng(0)
    for split, count in (("train", 96), ("val", 200)):
        for index in range(count):
            label = index % 3
            folder = root / "data" / split / "rgb"[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draws.integers(0, 120, (16, 16, 3))
            pixels[..., label] += 110
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.png")
    arguments = tiny.arguments(*SETTINGS, data=str(root / "data"), losses="ce,kd")
    house = House(root, arguments)
    child = house.start(root / "twin")
    assert child.leave()[0] == 0, child.output.read_text()
    assert child.steps == EPOCHS * STEPS and app.__name__ == "remap_cli.app"
    return house


@pytest.fixture(autouse=True)
def _nobody_stays(house: House) -> Iterator[None]:
    yield
    for child in house.children:
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


# Where twenty signals land: the wait, and which of that name.
MOMENTS = [
    *((TRAINING, epoch) for epoch in (1, 1, 1, 2, 2, 2, 3, 3)),
    *((EVALUATION, epoch) for epoch in (1, 1, 2, 2, 3, 3)),
    *((LESSONS, 1), (LESSONS, 1), (UNTRAINED, 1), (UNTRAINED, 1), (HEAD, 1), (READING, 1)),
]


@pytest.mark.guarantee(5)
@pytest.mark.parametrize("number", range(len(MOMENTS)))
def test_sigterm_to_the_group_saves_wherever_it_lands(
    house: House, tmp_path: Path, figure: Callable[..., None], number: int
) -> None:
    """Training, evaluation and all that comes before the first step, each at a random moment of it. In every other run
    two data workers decode every batch anew, and teacher outputs are kept on disk: it changes no bit."""
    what, times = MOMENTS[number]
    anew = ("--set=data.memory_gib=0",) if number % 2 and what in (TRAINING, EVALUATION, UNTRAINED) else ()
    child = house.start(tmp_path / "run", *anew, slow=what, pause=0.01 if what == READING else 0.06)
    child.hear(what, times)
    time.sleep(random.Random(number).uniform(0.0, 0.15))
    os.killpg(child.pid, signal.SIGTERM)
    code, seconds = child.leave()
    said = child.output.read_text()
    assert code == 143, said
    assert seconds < SOON
    assert f"remap distill --resume {tmp_path / 'run'}" in " ".join(said.split()) and "Traceback" not in said
    assert RunDir(tmp_path / "run").status() == "stopped"
    lost = child.steps - _saved(tmp_path / "run")
    assert 0 <= lost <= 1
    house.go_on(tmp_path / "run")
    assert _task(tmp_path / "run") == _task(house.folder / "twin")
    figure("SIGTERMs in training, evaluation and preparation: saved, resumed, equal to the uninterrupted run", 1, 1)
    figure("steps lost at most", lost)
    figure("longest time to exit, seconds", round(seconds, 2))


@pytest.mark.guarantee(5)
@pytest.mark.parametrize("what", [TRAINING, EVALUATION, LESSONS])
def test_ctrl_c_is_130(house: House, tmp_path: Path, figure: Callable[..., None], what: str) -> None:
    child = house.start(tmp_path / "run", slow=what, pause=0.06)
    child.hear(what)
    os.killpg(child.pid, signal.SIGINT)
    code, seconds = child.leave()
    assert code == 130 and seconds < SOON, child.output.read_text()
    assert child.steps - _saved(tmp_path / "run") in (0, 1)
    house.go_on(tmp_path / "run")
    assert _task(tmp_path / "run") == _task(house.folder / "twin")
    figure("Ctrl-Cs: saved, resumed, equal to the uninterrupted run", 1, 1)


@pytest.mark.guarantee(5)
def test_the_file_stop_is_a_sigterm(house: House, tmp_path: Path, figure: Callable[..., None]) -> None:
    """For machines where no signal can be sent; looked for every second."""
    child = house.start(tmp_path / "run", slow=TRAINING, pause=0.4)
    child.hear("step", 2)
    (tmp_path / "run" / "stop").touch()
    code, seconds = child.leave()
    assert code == 143 and seconds < SOON, child.output.read_text()
    assert not (tmp_path / "run" / "stop").exists() and interrupts.CHECK_EVERY <= 1.0
    assert child.steps - _saved(tmp_path / "run") in (0, 1)
    house.go_on(tmp_path / "run")
    assert _task(tmp_path / "run") == _task(house.folder / "twin")
    figure("files `stop`: saved, resumed, equal to the uninterrupted run", 1, 1)


@pytest.mark.guarantee(5)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_leaves_at_once(
    house: House, tmp_path: Path, figure: Callable[..., None], number: int, code: int
) -> None:
    """The first one waits for the end of a step that takes a minute; the checkpoint from before is whole."""
    child = house.start(tmp_path / "run", slow=TRAINING, pause=60.0)
    child.hear("step")
    os.killpg(child.pid, number)
    time.sleep(0.3)
    assert os.waitpid(child.pid, os.WNOHANG) == (0, 0), "the first signal waits for the step"
    os.killpg(child.pid, number)
    found, seconds = child.leave()
    assert found == code and seconds < AT_ONCE, child.output.read_text()
    house.go_on(tmp_path / "run")
    assert _task(tmp_path / "run") == _task(house.folder / "twin")
    figure("second signals that ended the run at once, with a complete checkpoint", 1, 1)


def test_a_signal_among_the_last_words_changes_nothing(house: House, tmp_path: Path) -> None:
    """Impatience while the message is printed: no traceback instead of it."""
    child = house.start(tmp_path / "run", slow=TRAINING, pause=0.06, last=0.3)
    child.hear("step")
    os.killpg(child.pid, signal.SIGTERM)
    child.hear("last words")
    os.killpg(child.pid, signal.SIGTERM)
    code, _ = child.leave()
    said = child.output.read_text()
    assert code == 143 and "--resume" in said and "Traceback" not in said


def test_a_signal_that_a_library_turns_into_its_own_error_is_still_one() -> None:
    """As an extension module does that meets an exception where it expects a number."""
    with pytest.raises(Interrupted) as caught, interrupts.watch_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise ValueError("could not determine the shape") from None
    assert caught.value.exit_code == 143
    with pytest.raises(ValueError, match="an error of its own"), interrupts.watch_signals():
        raise ValueError("an error of its own")


def test_half_written_files_go_when_the_run_goes_on(house: House, tmp_path: Path) -> None:
    """What SIGKILL leaves beside the files of a run, and before the command was noted; but no file of the user's."""
    run = tmp_path / "run"
    child = house.start(run, slow=TRAINING, pause=0.06)
    child.hear("step", 2)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.leave()[0] == -signal.SIGKILL
    strays = [run / ".status.json.99.tmp", run / "teacher" / ".task.json.99.tmp", run / ".recipe.yaml.99.tmp.99.tmp"]
    for path in (*strays, run / "mine.99.tmp"):
        path.write_text("half")
    (run / "command.txt").unlink()
    house.go_on(run)
    assert not any(path.exists() for path in strays) and (run / "mine.99.tmp").is_file()
    assert (run / "command.txt").read_text().endswith(f"--resume={run}\n")
    assert _task(run) == _task(house.folder / "twin")


# Where a signal to one of two lands, and which of them gets it.
ONE_OF_TWO = [(TRAINING, 2, 0), (TRAINING, 2, 1), (EVALUATION, 1, 1), (LESSONS, 1, 1)]


@pytest.fixture(scope="module")
def twin_of_two(house: House) -> Path:
    run = house.folder / "twin_of_two"
    for child in house.pair("distill", *house.arguments, f"--output={run}"):
        assert child.leave()[0] == 0, child.output.read_text()
    return run


@pytest.mark.guarantee(6)
@pytest.mark.parametrize(("what", "times", "rank"), ONE_OF_TWO)
def test_a_signal_to_one_of_two_stops_both(
    house: House,
    twin_of_two: Path,
    tmp_path: Path,
    figure: Callable[..., None],
    what: str,
    times: int,
    rank: int,
) -> None:
    """Both have done the same steps, one checkpoint holds them all, and two go on from it."""
    run = tmp_path / "run"
    both = house.pair("distill", *house.arguments, f"--output={run}", slow=what, pause=0.06)
    both[rank].hear(what, times)
    os.kill(both[rank].pid, signal.SIGTERM)
    started = time.monotonic()
    codes = [child.leave()[0] for child in both]
    seconds = time.monotonic() - started
    assert codes == [143, 143], [child.output.read_text() for child in both]
    assert seconds < TOGETHER
    assert both[0].steps == both[1].steps and both[0].steps - _saved(run) in (0, 1)
    for child in house.pair("distill", f"--resume={run}"):
        assert child.leave()[0] == 0, child.output.read_text()
    assert _task(run) == _task(twin_of_two)
    figure("signals to one of two processes: both exited, resumed, equal to the uninterrupted pair", 1, 1)
    figure("longest time until both exited, seconds", round(seconds, 2))


@pytest.mark.guarantee(6)
def test_under_a_launcher_nobody_leaves_before_the_state_is_saved(
    house: House, twin_of_two: Path, tmp_path: Path, start_process: Callable[..., Any], figure: Callable[..., None]
) -> None:
    """torchrun sends SIGTERM to all that are left as soon as one has left, which for a process that had one already
    means: at once. The save of an evaluation that is stopped takes 2 s here."""
    run, worker = tmp_path / "run", Path(__file__).parent / "workers" / "slow_save.py"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker))
    process = start_process(*torchrun, "distill", *house.arguments, f"--output={run}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and f"remap distill --resume {run}" in " ".join(errors.split()), errors
    assert RunDir(run).status() == "stopped" and _saved(run) == STEPS
    for child in house.pair("distill", f"--resume={run}"):
        assert child.leave()[0] == 0, child.output.read_text()
    assert _task(run) == _task(twin_of_two)
    figure("SIGTERMs under torchrun in an evaluation: saved, resumed, equal to the uninterrupted pair", 1, 1)


def _saved(run: Path) -> int:
    """Steps in the newest checkpoint; none was taken before the first one is tried."""
    manifests = sorted(RunDir(run).checkpoint.glob("*.json"))
    if not manifests:
        return 0
    state = json.loads(manifests[-1].read_text())["state"]
    return state["epoch"] * STEPS + state["step"]


def _task(run: Path) -> bytes:
    return (RunDir(run).task / "task.safetensors").read_bytes()
