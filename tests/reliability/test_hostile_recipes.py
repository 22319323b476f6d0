"""Recipes from strangers: nothing in them runs, none of them hangs, each has its own message and exit code 2."""

import os
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from remap.errors import RecipeError
from remap.recipe import resolve, strict_yaml
from remap_cli import main as command

pytestmark = pytest.mark.guarantee(14)

# MARK is a path that the payload would make.
PAYLOADS = {
    "python/object/apply": ("name: !!python/object/apply:os.mkdir ['MARK']", "tags (!name) are not allowed"),
    "python/object/new": ("name: !!python/object/new:os.mkdir ['MARK']", "tags (!name) are not allowed"),
    "python/name": ("name: !!python/name:os.mkdir", "tags (!name) are not allowed"),
    "python/module": ("name: !!python/module:os", "tags (!name) are not allowed"),
    "import_call": ("name: !import_call {key: os.mkdir, init: {args: ['MARK']}}", "tags (!name) are not allowed"),
    "a tag of its own": ("%TAG ! tag:yaml.org,2002:python/\n---\nname: !object/apply:os.mkdir [MARK]", "tags (!"),
    "_target_": ("student: {_target_: os.mkdir, name: 'MARK'}", "student._target_: unknown key"),
    "_target_ of a method": ("method: {name: lora, _target_: os.mkdir}", "method._target_: unknown key"),
    "dotted method": ("method: os.mkdir", "unknown method 'os.mkdir'"),
    "dotted loss": ("losses: [os.mkdir]", "unknown loss 'os.mkdir'"),
    "target of a registry": ("method: 'os:mkdir'", "unknown method 'os:mkdir'"),
    "dotted initialisation": ("{teacher: {}, student: {init: os.mkdir}}", "unknown initialisation 'os.mkdir'"),
    "torchdistill class": ("{teacher: {}, losses: [{name: torchdistill, loss: os.mkdir}]}", "losses[0]"),
    "alias bomb": ("a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(40)), "anchors (&name)"),
    "merge key": ("<<: {seed: 1}", "<<: unknown key"),
    "deep brackets": ("[" * 100_000, "more than 32 levels deep"),
    "deep keys": ("? " * 100_000, "more than 32 levels deep"),
    "deep mappings": ("{a: " * 50_000, "more than 32 levels deep"),
    "a heap of keys": ("\n".join(f"k{i}: 1" for i in range(20_000)), "more than 2,000 values"),
    "a heap of losses": (f"losses: [{'ce,' * 60_000}]", "more than 2,000 values"),
    "a long word": ("name: " + "a" * 200_000, "a word of more than 4,096 letters"),
    "a long list in one word": (f"losses: '{'ce,' * 60_000}'", "a word of more than 4,096 letters"),
    "a line of 10 MB": ("name: " + "a" * 10_000_000, "is larger than 256,000 bytes"),
    "a NUL": ("name: a\0b", "special characters are not allowed"),
    "a NUL in quotes": ('data: {source: "a\\0b"}', "data.source: holds the control character '\\x00'"),
    "escape sequences": ('name: "a\\e[2J"', "'a\\x1b[2J' may hold letters"),
    "a line break in a name": ('losses: ["ce\\n  do rm -rf"]', "unknown loss 'ce\\n  do rm -rf'"),
    "turned text": ('student: "vit_\\u202Esmall"', "the control character"),
    "half a letter": ('data: {source: "\\ud800"}', "characters that no file name has"),
    "an escape beyond all letters": ('name: "\\U00110000"', "not readable as YAML"),
    "an escape beyond all numbers": ('name: "\\UFFFFFFFF"', "not readable as YAML"),
    "a version beyond all numbers": (f"%YAML {'9' * 5000}.1\n---\nseed: 1", "not readable as YAML"),
    "a huge number": ("seed: " + "9" * 4000, "the number is too large"),
    "a huge exponent": ("train: {lr: 1e99999}", "the number is too large"),
    "a huge size": ("student: {image_size: 1000000000}", "student.image_size: should be less than or equal to 8192"),
    "a key twice": ("seed: 1\nseed: 2", "key 'seed' is given twice"),
    "two documents": ("seed: 1\n---\nseed: 2", "but found another document"),
    "latin-1": (b"name: \xe4", "is not UTF-8 text"),
    "utf-16": ("name: a".encode("utf-16"), "is not UTF-8 text"),
    "a list": ("- a", "should be a mapping of keys"),
    "a path without end": (f"data: {{source: {'a/' * 2040}a}}\nseed: x", "seed: should be a whole number"),
}  # fmt: skip


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[Callable[..., str]]:
    """Run the command line in this process: it must end with exit code 2 and a message, which is given back."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["remap", *words])
        with pytest.raises(SystemExit) as caught:
            command.main()
        text = capsys.readouterr().err
        assert caught.value.code == 2 and text.startswith("error: ") and "Traceback" not in text
        return text

    yield call
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Import what a refusal may look names up in, so that times are of the refusal."""
    with pytest.raises(RecipeError):
        resolve(settings=["nothing=1"])


@pytest.mark.parametrize(("text", "says"), PAYLOADS.values(), ids=list(PAYLOADS))
def test_hostile_recipes_run_nothing(
    text: str | bytes, says: str, tmp_path: Path, run_command: Callable[..., str], figure: Callable[..., None]
) -> None:
    """The payloads that unsafe readers run (PyYAML's CVE-2020-14343 family; torchdistill's import_call), and bombs."""
    mark, recipe = tmp_path / "made", tmp_path / "x.yaml"
    recipe.write_bytes(text if isinstance(text, bytes) else text.replace("MARK", str(mark)).encode())
    started = time.process_time()
    shown = run_command("recipes", "validate", str(recipe))
    seconds = time.process_time() - started
    assert " ".join(says.split()) in " ".join(shown.split())
    assert not mark.exists() and list(tmp_path.iterdir()) == [recipe]
    assert seconds < 1.0 and len(shown) < 20_000
    assert not {c for c in shown if not c.isprintable()} - {"\n"}
    figure("hostile recipes executed, of all tried", 0, 1)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    """10 GB of holes and a line of 10 MB cost less than a megabyte of memory."""
    holes, line = tmp_path / "holes.yaml", tmp_path / "line.yaml"
    with open(holes, "wb") as file:
        file.truncate(10 * 2**30)
    line.write_bytes(b"name: " + b"a" * 10_000_000)
    tracemalloc.start()
    try:
        for path in (holes, line):
            with pytest.raises(RecipeError, match="is larger than"):
                strict_yaml.read_mapping(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def _loop(path: Path) -> None:
    path.symlink_to(path)


PLACES = {
    "a folder": (Path.mkdir, "Is a directory"),
    "a FIFO": (os.mkfifo, "it is a FIFO, not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
    "a circle of links": (_loop, "Too many levels of symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "No such file"),
    "nothing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize(("make", "says"), PLACES.values(), ids=list(PLACES))
def test_what_is_no_file_is_refused_at_once(
    make: Callable, says: str, tmp_path: Path, run_command: Callable[..., str], figure: Callable[..., None]
) -> None:
    """Opening a FIFO without a writer would wait for ever, and a device never ends."""
    path = tmp_path / "x.yaml"
    make(path)
    assert says in run_command("recipes", "validate", str(path))
    figure("hostile recipes executed, of all tried", 0, 1)


NAMES = {"long": "a" * 5000, "nobody": "~nobody-of-this-name/x", "no UTF-8": "\udc80", "NUL": "a\0", "up": "../" * 500}


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_names_of_recipes_of_any_look(name: str, run_command: Callable[..., str]) -> None:
    shown = run_command("recipes", "validate", f"{name}.yaml")
    assert any(word in shown for word in ("no such file", "File name too long", "no file has such a name"))


def test_a_recipe_that_is_shown_is_letters_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`remap recipes show` prints the file, comments and all."""
    path = tmp_path / "x.yaml"
    path.write_bytes(b"# \x1b[2J\x1b]0;title\x07 \xe2\x80\xae\nseed: 1\n")
    monkeypatch.setattr(sys, "argv", ["remap", "recipes", "show", str(path)])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert not caught.value.code
    assert capsys.readouterr().out == "# \\x1b[2J\\x1b]0;title\\x07 \\u202e\nseed: 1\n"


@pytest.mark.parametrize("word", ["${HOME}", "$HOME", "{{ HOME }}", "${oc.env:HOME}", "%HOME%", "!ENV HOME"])
def test_environment_variables_are_words(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a token would end up in recipe.yaml, which people share."""
    monkeypatch.setenv("HOME", "/secret-token")
    path = tmp_path / "x.yaml"
    path.write_text(f"data:\n  source: '{word}'\nstudent:\n  model: '{word}'\n")
    recipe = resolve(path)
    assert recipe.student.model == recipe.data.source == word
    assert "secret-token" not in str(recipe.written_out())
