"""Tiny finished runs to export: one epoch, no teacher, classes of colours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.pipeline.run import start
from remap.recipe import resolve


@pytest.fixture(scope="session")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of a method, trained once."""
    runs: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in runs:
            words = {"data": tiny.data, "student": tiny.student, "method": method, "losses": "ce"}
            recipe = resolve(words=words, settings=[*tiny.SETTINGS, "train.epochs=1", "train.warmup_epochs=0"])
            runs[method] = start(recipe, tmp_path_factory.mktemp("runs") / method).run_dir
        return runs[method]

    return run
