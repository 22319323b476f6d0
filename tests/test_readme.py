"""What the README says can be done: its Python block runs, its commands exist with those options, its names exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer
from PIL import Image

from remap.data.images import SUFFIXES
from remap.remapping import LOSSES
from remap.remapping.architecture import ARCHITECTURES
from remap.remapping.weights import INITS
from remap.tuning import CATEGORIES, METHODS
from remap_cli import run_summary
from remap_cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _commands() -> Iterator[list[str]]:
    for block in _blocks("bash"):
        for line in block.splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words and words[0] == "remap":
                    yield words[1:]


@pytest.mark.parametrize("words", list(_commands()), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    """Source: the command line's own parser, which refuses unknown words."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    group.commands[words[0]].make_context(words[0], words[1:])


def test_the_two_commands_come_first() -> None:
    assert [block.strip() for block in _blocks("bash")[:2]] == [
        "pip install -e . && remap distill",
        'pip install -e ".[test]" && pytest',
    ]


def test_the_endings_of_images_are_named() -> None:
    (sentence,) = re.findall(r"A file is an image if its name ends in (.*?), in small letters", DATA)
    assert sorted(re.findall(r"\.\w+", sentence)) == sorted(SUFFIXES)


def test_the_ci_script_calls_the_readmes_test_command() -> None:
    assert 'pip install -q -e ".[test]" && pytest' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_python_block_runs(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 24 images in place of the digits, which would take minutes."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((20, 30, 3), 128, dtype=np.uint8)).save("photo.png")
    (block,) = _blocks("python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    assert '"data": "digits"' in block
    exec(compile(block.replace('"digits"', repr(tiny.data)), "README.md", "exec"), {})
    assert (tmp_path / "runs" / "data-vpt_deep-001" / "task" / "task.safetensors").is_file()


def test_methods_in_the_table_exist_in_their_category() -> None:
    for category, title in CATEGORIES.items():
        (line,) = re.findall(rf"^\| {title} \|.*$", README, flags=re.MULTILINE)
        names = re.findall(r"`(\w+)`", line)
        assert names and {METHODS.row(name).category for name in names} == {category}


def test_names_in_the_table_of_category_5_exist() -> None:
    """Losses of the first three lines, initialisations and architectures by the tables; other words are options."""
    known = {*LOSSES.names, *INITS.names, *ARCHITECTURES.names, *METHODS.names}
    for title in ("labels and logits", "attention", "features and tokens", r"weights \(`--init`\)"):
        (line,) = re.findall(rf"^\| {title} \|.*$", README, flags=re.MULTILINE)
        names = set(re.findall(r"`(\w+)`", line))
        assert names and names <= known, names - known


def test_the_first_output_is_all_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Without figures and widths, which tools/first_run.py checks; the report comes after the table."""
    (block,) = [one for one in _blocks("text") if "student + " in one]
    (method,) = re.findall(r"student \+ (\w+)", block)
    share = {"accuracy": 0.9, "interval": [0.8, 1.0]}
    counts = {"trainable_parameters": 1_000, "total_parameters": 10_000, "task_bytes": 2_000}
    summary = {
        "run_dir": f"runs/digits-{method}-001",
        "method": method,
        "seconds": 60.0,
        "data": {"source": "digits", "val_images": 797, "train_images": 1000, "labeled_images": 200},
        "teacher": {**share, "model": "mini_teacher", "total_parameters": 1_500_000},
        "student": {**counts, "accuracy": 0.95, "interval": [0.9, 1.0]},
        "baseline": share,
    }
    run_summary.show(summary)

    def words(text: str) -> list[str]:
        lines = [re.sub(r"[\d.,]*\d[\d.,]*", "N", line).replace("─", "") for line in text.splitlines()]
        return [" ".join(line.split()) for line in lines if line.strip()]

    *shown, report = words(block)
    assert shown == words(capsys.readouterr().out) and report == f"report: runs/digits-{method}-N/report.html"


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
