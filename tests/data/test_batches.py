"""Micro-batches: the same for any number of processes, and the same after a restart."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from remap.data.augmentation import PRESETS
from remap.data.augmented_pixels import augmented_view
from remap.data.batches import Batch, batches
from remap.data.order import EpochPlan
from remap.data.views import ViewSource
from remap.progress import Silent
from remap.recipe.schema import DataSpec

PLAN = EpochPlan(
    seed=3, images=23, batch_size=6, accumulation=1, rank=0, processes=1, augmentation=PRESETS["shift_flip"]
)
STRONG = replace(PLAN, augmentation=PRESETS["strong"])
Noise = Callable[..., ViewSource]


def test_the_shares_of_a_step_add_up_to_one(noise: Noise) -> None:
    """Micro-batches of unequal size are weighted by their images, so that the mean is the global batch's."""
    source = noise(23)
    plans = [replace(PLAN, batch_size=8, processes=3, accumulation=1, rank=rank) for rank in range(3)]
    shares = [[batch.share for batch in batches(source, plan, 0)] for plan in plans]
    assert np.allclose(np.sum(shares, axis=0), 1.0) and shares[0][0] == 3 / 8 and shares[2][0] == 2 / 8


def collect(source: ViewSource, plan: EpochPlan, epoch: int, first: int = 0) -> list[Batch]:
    return list(batches(source, plan, epoch, first))


def joined(found: list[Batch]) -> tuple[torch.Tensor, ...]:
    return (
        torch.cat([b.images_BCHW for b in found]),
        torch.cat([b.labels_B for b in found]),
        torch.cat([torch.from_numpy(b.indices_B) for b in found]),
        torch.cat([b.keys_B for b in found]),
    )


def same(left: list[Batch], right: list[Batch]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(joined(left), joined(right), strict=True))


@pytest.mark.parametrize("memory", [1e9, 0.0])
def test_a_restart_at_any_step_gives_the_identical_tail(noise: Noise, memory: float) -> None:
    source = noise(23, memory=memory)
    source.load(Silent(), "images")
    for plan in (STRONG, replace(PLAN, accumulation=2), replace(PLAN, rank=1, processes=2)):
        for epoch in (0, 1):
            whole = collect(source, plan, epoch)
            for step in range(plan.steps):
                tail = collect(source, plan, epoch, step)
                assert len(tail) == len(whole) - step * plan.accumulation
                assert same(tail, whole[step * plan.accumulation :])
            assert collect(source, plan, epoch, plan.steps) == []


def test_one_batch_of_eight_is_two_of_four(noise: Noise) -> None:
    source, plan = noise(23), replace(PLAN, batch_size=8)
    one, two = collect(source, plan, 5), collect(source, replace(plan, accumulation=2), 5)
    assert [len(b.labels_B) for b in one] == [8, 8] and [len(b.labels_B) for b in two] == [4, 4, 4, 4]
    assert same(one, two)


def test_an_image_is_augmented_the_same_in_any_company(noise: Noise) -> None:
    source = noise(23)
    views = {}
    for plan in (STRONG, replace(STRONG, batch_size=23), replace(STRONG, batch_size=5, processes=2, rank=1)):
        for batch in batches(source, plan, 2):
            for index, image, key in zip(batch.indices_B, batch.images_BCHW, batch.keys_B, strict=True):
                first, first_key = views.setdefault(int(index), (image, key))
                assert torch.equal(first, image) and first_key == key
    assert len(views) == 23


def test_labels_and_pixels_belong_to_their_index(noise: Noise) -> None:
    source = noise(23)
    for batch in batches(source, replace(PLAN, augmentation=PRESETS["none"]), 0):
        assert batch.labels_B.tolist() == (batch.indices_B % 3).tolist()
        assert torch.equal(batch.images_BCHW, source.batch(batch.indices_B)[0])
        assert batch.images_BCHW.dtype == torch.uint8 and batch.keys_B.dtype == torch.int64


def test_an_unreadable_image_is_missing_and_moves_no_other(noise: Noise) -> None:
    whole, holed = noise(23, memory=0.0), noise(23, bad=(4, 11), memory=0.0)
    for full, some in zip(batches(whole, PLAN, 0), batches(holed, PLAN, 0), strict=True):
        kept = [i for i, index in enumerate(full.indices_B) if index not in (4, 11)]
        assert some.indices_B.tolist() == full.indices_B[kept].tolist()
        assert some.share == len(kept) / PLAN.batch_size
        assert torch.equal(some.images_BCHW, full.images_BCHW[kept]) and torch.equal(some.keys_B, full.keys_B[kept])


def by_index(found: list[Batch]) -> dict[int, torch.Tensor]:
    return {int(i): image for batch in found for i, image in zip(batch.indices_B, batch.images_BCHW, strict=True)}


def test_a_closed_list_of_views_is_replayed(noise: Noise) -> None:
    """One batch of all images, so that every epoch has each of them; without a list every epoch is a new view."""
    source, plan = noise(23), replace(PLAN, batch_size=23, views=3)
    epochs = [collect(source, plan, epoch) for epoch in range(7)]
    assert [found[0].view for found in epochs] == [0, 1, 2, 0, 1, 2, 0]
    assert [collect(source, replace(plan, views=None), epoch)[0].view for epoch in (0, 5)] == [0, 5]
    for epoch, found in enumerate(epochs):
        images, first = by_index(found), by_index(epochs[epoch % 3])
        assert all(torch.equal(images[i], first[i]) for i in range(23))
        again, good = augmented_view(source, PRESETS["shift_flip"], plan.seed, epoch % 3, range(23))
        assert good.tolist() == list(range(23)) and all(torch.equal(images[i], again[i]) for i in range(23))
    zero, one, two = (by_index(epochs[view]) for view in range(3))
    assert any(not torch.equal(zero[i], one[i]) for i in range(23)) and any((one[i] != two[i]).any() for i in range(23))
    open_ended = by_index(collect(source, replace(plan, views=None), 3))
    assert any(not torch.equal(zero[i], open_ended[i]) for i in range(23))
    keys = [dict(zip(f[0].indices_B.tolist(), f[0].keys_B.tolist(), strict=True)) for f in (epochs[0], epochs[3])]
    assert all(keys[0][i] != keys[1][i] for i in range(23)), "dropout is drawn anew, it is no part of the view"


def test_without_augmentation_there_is_one_view(noise: Noise) -> None:
    for views in (None, 4):
        plan = replace(PLAN, augmentation=PRESETS["none"], views=views)
        assert [batch.view for epoch in (0, 9) for batch in batches(noise(23), plan, epoch)] == [0] * (2 * plan.steps)


def test_a_closed_view_names_what_could_be_read(noise: Noise) -> None:
    whole, _ = augmented_view(noise(9), PRESETS["shift"], 3, 1, [8, 4, 0])
    images, good = augmented_view(noise(9, bad=(4,), memory=0.0), PRESETS["shift"], 3, 1, [8, 4, 0])
    assert good.tolist() == [8, 0] and torch.equal(images, whole[[0, 2]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1),
        ({"views": 5}, 1),
        ({"augment": "shift"}, 0),
        ({"augment": "shift", "views": 5}, 5),
        ({"augment": "shift_flip", "views": 5, "mixup": 0.1}, 0),
        ({"cutmix": 1.0}, 0),
    ],
)
def test_which_data_have_a_closed_list_of_views(options: dict[str, object], expected: int) -> None:
    spec = DataSpec(**options)
    assert spec.finite_views == expected
