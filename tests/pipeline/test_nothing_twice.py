"""How often images pass through each network: counted in the forward pass itself, by the width of the network."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from remap.cache.cache_folders import cache_root
from remap.cache.cache_listing import list_caches
from remap.cache.teacher_cache import FiniteViews, InMemory
from remap.data import sources
from remap.data.augmentation import Augmentation
from remap.data.fingerprint import Contents
from remap.network import Runner
from remap.pipeline.one_pass import OnePass
from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.remapping.targets import LOGITS, POOLED

TRAIN, VAL, STUDENT, TEACHER = 24, 9, 16, 24
ONE_EPOCH = ("train.epochs=1", "teacher.allow_weak=true")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Images by (width of the network, whether gradients are on); images that teach the shapes of outputs are black."""
    counts: Counter = Counter()
    forward = Runner.forward

    def count(self: Runner, images: Any, kept: Any = None) -> Any:
        if images.numel() and images.any():
            counts[self.model.embed_dim, torch.is_grad_enabled()] += len(images)
        return forward(self, images, kept)

    monkeypatch.setattr(Runner, "forward", count)
    monkeypatch.setattr("remap.pipeline.run.write_evidence", lambda *_: None)  # attention maps of some images
    return counts


@pytest.mark.parametrize(
    ("settings", "losses"),
    [
        ((), "ce,kd,attention,feature"),
        (("teacher.cache=disk",), "ce,kd,attention"),
        (("teacher.cache=disk", "teacher.cache_dtype=fp16", "teacher.top_k=2"), "ce,kd"),
        (("train.precision=bf16",), "ce,kd,feature"),
    ],
)
def test_one_pass_gives_features_outputs_and_the_next_run_reads_the_head(
    tiny: Any, tmp_path: Path, seen: Counter, settings: tuple[str, ...], losses: str, largest_difference: Any
) -> None:
    """The images of a pass over all, and of the evaluation; the same student as with a pass for each of both."""
    recipe = tiny.recipe(*ONE_EPOCH, *settings, losses=losses)
    first = start(recipe, tmp_path / "first")
    assert seen[TEACHER, False] == TRAIN + VAL and seen[TEACHER, True] == 0
    assert seen[STUDENT, False] == 2 * VAL, "before training and after it"
    (stored,) = [cache for cache in list_caches(cache_root()) if not cache.outputs]
    assert stored.key["method"] == "probe"
    seen.clear()
    second = start(recipe, tmp_path / "second")
    assert seen[TEACHER, False] == VAL + (0 if "teacher.cache=disk" in settings else TRAIN)
    assert largest_difference(second.student.trained, first.student.trained) == 0.0
    if "teacher.cache=disk" not in settings:
        twice = start(tiny.recipe(*ONE_EPOCH, *settings, "teacher.cache=off", losses=losses), tmp_path / "twice")
        assert largest_difference(twice.student.trained, first.student.trained) == 0.0


def test_the_last_batch_of_one_pass_need_not_be_full() -> None:
    """5 images in batches of 3, the third unreadable; source: the product of all features with the head's weights."""
    pooled, weight, good = torch.arange(20.0).reshape(5, 4), torch.eye(4)[:, :2], np.array([0, 1, 3, 4])
    rows, views = InMemory(), FiniteViews(SimpleNamespace(split=range(5)), Augmentation(), 0, 1)  # type: ignore[arg-type]
    rows.put(0, good, {POOLED: pooled[good]}, 5)
    runner = SimpleNamespace(bf16=False)
    teacher: Any = SimpleNamespace(
        logits=lambda x: x @ weight, number=0, device="cpu", runner=runner, at_once=0, exact=True
    )
    of_logits: Any = SimpleNamespace(targets=lambda signals, _: {LOGITS: signals.logits_BC})
    once = OnePass(teacher, of_logits, views, 3, rows)  # type: ignore[arg-type]
    found = once.outputs({LOGITS}, views, 3, 3, False)  # type: ignore[arg-type]
    assert found is not None and found.readable().tolist() == good.tolist()
    assert torch.equal(found.rows(good, 0)[LOGITS], pooled[good] @ weight)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (("train.accumulation=2",), 0),
        (("data.augment=shift", "data.views=1"), 0),
        (("teacher.calibrate=true",), 5),  # of 24, 5 fit the temperature and 19 the head, three batches filled up
    ],
)
def test_other_images_or_passes_need_a_pass_of_their_own(
    tiny: Any, tmp_path: Path, seen: Counter, settings: tuple[str, ...], more: int
) -> None:
    start(tiny.recipe(*ONE_EPOCH, *settings, losses="ce,kd"), tmp_path / "run")
    assert seen[TEACHER, False] == 2 * TRAIN + VAL + more


