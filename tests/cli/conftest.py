"""A folder of small pictures that a classifier can tell apart, and the command line in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result


@pytest.fixture
def tiny() -> list[str]:
    """Words for the shortest run: random weights, two epochs of three steps."""
    settings = ["--set", "train.warmup_epochs=0.5", "--set", "baseline=false"]
    return ["--weights", "none", "--epochs", "2", "--batch-size", "8", *settings]


@pytest.fixture
def weak() -> list[str]:
    """Let a teacher with random weights teach all the same."""
    return ["--set", "teacher.allow_weak=true"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, red and blue noise, 12 training and 6 evaluation images each, 32 pixels."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(folder / f"{index}.png")
    (root / "train" / "red" / "notes.gif").write_bytes(b"GIF89a")
    return root


@pytest.fixture
def remap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run the command line in an empty folder; a RemapError becomes exit code 2 as in ``main``."""
    monkeypatch.chdir(tmp_path)
    from remap.errors import RemapError
    from remap_cli import launch
    from remap_cli.app import app

    def call(*words: str) -> Result:
        result = CliRunner().invoke(app, list(map(str, words)), prog_name="remap")
        if isinstance(result.exception, RemapError):
            result.exit_code = result.exception.exit_code
            result.message = str(result.exception)
        elif result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    monkeypatch.setattr(launch, "start_processes", lambda count: None)  # this process has no command to start again
    return call


@pytest.fixture
def run_json(remap: Callable[..., Result]) -> Callable[..., dict]:
    """The JSON object a command prints; nothing else may be on stdout."""

    def call(*words: str) -> dict:
        result = remap(*words, "--json")
        assert result.exit_code == 0, getattr(result, "message", result.output)
        return json.loads(result.stdout)

    return call
