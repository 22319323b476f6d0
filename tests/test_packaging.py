"""The wheel will have what the tree has; an editable install would hide a forgotten folder."""

import ast
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import remap

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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


@pytest.mark.slow
def test_packages_are_imported_by_their_installed_names() -> None:
    nodes = [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    for path, node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"cli", "recipes"}, path
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"relative import in {path}"


def test_version_is_read_from_the_package() -> None:
    assert SETUP["dynamic"]["version"] == {"attr": "remap.__version__"}
    assert all(part.isdigit() for part in remap.__version__.split(".")[:2])


def test_the_citation_and_the_changelog_name_this_version() -> None:
    assert f"\nversion: {remap.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{remap.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_command_points_at_a_function_that_is_there() -> None:
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["remap"]
    module, _, function = target.partition(":")
    top, _, rest = module.partition(".")
    tree = ast.parse((ROOT / FOLDERS[top] / f"{rest}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def requirements() -> dict[str, Requirement]:
    extras = PROJECT["optional-dependencies"]
    own, *others = map(Requirement, extras["test"])
    assert own.name == "remap"  # its extras are tested too
    words = [*PROJECT["dependencies"], *(word for name in own.extras for word in extras[name])]
    return {canonicalize_name(one.name): one for one in [*map(Requirement, words), *others]}


@pytest.mark.parametrize(("name", "below"), [("torch", "2.9.1"), ("transformers", "5.2.9"), ("accelerate", "1.14.9")])
def test_versions_with_known_faults_are_refused(name: str, below: str) -> None:
    """CVE-2026-24747, CVE-2026-4372, and adapters of which FSDP2 saved a part (accelerate pull request 4206)."""
    assert below not in requirements()[name].specifier


def test_the_lock_has_every_requirement_hashed_and_above_its_floor() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
        assert match, f"no name, version and hash: {line}"
        locked[match[1]] = Version(match[2])
    assert list(locked) == sorted(locked) and len(locked) == len(lines)
    for name, requirement in requirements().items():
        assert name in locked, f"{name} is missing; run `python tools/lock.py`"
        assert locked[name] in requirement.specifier, f"{name} {locked[name]} is not {requirement.specifier}"


def test_the_lock_is_made_of_names_versions_and_hashes() -> None:
    """A report as pip writes it (its format 1); where a file came from must not be in the lock."""
    lines = runpy.run_path(str(ROOT / "tools" / "lock.py"))["lines"]

    def entry(name: str, digest: str | None) -> dict:
        hashes = {} if digest is None else {"hashes": {"sha256": digest}}
        info = {"url": "https://host.invalid/file.whl", "archive_info": hashes}
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": info, "requested": False}

    own = {"metadata": {"name": "remap", "version": "0"}, "requested": True}
    own |= {"download_info": {"url": "file:///somewhere", "dir_info": {}}}
    found = lines({"install": [entry("Z_b", "1" * 64), own, entry("a", "2" * 64)]})
    assert found == [f"a==1.0 --hash=sha256:{'2' * 64}", f"z-b==1.0 --hash=sha256:{'1' * 64}"]
    with pytest.raises(ValueError, match="bare 1.0 comes without"):
        lines({"install": [entry("bare", None)]})


def test_ci_installs_the_lock_by_its_hashes_and_nothing_else() -> None:
    """Read from the script: the wheel itself brings no other packages along."""
    installs = [
        line.split("pip", 1)[1] for line in (ROOT / ".ci" / "run").read_text().splitlines() if "clean/bin/pip" in line
    ]
    assert "--require-hashes" in installs[0] and "requirements.lock" in installs[0]
    assert all("--no-deps" in line for line in installs[1:] if "install" in line)
