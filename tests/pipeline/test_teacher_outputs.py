"""Teacher outputs on disk: the same student, computed once, and never a stale row."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import remap.io.disk_space
from remap.cache.cache_folders import cache_root
from remap.cache.cache_listing import list_caches
from remap.errors import DataError, RecipeError, RemapError
from remap.pipeline.build_cache import build_cache
from remap.pipeline.run import start
from remap.remapping.objective import Objective

pytestmark = pytest.mark.slow

LOSSES = "ce,kd,attention,feature"


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMAP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images teachers have been asked about (one more to learn the shapes of what they say)."""
    counts: list[int] = []
    keep = Objective.targets

    def count(self: Objective, signals: Any, *rest: Any) -> Any:
        counts.append(len(signals.logits_BC))
        return keep(self, signals, *rest)

    monkeypatch.setattr(Objective, "targets", count)
    return counts


@pytest.mark.parametrize("augment", [(), ("data.augment=strong", "data.views=2", "train.epochs=4")])
def test_students_of_cached_and_online_teachers_are_bit_identical(
    tiny: Any, tmp_path: Path, largest_difference: Callable[..., float], augment: tuple[str, ...]
) -> None:
    runs = {
        cache: start(tiny.recipe(f"teacher.cache={cache}", *augment, losses=LOSSES), tmp_path / cache)
        for cache in ("off", "memory", "disk")
    }
    runs["disk again"] = start(tiny.recipe("teacher.cache=disk", *augment, losses=LOSSES), tmp_path / "again")
    for run in runs.values():
        assert largest_difference(run.student.trained, runs["off"].student.trained) == 0.0
        assert run.summary["final_losses"] == runs["off"].summary["final_losses"]


def test_a_closed_list_of_views_is_replayed(tiny: Any, tmp_path: Path, asked: list[int]) -> None:
    """24 images in 3 views: 72 rows for 5 epochs, and none for a second run."""
    recipe = tiny.recipe("teacher.cache=disk", "data.augment=shift", "data.views=3", "train.epochs=5", losses="ce,kd")
    start(recipe, tmp_path / "one")
    assert sum(asked) == 72 + 1
    start(recipe, tmp_path / "two")
    assert sum(asked) == 72 + 2
    (cache,) = (one for one in list_caches(cache_root()) if one.outputs)  # the other is the fitted head
    assert cache.images == 72


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_views_that_no_epoch_shows_are_not_computed(cache: str, tiny: Any, tmp_path: Path, asked: list[int]) -> None:
    """24 images in the views of two epochs, of the nine in the recipe: 48 rows; the student is that of two views."""
    settings = (f"teacher.cache={cache}", "data.augment=shift", "train.epochs=2")
    nine = start(tiny.recipe(*settings, "data.views=9", losses="ce,kd"), tmp_path / "nine")
    assert sum(asked) == 48 + 1
    two = start(tiny.recipe(*settings, "data.views=2", losses="ce,kd"), tmp_path / "two")
    for name, tensor in load_file(nine.run_dir / "task" / "task.safetensors").items():
        assert torch.equal(tensor, load_file(two.run_dir / "task" / "task.safetensors")[name]), name


def test_what_was_built_is_used_and_completed(tiny: Any, tmp_path: Path, asked: list[int], watch: Any) -> None:
    """``auto`` goes on with what is on disk: the item of another loss is computed when it is first wanted."""
    reporter = watch(lambda step: None)
    (built,) = build_cache(tiny.recipe(losses="ce,kd"), reporter)
    cost = r"caching teacher outputs on disk: 24 images x 1 view, 24 of 24 to compute, \d.* B, about [\d.]+ s"
    assert [line for line in reporter.said if re.fullmatch(cost, line)], "before it is paid"
    assert (built["computed"], built["images"]) == (24, 24)
    assert [item["name"] for item in built["items"]] == ["logits"]
    before = sum(asked)
    start(tiny.recipe(losses="ce,kd,dist"), tmp_path / "one")
    assert sum(asked) - before == 1
    start(tiny.recipe(losses="ce,kd,feature"), tmp_path / "two")
    assert sum(asked) - before == 1 + 1 + 24
    (cache,) = (one for one in list_caches(cache_root()) if one.outputs)  # the other is the fitted head
    assert {item.name for item in cache.outputs} == {"logits", "pooled"}


