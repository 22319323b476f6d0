"""Tiny images and tiny models on disk, so that whole runs take a fraction of a second. Random, offline, on the CPU."""

import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from forked import Forked
from PIL import Image
from safetensors.torch import save_file
from tiny_models import tiny_models
from torch import Tensor

from remap.distributed import launch
from remap.progress import Step
from remap.recipe import Recipe, resolve

# pytest hears loggers that do not propagate by a handler of its own. Given one, this one of PyTorch's writes down
# the graphs, guards and stacks of every compilation and export.
logging.getLogger("torch.__trace").propagate = True

# Where measured figures of the guarantees are noted, one JSON object a line; see tools/guarantees.py.
FIGURES = "--figures"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FIGURES, type=Path, help="append what tests of guarantees measured to this file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as quick the first case of each test, and all cases in this folder.

    Except tests that are marked slow, and the longest others, which ``tools/quick_tests.py`` lists in not_quick.txt.

    Files with slow tests come first: workers take file by file, and end together if those at the end are short.
    """
    longer = set(Path(__file__).with_name("not_quick.txt").read_text().split())
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    seen: set[str] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        first = test not in seen or item.path.parent == Path(__file__).parent
        if first and item.get_closest_marker("slow") is None and test.removeprefix("../") not in longer:
            item.add_marker(pytest.mark.quick)
        seen.add(test)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Half a million objects of imports and collection live to the end: no garbage collection needs to look at them.

    One that looks at all takes half a second, and makes a forked process copy the memory that it shares.
    """
    gc.disable()
    result = yield
    gc.enable()
    gc.freeze()
    return result


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries look for leaks when they are unloaded


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Note what a test of a guarantee measured, after its assertions.

    ``figure("SIGKILLs during a save, resumable", 20, 20)`` is a count (summed over parameters of the test);
    ``figure("largest difference of weights", 0.0)`` is a size (the largest over parameters counts).
    """
    path: Path | None = request.config.getoption(FIGURES)
    test = f"{request.node.path.relative_to(Path(__file__).parents[1]).as_posix()}::{request.node.originalname}"

    def note(what: str, value: float, of: int | None = None) -> None:
        if path is not None:
            with open(path, "a") as file:
                file.write(json.dumps({"test": test, "what": what, "value": value, "of": of}) + "\n")

    return note


CLASSES = ("blue", "green", "red")
SIZE = 16
ARCHITECTURE = "vit_tiny_patch16_224"
SHAPE = {"img_size": SIZE, "patch_size": 8, "num_heads": 2, "mlp_ratio": 2.0}


@dataclass(frozen=True)
class Tiny:
    """A folder of 24 + 9 coloured images, a student with dropout inside and a wider, deeper teacher.

    A random teacher with a fitted head tells the colours apart, so it passes the check against chance.
    """

    data: str
    student: str
    teacher: str

    SETTINGS = ("data.workers=1", "train.epochs=2", "train.batch_size=8", "train.warmup_epochs=0.5", "train.lr=0.01")
    # Commands may run in processes that do not have ``native_bf16``.
    COMMANDS = ("baseline=false", "train.precision=fp32")

    def words(self, **words: object) -> dict[str, object]:
        return {"data": self.data, "student": self.student, "teacher": self.teacher, **words}

    def recipe(self, *settings: str, **words: object) -> Recipe:
        """Two epochs of three steps; words are those of the command line."""
        return resolve(words=self.words(**words), settings=[*self.SETTINGS, *settings])

    def arguments(self, *settings: str, **words: object) -> list[str]:
        """The same recipe for the command line, which adds a baseline to it otherwise."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.words(**words).items()]
        return [*flags, *(f"--set={setting}" for setting in (*self.SETTINGS, *self.COMMANDS, *settings))]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    draw_images(root / "data" / "train", 8, seed=1)
    draw_images(root / "data" / "val", 3, seed=2)
    write_model(root / "student", seed=3, embed_dim=16, depth=2, proj_drop_rate=0.1, drop_path_rate=0.2)
    write_model(root / "teacher", seed=4, embed_dim=24, depth=3)
    return Tiny(str(root / "data"), f"local-dir:{root / 'student'}", f"local-dir:{root / 'teacher'}")


def draw_images(folder: Path, each: int, seed: int, classes: tuple[str, ...] = CLASSES) -> None:
    """Noise with one channel raised: any linear map of the pixels can tell the classes apart."""
    draws = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = draws.integers(0, 120, (SIZE, SIZE, 3))
            pixels[..., 2 - label] += 110
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:02d}.png")