def test_a_baseline_and_a_tuned_teacher_are_evaluated_once(tiny: Any, tmp_path: Path, seen: Counter) -> None:
    """The teacher: untrained, after its epoch and its outputs. The student: untrained, after its and the baseline's."""
    settings = ("teacher.prepare=bitfit", "teacher.epochs=1", "teacher.lr=0.01", "baseline=true")
    start(tiny.recipe(*ONE_EPOCH, *settings, losses="ce,kd"), tmp_path / "run")
    assert seen[TEACHER, False] == 2 * VAL + TRAIN
    assert seen[STUDENT, False] == 3 * VAL


def test_images_without_labels_make_no_other_evaluation(tiny: Any, tmp_path: Path, seen: Counter) -> None:
    """The teacher and the baseline learn from labelled images alone, and are evaluated on the same ones as the run: as
    above, with the images without labels in the teacher's outputs."""
    shutil.copytree(Path(tiny.data) / "train", tmp_path / "more")
    settings = ("teacher.prepare=bitfit", "teacher.epochs=1", "teacher.lr=0.01", "baseline=true")
    start(tiny.recipe(*ONE_EPOCH, *settings, losses="ce,kd", unlabeled=str(tmp_path / "more")), tmp_path / "run")
    assert seen[TEACHER, False] == 2 * VAL + 2 * TRAIN
    assert seen[STUDENT, False] == 3 * VAL


def test_images_are_listed_and_decoded_once(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that learns without labels too, for its tuned teacher, itself and its baseline: a file a read."""
    listed, read, list_all, look = list[Any](), Counter[str](), sources.open_labeled, Contents.read
    monkeypatch.setattr(sources, "open_labeled", lambda *given: listed.append(given) or list_all(*given))
    monkeypatch.setattr(Contents, "read", lambda self, i: read.update([self.split.names[i]]) or look(self, i))
    shutil.copytree(Path(tiny.data) / "train", tmp_path / "more")
    words = {"losses": "ce,kd", "unlabeled": str(tmp_path / "more")}
    start(
        tiny.recipe(*ONE_EPOCH, "teacher.prepare=linear", "baseline=true", "teacher.cache=off", **words),
        tmp_path / "run",
    )
    assert len(listed) == 1 and len(read) == 2 * TRAIN + VAL and set(read.values()) == {1}


def test_cells_with_other_losses_share_the_head(tiny: Any, tmp_path: Path, seen: Counter) -> None:
    """The second one reads a signal that the pass for the head did not record."""
    shared = SharedResources()
    start(tiny.recipe(*ONE_EPOCH, losses="ce,kd"), tmp_path / "one", shared=shared)
    start(tiny.recipe(*ONE_EPOCH, losses="ce,kd,attention"), tmp_path / "two", shared=shared)
    assert seen[TEACHER, False] == TRAIN + VAL + TRAIN


@pytest.mark.parametrize("change", ["image", "class", "batch", "view"])
def test_a_probed_teacher_is_found_by_what_decides_it(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], change: str
) -> None:
    import shutil

    from PIL import Image

    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    said = {name: watch(lambda done: None) for name in ("first", "seed", "changed")}
    start(tiny.recipe(*ONE_EPOCH, data=str(data)), tmp_path / "first", said["first"])
    start(tiny.recipe(*ONE_EPOCH, data=str(data), seed=5), tmp_path / "seed", said["seed"])
    words: dict[str, Any] = {"data": str(data)}
    settings = {"batch": "train.batch_size=6", "view": "teacher.image_size=24"}.get(change, "train.lr=0.02")
    if change == "image":
        Image.new("RGB", (16, 16), "grey").save(next((data / "train").glob("*/*.png")))
    elif change == "class":
        for split in ("train", "val"):
            (data / split / "red").rename(data / split / "rot")
    start(tiny.recipe(*ONE_EPOCH, settings, **words), tmp_path / "changed", said["changed"])
    fetched = {
        name: any("was fitted on these images before" in line for line in one.said) for name, one in said.items()
    }
    assert fetched == {"first": False, "seed": True, "changed": False}