def test_features_are_found_again_by_runs_of_other_seeds(tiny: Any, tmp_path: Path, asked: list[int]) -> None:
    """Nobody reads the teacher's logits, so its untrained head must not tell seeds apart."""
    for seed, computed in ((0, 24), (1, 0)):
        asked.clear()
        start(tiny.recipe("teacher.cache=disk", losses="ce,feature", seed=seed), tmp_path / f"seed{seed}")
        assert sum(asked) == 1 + computed


def test_an_average_is_left_out_of_a_build(tiny: Any) -> None:
    built = build_cache(tiny.recipe("data.augment=none", teacher=f"{tiny.teacher},ema", losses="ce,kd"))
    assert [one["teacher"] for one in built] == [tiny.teacher]


def test_a_changed_image_is_computed_anew(tiny: Any, tmp_path: Path, asked: list[int]) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    recipe = tiny.recipe("teacher.cache=disk", "teacher.prepare=none", "teacher.allow_weak=true", losses="ce,feature")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": str(data)})})
    start(recipe, tmp_path / "one")
    path = sorted((data / "train" / "red").iterdir())[0]
    stamp = path.stat()
    Image.new("RGB", (16, 16), (250, 3, 5)).save(path)
    import os

    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the clock of a file system tells nothing
    asked.clear()
    start(recipe, tmp_path / "two")
    assert sum(asked) == 1 + 8, "one image, in a batch of the usual size"
    (cache,) = (one for one in list_caches(cache_root()) if one.outputs)  # the other is the fitted head
    assert cache.images == 24 + 1


@pytest.mark.parametrize(
    "change",
    ["weights", "image size", "augmentation", "precision", "dtype"],
    ids=lambda change: change.replace(" ", "-"),
)
def test_another_teacher_or_transform_finds_nothing(tiny: Any, tmp_path: Path, asked: list[int], change: str) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny.teacher.removeprefix("local-dir:"), folder)
    settings, words = ["teacher.cache=disk", "teacher.allow_weak=true"], {"losses": "ce,feature"}
    start(tiny.recipe(*settings, teacher=f"local-dir:{folder}", **words), tmp_path / "one")
    if change == "weights":
        tensors = load_file(folder / "model.safetensors")
        tensors["blocks.0.mlp.fc1.bias"][0] += 1e-3
        save_file(tensors, folder / "model.safetensors")
    elif change == "image size":
        settings.append("teacher.image_size=24")
    elif change == "augmentation":
        settings += ["data.augment=shift", "data.views=1"]
    else:
        settings.append({"precision": "train.precision=bf16", "dtype": "teacher.cache_dtype=fp16"}[change])
    asked.clear()
    start(tiny.recipe(*settings, teacher=f"local-dir:{folder}", **words), tmp_path / "two")
    assert sum(asked) == 1 + 24


def test_building_survives_being_killed(
    tiny: Any, tmp_path: Path, fork_command: Callable[..., Any], asked: list[int], largest_difference: Any
) -> None:
    """Killed at several moments, the build goes on; the student is that of a cache built in one go."""
    arguments = tiny.arguments("data.augment=strong", "data.views=40", losses="ce,kd,attention")
    written = _bytes_of_rows(tmp_path)
    for _ in range(2):
        process = fork_command("remap_cli", "cache", "build", *arguments)
        before, deadline = written, time.monotonic() + 60
        while time.monotonic() < deadline and process.alive():
            written = _bytes_of_rows(tmp_path)
            if written > before:
                break
            time.sleep(0.005)
        process.kill()
    recipe = tiny.recipe("data.augment=strong", "data.views=40", losses="ce,kd,attention")
    (built,) = build_cache(recipe)
    assert built["computed"] < built["images"] == 24 * 40
    cached = start(recipe, tmp_path / "cached")
    online = start(tiny.recipe("data.augment=strong", "data.views=40", "teacher.cache=off", losses="ce,kd,attention"))
    assert largest_difference(cached.student.trained, online.student.trained) == 0.0


