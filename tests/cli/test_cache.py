"""``remap cache``: listing and clearing at once and without torch, building with the words of ``distill``."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from remap.cache.cache_folders import CacheKey, open_folder
from remap.cache.output_format import OutputFormat
from remap.cache.output_store import OutputStore, row_digests
from remap.errors import Interrupted
from remap.io.human_size import size
from remap_cli import console

HEAVY = "import sys; heavy = {'torch', 'timm', 'accelerate', 'peft', 'sklearn', 'torchdistill'} & set(sys.modules)"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMAP_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "teachers"


def fill(root: Path, teacher: str, count: int) -> str:
    """A cache of ``count`` images; its id."""
    key = CacheKey(teacher, "ab", {}, {"size": 32}, "bf16", {}).to_dict()
    names = row_digests([bytes([number]) for number in range(count)])
    items = {"logits": OutputFormat((100,), "fp16", top_k=5), "map1 4x4 [bold]heads=mean": OutputFormat((4, 4))}
    with OutputStore.open(root, key, items) as store:
        store.append(names, {name: torch.ones(count, *item.shape) for name, item in items.items()})
    return store.folder.name


SIZE = 5 * 4 + 4 + 5 * 2 + 20 + 4 * 4 * 4 + 20


def test_nothing_is_kept_at_first(remap: Callable[..., Result], run_json: Callable[..., Any], root: Path) -> None:
    assert f"No teachers are cached in {root.parent}" in remap("cache", "ls").stdout.replace("\n", "")
    assert run_json("cache", "ls") == [] and not root.exists()
    assert "0 teacher caches cleared" in remap("cache", "clear", "--all").stdout


def test_a_listing_has_all_that_decides(
    remap: Callable[..., Result], run_json: Callable[..., Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.out, "width", 200)
    name = fill(root, "vit_large", 3)
    (found,) = run_json("cache", "ls")
    assert (found["id"], found["folder"]) == (name, str(root / name))
    assert (found["images"], found["bytes"], found["key"]["view"]) == (3, 3 * SIZE, {"size": 32})
    assert [item["name"] for item in found["items"]] == ["logits", "map1 4x4 [bold]heads=mean"]
    shown = remap("cache", "ls").stdout
    for part in (name[:8], "vit_large", "32 px, bf16", "logits (top 5 of 100 fp16)", "[bold]heads=mean (4x4 fp32)"):
        assert part in shown
    assert "today" in shown and size(3 * SIZE) in shown
    os.utime(root / name / "key.json", (0, 0))
    assert "d ago" in remap("cache", "ls").stdout


def test_tuned_teachers_are_told_apart(
    remap: Callable[..., Result], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.out, "width", 200)
    for images in ("a1", "b2"):
        key = {"teacher": "vit", "method": "full", "images": images * 16, "recipe": "c3" * 8, "precision": "auto"}
        with open_folder(root.with_name("prepared"), key):
            pass
    shown = remap("cache", "ls").stdout
    for images in ("a1a1a1a1", "b2b2b2b2"):
        assert f"precision auto  tuned: full, images {images}, recipe c3c3c3c3" in shown


@pytest.mark.parametrize("words", [["cache", "--help"], ["cache", "ls"], ["cache", "clear", "--all", "--yes"]])
def test_looking_and_clearing_import_nothing_heavy(root: Path, words: list[str]) -> None:
    fill(root, "vit", 1)
    code = (
        f"import sys; sys.argv = ['remap', *{words!r}]\n"
        "from remap_cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as leave:\n    assert not leave.code, leave.code\n"
        f"{HEAVY}; assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_clearing_asks_for_a_choice_and_a_yes(remap: Callable[..., Result], root: Path) -> None:
    name = fill(root, "vit", 2)
    for words, says in (
        ([], "nothing was chosen"),
        (["--all"], "--yes"),
        (["zzz", "--yes"], f"no teacher cache of this id in {root.parent}\n"),
        ([name, "--all", "--yes"], "either name caches or take all"),
    ):
        result = remap("cache", "clear", *words)
        assert result.exit_code == 2 and says in result.message
    assert (root / name / "key.json").exists()


@pytest.mark.parametrize(("answer", "left"), [("n", 1), ("y", 0)])
def test_a_person_is_asked(root: Path, answer: str, left: int) -> None:
    """A pseudo-terminal answers."""
    fill(root, "vit", 2)
    keyboard, terminal = os.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    command = [sys.executable, "-m", "remap_cli", "cache", "clear", "--all"]
    done = subprocess.run(command, stdin=terminal, capture_output=True, text=True, check=False)
    os.close(keyboard), os.close(terminal)
    assert "Delete 1 teacher cache?" in done.stderr and "vit, 2 rows" in done.stderr
    assert done.returncode == left and len(list(root.iterdir())) == left


def test_clearing_by_id_and_by_age(remap: Callable[..., Result], run_json: Callable[..., Any], root: Path) -> None:
    one, two, three = fill(root, "one", 1), fill(root, "two", 2), fill(root, "three", 3)
    os.utime(root / three / "key.json", (1e9, 1e9))
    found = run_json("cache", "clear", "--older-than", "30", "--yes")
    assert [row["id"] for row in found["removed"]] == [three] and found["bytes"] == 3 * SIZE
    assert "1 teacher cache cleared" in remap("cache", "clear", one[:12], "--yes").stdout
    assert [row["id"] for row in run_json("cache", "ls")] == [two]


def test_a_cache_in_use_is_left_and_named(
    remap: Callable[..., Result], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = fill(root, "vit", 1)
    with open_folder(root, CacheKey("vit", "ab", {}, {"size": 32}, "bf16", {}).to_dict()):
        result = remap("cache", "clear", "--all", "--yes")
    assert "0 teacher caches cleared" in result.stdout and (root / name).exists()
    assert name[:8] in result.stderr and "running command" in result.stderr


def test_build_takes_the_words_of_distill(
    remap: Callable[..., Result],
    run_json: Callable[..., Any],
    root: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console.out, "width", 200)
    from remap.pipeline import build_cache

    asked: list[Any] = []
    summary = {
        "teacher": "mini_teacher",
        "key": "ab",
        "folder": str(root / "ab"),
        "items": [{"name": "logits", "shape": [2], "bytes": 672}, {"name": "scalar", "shape": [], "bytes": 576}],
        "images": 24,
        "views": 2,
        "computed": 20,
        "bytes": 1248,
        "seconds": 1.5,
    }
    monkeypatch.setattr(build_cache, "build_cache", lambda recipe, progress: asked.append(recipe) or [summary])
    words = ("cache", "build", "--data", str(pictures), "--losses", "ce,kd:0.5", "--set", "teacher.cache=disk")
    assert run_json(*words, "--batch-size", "8") == [summary]
    (recipe,) = asked
    assert recipe.data.source == str(pictures) and recipe.train.batch_size == 8
    assert [loss.name for loss in recipe.losses] == ["ce", "kd"]
    shown = remap(*words).stdout
    for part in (
        "12 images x 2 views, 20 of 24 rows computed now in 1.5 s",
        "mini_teacher",
        "logits",
        "1.2 kB",
        str(root / "ab"),
    ):
        assert part in shown.replace("\n", "")


def test_an_interrupted_build_says_how_to_continue(
    remap: Callable[..., Result], root: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remap.pipeline import build_cache

    def stopped(*_: Any) -> None:
        raise Interrupted("stopped by SIGTERM", exit_code=143)

    words = ["cache", "build", "--data", str(pictures), "--set", "teacher.cache=disk"]
    monkeypatch.setattr(build_cache, "build_cache", stopped)
    monkeypatch.setattr(sys, "argv", ["remap", *words])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    result = remap(*words)
    assert result.exit_code == 143 and result.message.endswith(f"continue with: {shlex.join(['remap', *words])}")


def test_features_of_texts_are_listed_and_cleared(
    remap: Callable[..., Result], run_json: Callable[..., Any], root: Path
) -> None:
    """As one cache; other files in the folder, and what a link leads to, stay."""
    texts, name = root.with_name("texts"), fill(root, "vit", 1)
    texts.mkdir()
    for number in range(2):
        (texts / f"{number:024x}.safetensors").write_bytes(bytes(100))
    (texts / "notes.txt").touch()
    (texts / f"{9:024x}.safetensors").symlink_to(texts / "notes.txt")
    found = {row["id"]: row for row in run_json("cache", "ls")}
    assert set(found) == {name, "texts"} and found["texts"]["bytes"] == 200
    assert "sets of texts: 2" in remap("cache", "ls").stdout
    assert run_json("cache", "clear", "texts", "--yes")["bytes"] == 200
    assert [row["id"] for row in run_json("cache", "ls")] == [name] and len(list(texts.iterdir())) == 2


def test_a_damaged_cache_is_named_and_left(remap: Callable[..., Result], root: Path) -> None:
    """It takes room, and what is in it may be anyone's: only folders whose name and key agree are deleted."""
    sound, damaged = fill(root, "vit_large", 1), fill(root, "vit_small", 1)
    (root / damaged / "key.json").write_text("{")
    for words in (("ls",), ("clear", "--all", "--yes")):
        result = remap("cache", *words)
        assert f"damaged, neither listed nor cleared: delete it yourself with rm -r {root / damaged}" in (
            result.stderr.replace("\n", "")
        )
        assert ("vit_small" in result.stdout) is False
    assert not (root / sound).exists() and (root / damaged).exists()