def write_model(folder: Path, seed: int, **shape: float) -> None:
    """A plain vision transformer as a model folder."""
    write_folder(folder, seed, ARCHITECTURE, {**SHAPE, **shape}, SIZE)


def write_folder(folder: Path, seed: int, architecture: str, arguments: dict[str, Any], size: int) -> None:
    """A model folder as timm's hub format has it: config.json and model.safetensors."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=7, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    view = {"input_size": [3, size, size], "fixed_input_size": "img_size" in arguments, "crop_pct": 1.0}
    config = {**view, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 7}
    config["classifier"] = model.default_cfg["classifier"]
    folder.mkdir()
    save_file(model.state_dict(), str(folder / "model.safetensors"))
    whole = {"architecture": architecture, "num_classes": 7, "model_args": arguments, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.fixture(scope="session", params=tiny_models("runs"))
def other_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A family other than plain vision transformers, and a model of it: (name, local-dir:FOLDER)."""
    folder, row = tmp_path_factory.mktemp("families") / request.param, tiny_models("runs")[request.param]
    assert isinstance(row.make, str)
    write_folder(folder, 5, row.make, row.options, size=32)
    return request.param, f"local-dir:{folder}"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Makes a model of timm by architecture, arguments and pixels, once each; gives local-dir:FOLDER."""
    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def make(architecture: str, arguments: dict[str, Any], size: int) -> str:
        key = json.dumps([architecture, arguments, size])
        if key not in made:
            made[key] = root / f"{len(made)}-{architecture}-{size}"
            write_folder(made[key], 6, architecture, arguments, size)
        torch.manual_seed(6)  # what a test draws next does not depend on the tests before
        return f"local-dir:{made[key]}"

    return make


class Watch:
    """A progress reporter that calls back after each training step, with the number of steps so far."""

    def __init__(self, after_step: Callable[[int], None]) -> None:
        self.after_step, self.steps, self.said, self.waited = after_step, 0, list[str](), list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        self.waited.append(what)
        yield _Watched(self) if "epoch " in what else _Watched(None)


class _Watched:
    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch

    def advance(self, amount: int = 1, **values: float) -> None:
        if self.watch is not None and values and amount:
            self.watch.steps += 1
            self.watch.after_step(self.watch.steps)


@pytest.fixture
def watch() -> type[Watch]:
    return Watch


@pytest.fixture
def two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's outputs are computed apart from the features that its head is fitted on."""
    monkeypatch.setattr("remap.pipeline.components.run_once", lambda *_arguments, **_named: None)


@pytest.fixture
def largest_difference() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float]:
    """Over two sets of tensors of the same names."""

    def measure(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        assert set(one) == set(other)
        return max(float((one[name].detach() - other[name].detach()).abs().max()) for name in one)

    return measure


@pytest.fixture
def history() -> Callable[[Path], list[dict]]:
    """The epochs of a run without their times."""

    def read(run: Path) -> list[dict]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in record.items() if key != "seconds"} for record in records]

    return read


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes that a test started; what still runs at its end is killed."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def start_process(started: list[subprocess.Popen]) -> Callable[..., subprocess.Popen]:
    """Start ``python -m ...`` on one thread."""

    def start(*arguments: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-m", *arguments], env=environment, **pipes))
        return started[-1]

    return start


@pytest.fixture
def fork_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    """Start a module or script in ``count`` forked processes (see ``forked``)."""
    started: list[Forked] = []

    def start(*command: str, count: int = 1) -> Forked:
        started.append(Forked(tmp_path_factory.mktemp("forked"), command, count))
        return started[-1]

    yield start
    for forked in started:
        forked.kill()


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[str]]:
    """Teacher outputs go to folders of this run of the tests, whatever the user has; fixtures of modules share one."""
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMAP_CACHE", str(root / "shared"))
        yield (str(root / f"{number}") for number in count())


@pytest.fixture(autouse=True)
def _own_cache(_caches: Iterator[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another one has left."""
    monkeypatch.setenv("REMAP_CACHE", next(_caches))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors are faster on one thread. For the whole session: runs made by wider fixtures must add up alike."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def native_bf16() -> Iterator[Callable[[], bool]]:
    """Whether the processor multiplies bf16, which no run here takes by itself: tolerances are those of float32."""
    check = launch.cpu_multiplies_bf16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "cpu_multiplies_bf16", lambda: False)
        yield check


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """A tiny run calls fsync 75 times, half of its time. Files outlive the processes that tests kill without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        yield
