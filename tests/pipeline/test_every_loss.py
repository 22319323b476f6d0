"""Every loss trains a student of each kind of method beside the labels; very different models meet in one command."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.remapping import LOSSES

TEACHING = [row.name for row in LOSSES if row.category not in ("labels", "domains")]


@pytest.fixture(scope="module")
def bench() -> SharedResources:
    """One teacher for all these runs."""
    return SharedResources()


# Prompts, which every loss must cut from tokens and maps; the other two with the losses in turn.
@pytest.mark.parametrize(
    ("loss", "method"),
    [
        *((loss, "vpt_deep") for loss in TEACHING),
        *((loss, ("lora", "full")[number % 2]) for number, loss in enumerate(TEACHING)),
    ],
)
def test_a_loss_and_a_method(tiny: Any, tmp_path: Path, bench: SharedResources, loss: str, method: str) -> None:
    recipe = tiny.recipe("train.epochs=1", "train.lr=0.001", method=method, losses=f"ce,{loss}")
    result = start(recipe, tmp_path / "run", shared=bench)
    losses = result.summary["final_losses"]
    assert set(losses) == {"loss", "ce", loss}
    assert all(math.isfinite(value) for value in losses.values())
    by_hand = losses["ce"] + LOSSES.row(loss).weight * losses[loss]
    assert losses["loss"] == pytest.approx(by_hand, rel=1e-5)


# Options that decide what is taken from the teacher.
OTHER_TARGETS = (
    "losses.tokens.normalize=phi_s",
    "losses.tokens.layers=uniform",
    "losses.tokens.prefix=class",
    "losses.feature.normalize=standard",
    "losses.mgd.masked=channels",
    "losses.attention.heads=each",
    "losses.attention_cls.heads=mean",
)


@pytest.mark.parametrize("options", [(), OTHER_TARGETS], ids=["defaults", "other targets"])
def test_cached_and_online_outputs_train_the_same_bits(
    tiny: Any, tmp_path: Path, largest_difference: Any, options: tuple[str, ...]
) -> None:
    """All losses at once, so that each works on the weights; in batches that the cache was not computed in."""
    words = {"method": "lora", "losses": ",".join(["ce", *TEACHING])}
    settings = ("train.epochs=2", "train.lr=0.001", "train.batch_size=7", *options)
    cached, online = (
        start(tiny.recipe(*settings, f"teacher.cache={cache}", **words), tmp_path / cache)
        for cache in ("memory", "off")
    )
    assert set(TEACHING) < set(online.summary["final_losses"])
    assert cached.summary["final_losses"] == online.summary["final_losses"]
    assert largest_difference(cached.student.trained, online.student.trained) == 0.0


def test_statistics_are_those_of_the_images_as_they_are(tiny: Any, tmp_path: Path, largest_difference: Any) -> None:
    """Of a teacher whose outputs of augmented views are cached, too: as of one that runs in every step."""
    views = ("data.augment=shift_flip", "data.views=2", "losses.feature.normalize=standard")
    cached, online = (
        start(tiny.recipe("train.epochs=1", *views, f"teacher.cache={cache}", losses="ce,feature"), tmp_path / cache)
        for cache in ("memory", "off")
    )
    assert largest_difference(cached.student.trained, online.student.trained) == 0.0


def test_patch_14_with_registers_and_rotation_teaches_patch_16_with_prompts(
    tiny: Any, tmp_path: Path, model_folder: Callable[..., str]
) -> None:
    rotary = {"img_size": 70, "patch_size": 14, "embed_dim": 48, "depth": 3, "num_heads": 3}
    plain = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    words = {
        "teacher": model_folder("vit_small_patch16_dinov3", rotary, 70),
        "student": model_folder("vit_tiny_patch16_224", plain, 64),
        "method": "vpt_deep",
        "losses": "ce,kd,attention,attention_cls,relations,tokens,gram,feature",
    }
    result = start(tiny.recipe("train.epochs=1", "teacher.allow_weak=true", **words), tmp_path / "run")
    assert all(math.isfinite(value) for value in result.summary["final_losses"].values())
    assert result.summary["final_losses"]["attention"] > 0 < result.summary["final_losses"]["tokens"]
