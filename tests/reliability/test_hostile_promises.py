"""SECURITY.md promises nothing without a test that is there."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_promise_names_tests_that_exist() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "tests/" in line]
    assert len(rows) > 10
    for row in rows:
        path = None
        for word in re.findall(r"`([^`]+)`", row.rsplit("|", 2)[1]):
            file, _, name = word.partition("::")
            path = ROOT / file if file else path
            names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            assert path.is_file() and (not name or name in names), word


def test_the_floors_are_those_of_the_package() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, floor in re.findall(r"^\| (torch|transformers|accelerate) \| ([0-9.]+)", TEXT, re.MULTILINE):
        assert f"{package}>={floor}" in asked
