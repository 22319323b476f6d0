"""Tiny finished runs to export: one epoch, no teacher, classes of colours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.pipeline.run import start


@pytest.fixture(scope="session")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of a method, trained once."""
    runs: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in runs:
            words = {**tiny.words(), "method": method, "losses": "ce"}
            del words["teacher"]
            recipe = tiny_recipe(words, tiny.SETTINGS)
            runs[method] = start(recipe, tmp_path_factory.mktemp("runs") / method).run_dir
        return runs[method]

    return run


def tiny_recipe(words: dict[str, object], settings: tuple[str, ...]) -> Any:
    from remap.recipe import resolve

    return resolve(words=words, settings=[*settings, "train.epochs=1", "train.warmup_epochs=0"])
