"""Methods, losses and data sources of other packages: by entry points, and by ``remap.register``."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import remap
from remap import registry
from remap.errors import PluginError, UnknownName
from remap.plugins import _TABLES
from remap.registry import PLUGIN_GROUPS, Entry, Registry
from remap.remapping import LOSSES, LossEntry
from remap.tuning import METHODS, MethodEntry
from remap.tuning.base import Method

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests" / "plugin_package"


# One package, installed as a user installs it


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the toy package is installed into by pip; pip leaves build files in the folder it is given."""
    source, site = tmp_path_factory.mktemp("source") / "toy", tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    assert (site / "remap_toy-1.0.dist-info" / "entry_points.txt").is_file()
    return site


@pytest.fixture
def command(site: Path, tmp_path: Path) -> Callable[..., str]:
    """Run the command line with the toy package installed; give what it prints."""

    def call(*words: str, code: int = 0) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        process = subprocess.run(
            [sys.executable, "-m", "remap_cli", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert process.returncode == code, process.stderr
        return process.stdout + process.stderr if code else process.stdout

    return call


@pytest.mark.slow
def test_an_installed_package_trains_saves_reloads_and_is_listed(
    command: Callable[..., str], tiny: Any, tmp_path: Path
) -> None:
    """One method, one loss and one source. Source of the counts: 12 and 9 images, and the names of its parameters."""
    words = ["--method=toy_final_norm", "--losses=ce,toy_logits", "--output=run", "--set=losses.toy_logits.scale=0.5"]
    command("distill", *tiny.arguments("teacher.allow_weak=true", data="toy"), *words)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    losses = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "toy_logits" in json.dumps(losses)
    evaluated = json.loads(command("eval", "run", "--json"))
    assert evaluated["accuracy"] == summary["student"]["accuracy"]
    assert (summary["data"]["labeled_images"], summary["data"]["val_images"]) == (12, 9)
    (trained,) = (tmp_path / "run").glob("trainables.json")
    assert {"norm.weight", "norm.bias"} <= set(_strings(json.loads(trained.read_text())))

    methods = {row["name"]: row["origin"] for row in json.loads(command("methods", "--json"))}
    losses = {row["name"]: row["origin"] for row in json.loads(command("losses", "--json"))}
    assert (methods["toy_final_norm"], methods["lora"]) == ("remap-toy", "remap")
    assert (losses["toy_logits"], losses["kd"]) == ("remap-toy", "remap")
    assert "toy_final_norm (remap-toy)" in command("methods") and "toy_logits (remap-toy)" in command("losses")
    assert "toy_final_norm" in command("methods", "toy_final_norm")


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, str):
        yield value


def test_help_reads_no_entry_points(site: Path) -> None:
    """A plug-in that would end the process when it is imported does not hinder the help."""
    code = "import sys, remap_cli.app as m\ntry: m.app(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'remap_toy'} & set(sys.modules), sorted(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


@pytest.mark.parametrize("kind", _TABLES)
def test_a_new_thing_is_the_three_files_that_contributing_counts(kind: str) -> None:
    """Its class, its row, its test. The toy package brings class and row from outside, without a change to any file of
    remap, and the test above uses them: so nothing else is needed."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (section,) = re.findall(rf"^### A {kind}: 3 files$(.*?)^##", text, flags=re.MULTILINE | re.DOTALL)
    paths = re.findall(r"^\d\. `([^`]+)`", section, flags=re.MULTILINE)
    assert len(paths) == 3
    folders = {"CATEGORY": "adapter", "KIND": "logits"}
    for path in paths:
        for placeholder, folder in folders.items():
            path = path.replace(placeholder, folder)
        assert (ROOT / path).exists() or ("NAME" in path and (ROOT / path).parent.is_dir()), path


# Tables and entry points


def row(name: str, target: str | type = "toy.nowhere:Class", **fields: Any) -> Entry:
    return Entry(name=name, target=target, **{"category": "c", "summary": "s", "paper": "-", **fields})


def point(package: str, given: object) -> SimpleNamespace:
    """An entry point whose object is ``given``; an exception is raised instead."""

    def load() -> object:
        if isinstance(given, Exception):
            raise given
        return given

    return SimpleNamespace(dist=SimpleNamespace(name=package), name="entry", value="toy.rows:ROWS", load=load)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    """A table with the built-in row "mine", and entry points as given."""

    def make(*points: SimpleNamespace) -> Registry:
        found = SimpleNamespace(select=lambda group: points if "methods" in group else ())
        monkeypatch.setattr(registry, "installed_entry_points", lambda: found)
        return Registry("method", "methods", [row("mine", "remap.mine:Mine")])

    return make


def test_rows_of_packages_follow_the_built_in_ones_and_carry_their_name(table: Callable[..., Registry]) -> None:
    found = table(point("zebra", row("z")), point("ant", [row("b"), row("a")]))
    assert [(entry.name, entry.origin) for entry in found] == [
        ("mine", "remap"),
        ("b", "ant"),
        ("a", "ant"),
        ("z", "zebra"),
    ]


def test_entry_points_are_read_once_and_not_before_the_table_is_used(table: Callable[..., Registry]) -> None:
    broken = point("ant", ImportError("no module named toy"))
    found = table(broken)
    broken.load = lambda: row("late")
    assert "late" in found
    broken.load = lambda: pytest.fail("read a second time")
    assert found.row("late").origin == "ant"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ImportError("no module named toy"), "package 'ant' cannot be loaded: ImportError: no module named toy"),
        (ValueError("boom"), "package 'ant' cannot be loaded: ValueError: boom"),
        (42, "package 'ant' gives something that is not a row\n  given:   int"),
        ([row("a"), "b"], "package 'ant' gives something that is not a row\n  given:   str"),
        (row("mine"), "'mine' is registered twice\n  given:   remap.mine:Mine (package 'remap') and toy.nowhere:Class"),
        (row("a+b"), "package 'ant' registers a method whose name cannot be used"),
        (row("a", category="other"), "package 'ant' registers the method 'a' under an unknown category"),
    ],
    ids=["import", "error", "not a row", "not rows", "taken", "name", "category"],
)
def test_a_broken_package_is_one_message_that_names_it(
    table: Callable[..., Registry], given: object, message: str
) -> None:
    found = table(point("ant", given))
    for _ in range(2):  # not only the first time
        with pytest.raises(PluginError) as caught:
            found.row("mine")
        assert message in str(caught.value) and caught.value.exit_code == 2


def test_a_row_of_another_table_is_refused() -> None:
    with pytest.raises(PluginError, match="method 'toy' cannot be registered\n  given: .*missing"):
        remap.register("method", name="toy")(type("Toy", (), {}))
    with pytest.raises(PluginError, match="registers a loss with a row of the wrong type\n  given:   MethodEntry"):
        remap.register("loss", next(iter(METHODS)))


def test_a_class_that_is_not_there_is_the_packages_error(table: Callable[..., Registry]) -> None:
    found = table(point("ant", row("a")))
    with pytest.raises(PluginError, match="package 'ant' cannot be loaded: ModuleNotFoundError.*\n.*'a' .toy.nowhere"):
        found.load("a")


def test_every_group_has_its_table() -> None:
    assert [f"remap.{table.plural}" for table in _TABLES.values()] == list(PLUGIN_GROUPS.values())


# remap.register


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for one in _TABLES.values():
        assert one.names
        monkeypatch.setattr(one, "_rows", dict(one._rows))


FIELDS: dict[str, Any] = {
    "name": "toy_everything",
    "category": "parameter",
    "summary": "s",
    "paper": "-",
    "trains": "all",
    "vit_base": None,
    "mergeable": True,
    "lr": 1e-3,
}


@pytest.mark.usefixtures("registered")
def test_a_class_is_registered_by_a_decorator() -> None:
    @remap.register("method", **FIELDS)
    class Everything(METHODS.load("full")):  # type: ignore[misc]
        pass

    assert METHODS.load("toy_everything") is Everything and issubclass(Everything, Method)
    assert METHODS.row("toy_everything").origin == __name__.partition(".")[0]
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    assert "norm.weight" in remap.attach(model, "toy_everything").trainable


@pytest.mark.usefixtures("registered")
def test_a_row_is_registered_and_a_name_that_is_taken_is_refused() -> None:
    given = LossEntry(
        name="toy", target="toy.losses:Toy", category="logits", summary="s", paper="-", needs="n", signal="logits"
    )
    assert remap.register("loss", given) is given
    remap.register("loss", given)  # the same again, as in a notebook
    assert LOSSES.row("toy").origin == "toy"
    with pytest.raises(PluginError, match="the method 'lora' is registered twice"):
        remap.register("method", MethodEntry(target="toy.methods:Toy", **{**FIELDS, "name": "lora"}))


def test_a_kind_that_is_not_a_table_is_refused() -> None:
    with pytest.raises(UnknownName, match="unknown kind 'metod'; did you mean 'method'"):
        remap.register("metod", **FIELDS)
