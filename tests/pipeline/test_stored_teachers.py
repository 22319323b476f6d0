"""A teacher is tuned once for the same images, recipe and machine; later runs that read it give the same bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from remap.cache.cache_folders import cache_root, prepared_root
from remap.cache.cache_listing import clear, list_caches
from remap.pipeline.repeat import repeat
from remap.pipeline.run import start

TUNED = ("teacher.prepare=lora", "teacher.epochs=1", "teacher.allow_weak=true", "train.epochs=1")
TUNING, STORED = "tuning it (lora)", "was tuned on these images before"


def test_a_second_run_reads_the_teacher_and_gives_the_same_bits(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    first, second, own = (watch(lambda done: None) for _ in range(3))
    start(tiny.recipe(*TUNED), tmp_path / "first", first)
    start(tiny.recipe(*TUNED), tmp_path / "second", second)
    assert _said(first, TUNING) and not _said(second, TUNING) and _said(second, STORED)
    assert {"the teacher: evaluating the teacher", "the teacher: building the teacher"} <= set(first.waited)
    assert not any(text.startswith("the teacher:") and "the student" in text for text in first.waited + first.said)
    assert _task(tmp_path / "first") == _task(tmp_path / "second")
    assert _task(tmp_path / "first" / "teacher") == _task(tmp_path / "second" / "teacher")
    start(tiny.recipe(*TUNED, method="bitfit"), tmp_path / "other", own)
    assert _said(own, STORED), "the student's method does not matter to its teacher"
    (stored,) = list_caches(cache_root())
    assert (stored.key["method"], stored.images) == ("lora", 0) and stored.bytes > 1000
    clear([stored])
    assert not list_caches(cache_root()) and not any(prepared_root().iterdir())


@pytest.mark.parametrize(
    "settings", [("teacher.epochs=2",), ("teacher.lr=0.5",), ("seed=1",), ("teacher.cache=off",)], ids=lambda s: s[0]
)
def test_what_decides_the_teacher_is_part_of_the_key(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], settings: tuple[str, ...]
) -> None:
    start(tiny.recipe(*TUNED), tmp_path / "first")
    said = watch(lambda done: None)
    start(tiny.recipe(*TUNED, *settings), tmp_path / "second", said)
    assert _said(said, TUNING) and not _said(said, STORED)


def test_images_count_by_content_and_not_by_path(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    start(tiny.recipe(*TUNED), tmp_path / "first")
    moved, changed = watch(lambda done: None), watch(lambda done: None)
    start(tiny.recipe(*TUNED, data=str(tmp_path / "data")), tmp_path / "moved", moved)
    assert _said(moved, STORED)
    image = next((tmp_path / "data" / "train").glob("*/*.png"))
    Image.new("RGB", (16, 16), "grey").save(image)
    start(tiny.recipe(*TUNED, data=str(tmp_path / "data")), tmp_path / "changed", changed)
    assert _said(changed, TUNING)


@pytest.mark.parametrize("harm", ["cut", "link"])
def test_a_damaged_teacher_is_tuned_again(tiny: Any, tmp_path: Path, watch: Callable[..., Any], harm: str) -> None:
    start(tiny.recipe(*TUNED), tmp_path / "first")
    (tensors,) = prepared_root().glob("*/task.safetensors")
    content = tensors.read_bytes()
    if harm == "cut":
        tensors.write_bytes(content[:-4])
    else:
        tensors.rename(tmp_path / "elsewhere")
        tensors.symlink_to(tmp_path / "elsewhere")
    said = watch(lambda done: None)
    start(tiny.recipe(*TUNED), tmp_path / "second", said)
    assert _said(said, TUNING) and _said(said, "cannot be used")
    assert _task(tmp_path / "first") == _task(tmp_path / "second")
    assert not tensors.is_symlink() and tensors.read_bytes() == content, "it is stored again"


def test_a_repeat_tunes_its_own_teacher(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    start(tiny.recipe(*TUNED), tmp_path / "first")
    said = watch(lambda done: None)
    repeat(tmp_path / "first", tmp_path / "again", progress=said)
    assert _said(said, TUNING)


def test_a_cache_that_cannot_be_written_does_not_cost_the_run(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REMAP_CACHE", str(tmp_path / "file"))
    said = watch(lambda done: None)
    start(tiny.recipe(*TUNED), tmp_path / "run", said)
    assert _said(said, "is not stored for later runs")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"


def _said(progress: Any, words: str) -> bool:
    return any(words in line for line in progress.said)


def _task(run: Path) -> bytes:
    return (run / "task" / "task.safetensors").read_bytes()
