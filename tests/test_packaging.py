"""What the wheel will hold is what the tree holds; an editable install would hide a forgotten folder."""

import ast
import tomllib
from pathlib import Path

import pytest

import remap

ROOT = Path(__file__).resolve().parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUP["package-dir"]
SOURCES = [path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")]


def folder_of(package: str) -> Path:
    top, _, rest = package.partition(".")
    return ROOT / FOLDERS[top] / rest.replace(".", "/")


def test_package_list_is_the_tree() -> None:
    tree = {
        ".".join((name, *path.parent.relative_to(ROOT / folder).parts))
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(SETUP["packages"]) == sorted(tree)


def test_every_python_file_lies_in_a_package() -> None:
    assert len(SOURCES) > 20
    assert [path for path in SOURCES if not (path.parent / "__init__.py").is_file()] == []


def test_package_data_is_every_other_file() -> None:
    """A file that is no module gets into the wheel by a pattern of its package, or not at all."""
    matched = {
        path
        for package, patterns in SETUP["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    others = {
        path
        for folder in FOLDERS.values()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert matched == others
    assert {ROOT / "remap" / "py.typed", ROOT / "recipes" / "digits.yaml"} <= matched


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_are_imported_by_their_installed_names(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"cli", "recipes"}
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative import"


def test_version_is_read_from_the_package() -> None:
    assert SETUP["dynamic"]["version"] == {"attr": "remap.__version__"}
    assert all(part.isdigit() for part in remap.__version__.split(".")[:2])


def test_command_points_at_a_function_that_is_there() -> None:
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["remap"]
    module, _, function = target.partition(":")
    top, _, rest = module.partition(".")
    tree = ast.parse((ROOT / FOLDERS[top] / f"{rest}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