def _bytes_of_rows(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.glob("cache/**/rows.bin"))
    except FileNotFoundError:  # a draft got its name meanwhile
        return 0


def test_a_damaged_record_is_computed_again(tiny: Any, tmp_path: Path, watch: Any) -> None:
    recipe = tiny.recipe("teacher.cache=disk", losses="ce,kd")
    whole = start(recipe, tmp_path / "one")
    (data,) = tmp_path.glob("cache/**/data.bin")
    content = bytearray(data.read_bytes())
    content[5] ^= 64
    data.write_bytes(content)
    progress = watch(lambda step: None)
    again = start(recipe, tmp_path / "two", progress)
    assert again.summary["final_losses"] == whole.summary["final_losses"]
    assert any("1 damaged" in text for text in progress.said)


def test_top_k_says_how_much_it_keeps(tiny: Any, tmp_path: Path, watch: Any) -> None:
    """Source: the kept probability cannot be more than all of it; with 1 of 3 classes it is the largest."""
    progress = watch(lambda step: None)
    result = start(tiny.recipe("teacher.top_k=1", losses="ce,kd"), tmp_path / "run", progress)
    assert torch.isfinite(torch.tensor(result.summary["final_losses"]["kd"]))
    kept = json.loads(next(tmp_path.glob("cache/**/item.json")).read_text())
    assert kept["top_k"] == 1


def test_a_place_that_cannot_be_is_refused(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe("teacher.cache=memory", "data.memory_gib=0", losses="ce,kd")
    with pytest.raises(DataError, match="do not fit in memory"):
        start(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "says"), [("data.augment=shift", "views are new"), ("data.mixup=0.5", "mixed images are new")]
)
def test_what_changes_is_kept_nowhere(tiny: Any, tmp_path: Path, setting: str, says: str) -> None:
    """By no run, by no build, and by no recipe that nobody checked; always before a teacher is prepared."""
    recipe = tiny.recipe(setting, losses="ce,kd")
    with pytest.raises(RecipeError, match=says):
        tiny.recipe("teacher.cache=disk", setting, losses="ce,kd")
    with pytest.raises(RecipeError, match=says):
        build_cache(recipe)
    kept = recipe.teacher.model_copy(update={"cache": "disk"})
    with pytest.raises(DataError, match=says):
        start(recipe.model_copy(update={"teachers": (kept,)}), tmp_path / "run")


def test_too_many_classes_to_keep_leave_no_run_behind(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the teacher has 3 classes[\s\S]*1 to 2"):
        start(tiny.recipe("teacher.top_k=3", losses="ce,kd"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_noticed_before_the_work(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(RemapError, match="will not fit on the disk"):
        start(tiny.recipe("teacher.cache=disk", losses="ce,kd"), tmp_path / "run")
    assert not list(tmp_path.glob("cache/**/data.bin"))


def test_auto_holds_outputs_in_memory_where_the_disk_has_no_room_for_what_lacks(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Any
) -> None:
    """With complete rows on it, a full disk serves; a loss that reads other outputs has them in memory."""
    progress = watch(lambda step: None)
    build_cache(tiny.recipe(losses="ce,kd"), progress)
    usage, room = shutil.disk_usage(tmp_path), remap.io.disk_space.require_space
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))

    def only_outputs(folder: Path, needed: int, what: str, **rest: Any) -> None:
        if "outputs" in what:  # runs need room, too
            room(folder, needed, what, **rest)

    monkeypatch.setattr(remap.io.disk_space, "require_space", only_outputs)
    progress.said.clear()
    start(tiny.recipe(losses="ce,kd"), tmp_path / "one", progress)
    assert any("teacher outputs on disk" in text for text in progress.said)
    progress.said.clear()
    start(tiny.recipe(losses="ce,kd,feature"), tmp_path / "two", progress)
    assert not any("teacher outputs on disk" in text for text in progress.said)


def test_without_room_in_memory_the_disk_is_taken(tiny: Any, tmp_path: Path, watch: Any) -> None:
    progress = watch(lambda step: None)
    start(tiny.recipe("data.memory_gib=0", losses="ce,kd"), tmp_path / "run", progress)
    assert any("teacher outputs on disk" in text for text in progress.said)
