"""Frozen features: computed once, and the student they give is the one without them. Source: the same run, unkept."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remap.cache.frozen_features import FrozenFeatures
from remap.pipeline import components, run
from remap.pipeline.run import start

CONFTEST = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough that a matrix product of few images adds up in another order than one of many."""
    folder = tmp_path_factory.mktemp("wide") / "student"
    CONFTEST["write_model"](folder, seed=5, embed_dim=192, depth=2, num_heads=3)
    return f"local-dir:{folder}"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many images went through the student's first layer, and how many features were kept."""
    counts = {"images": 0, "kept": 0}
    tuned, compute = components.tuned, FrozenFeatures.compute

    def watched(*args: Any) -> Any:
        network = tuned(*args)

        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts["images"] += len(inputs[0])

        network.model.patch_embed.register_forward_pre_hook(count)
        return network

    def counted(self: FrozenFeatures, *args: Any, **words: Any) -> None:
        compute(self, *args, **words)
        counts["kept"] += len(self.split)

    monkeypatch.setattr(components, "tuned", watched)
    monkeypatch.setattr(FrozenFeatures, "compute", counted)
    return counts


# Each seam in batches with a rest; the other shapes for a seam behind all blocks and one that spans them.
@pytest.mark.parametrize(
    ("method", "batch_size"),
    [
        *((method, 3) for method in ("linear", "mlp", "partial", "sidetune", "lst", "vqt")),
        *((method, size) for method in ("linear", "vqt") for size in (1, 8)),
    ],
)
def test_kept_features_give_the_student_of_the_whole_forward(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    largest_difference: Callable[..., float],
    wide: str,
    method: str,
    batch_size: int,
) -> None:
    """To the last bit: they are computed in batches of the shape of a training step."""
    recipe = tiny.recipe(f"train.batch_size={batch_size}", method=method, student=wide)
    kept = start(recipe, tmp_path / "kept")
    monkeypatch.setattr(run, "cache_features", lambda parts, progress, shared: {})
    whole = start(recipe, tmp_path / "whole")
    assert largest_difference(kept.student.tensors, whole.student.tensors) == 0
    assert kept.summary["final_losses"] == whole.summary["final_losses"]
    assert kept.summary["student"]["correct"] == whole.summary["student"]["correct"]


def test_the_frozen_part_runs_once_for_each_image(tiny: Any, tmp_path: Path, forwards: dict[str, int]) -> None:
    """24 training and 9 evaluation images, and one of zeros to measure the size, whatever the number of epochs.

    At the end come one whose operations are counted, and those that the report looks into.
    """
    start(tiny.recipe("train.epochs=3", method="linear", losses="ce", teacher=None), tmp_path / "run")
    reported = json.loads((tmp_path / "run" / "answers.json").read_text())["attention"]["images"]
    assert forwards == {"images": 24 + 9 + 1 + 1 + len(reported), "kept": 24 + 9} and 0 < len(reported) < 9


@pytest.mark.parametrize(
    ("settings", "why"),
    [(["data.memory_gib=0"], "not cached"), (["data.augment=shift"], None)],
    ids=["memory", "views"],
)
def test_features_are_not_kept_where_they_cannot_be(
    tiny: Any, tmp_path: Path, forwards: dict[str, int], watch: Callable[..., Any], settings: list[str], why: str | None
) -> None:
    progress = watch(lambda done: None)
    start(tiny.recipe(*settings, method="linear", losses="ce", teacher=None), tmp_path / "run", progress)
    assert forwards["kept"] == 0 and forwards["images"] > 24 + 9 + 1
    assert any(why in text for text in progress.said) if why else True


@pytest.mark.parametrize(
    ("settings", "teacher"), [(["teacher.cache=off"], None), ([], "ema")], ids=["asked each step", "running average"]
)
def test_a_teacher_that_looks_at_each_batch_gets_the_images(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    largest_difference: Callable[..., float],
    settings: list[str],
    teacher: str | None,
) -> None:
    """The student's frozen features are kept, so the student itself needs no images."""
    recipe = tiny.recipe(*settings, method="linear", losses="ce,kd", **({"teacher": teacher} if teacher else {}))
    kept = start(recipe, tmp_path / "kept")
    monkeypatch.setattr(run, "cache_features", lambda parts, progress, shared: {})
    whole = start(recipe, tmp_path / "whole")
    assert largest_difference(kept.student.tensors, whole.student.tensors) < 2e-3
    assert kept.summary["final_losses"] == pytest.approx(whole.summary["final_losses"], rel=1e-2, abs=1e-6)


def test_resuming_with_kept_features_is_exact(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], largest_difference: Callable[..., float]
) -> None:
    class Crash(Exception):
        pass

    def crash(done: int) -> None:
        if done == 4:
            raise Crash

    recipe = tiny.recipe("train.checkpoint_seconds=0", method="mlp")
    whole = start(recipe, tmp_path / "whole")
    with pytest.raises(Crash):
        start(recipe, tmp_path / "parted", watch(crash))
    parted = run.resume(tmp_path / "parted")
    assert largest_difference(whole.student.tensors, parted.student.tensors) == 0.0
    assert all(torch.isfinite(tensor).all() for tensor in whole.student.tensors.values())
