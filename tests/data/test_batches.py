"""The order of images: complete, the same for any number of processes, and the same after a restart."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from remap.data import keyed_random
from remap.data.batches import Batch, EpochPlan, augmented, augmented_view, batches
from remap.data.views import ViewSource
from remap.progress import Silent
from remap.recipe.schema import DataSpec

PLAN = EpochPlan(seed=3, images=23, batch_size=6, accumulation=1, rank=0, processes=1, augment="shift_flip")
Noise = Callable[..., ViewSource]


def steps(plan: EpochPlan, epoch: int, first: int = 0) -> list[list[int]]:
    """Indices of each step of one process, its micro-batches joined."""
    micro = [part.tolist() for part in plan.micro_batches(epoch, first)]
    size = plan.accumulation
    return [sum(micro[i : i + size], []) for i in range(0, len(micro), size)]


@pytest.mark.parametrize(("images", "batch"), [(23, 6), (24, 6), (6, 6), (5, 6), (1, 6), (7, 1)])
def test_an_epoch_sees_each_image_at_most_once_in_full_batches(images: int, batch: int) -> None:
    plan = replace(PLAN, images=images, batch_size=batch)
    for epoch in range(3):
        seen = sum(steps(plan, epoch), [])
        expected = images // batch * batch or images  # floor(n/b)*b, and a split smaller than a batch is one step
        assert len(seen) == len(set(seen)) == expected and set(seen) <= set(range(images))
        assert [len(step) for step in steps(plan, epoch)] == [min(batch, images)] * plan.steps


def test_what_an_epoch_leaves_out_differs_from_epoch_to_epoch() -> None:
    left = [frozenset(range(23)) - set(sum(steps(PLAN, epoch), [])) for epoch in range(10)]
    assert all(len(rest) == 23 % 6 for rest in left) and len(set(left)) > 5


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize(("images", "batch"), [(23, 6), (25, 8), (4, 6)])
def test_any_number_of_processes_makes_the_same_global_batch(
    processes: int, accumulation: int, images: int, batch: int
) -> None:
    single = replace(PLAN, images=images, batch_size=batch)
    ranks = [replace(single, rank=r, processes=processes, accumulation=accumulation) for r in range(processes)]
    for epoch in (0, 4):
        together = [sum(parts, []) for parts in zip(*(steps(plan, epoch) for plan in ranks), strict=True)]
        assert together == steps(single, epoch)


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
    for plan in (PLAN, replace(PLAN, accumulation=2), replace(PLAN, rank=1, processes=2)):
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
    for plan in (PLAN, replace(PLAN, batch_size=23), replace(PLAN, batch_size=5, processes=2, rank=1)):
        for batch in batches(source, plan, 2):
            for index, image, key in zip(batch.indices_B, batch.images_BCHW, batch.keys_B, strict=True):
                first, first_key = views.setdefault(int(index), (image, key))
                assert torch.equal(first, image) and first_key == key
    assert len(views) == 23


def test_labels_and_pixels_belong_to_their_index(noise: Noise) -> None:
    source = noise(23)
    for batch in batches(source, replace(PLAN, augment="none"), 0):
        assert batch.labels_B.tolist() == (batch.indices_B % 3).tolist()
        assert torch.equal(batch.images_BCHW, source.batch(batch.indices_B)[0])
        assert batch.images_BCHW.dtype == torch.uint8 and batch.keys_B.dtype == torch.int64


def test_an_unreadable_image_is_missing_and_moves_no_other(noise: Noise) -> None:
    whole, holed = noise(23, memory=0.0), noise(23, bad=(4, 11), memory=0.0)
    for full, some in zip(batches(whole, PLAN, 0), batches(holed, PLAN, 0), strict=True):
        kept = [i for i, index in enumerate(full.indices_B) if index not in (4, 11)]
        assert some.indices_B.tolist() == full.indices_B[kept].tolist() and some.share == full.share
        assert torch.equal(some.images_BCHW, full.images_BCHW[kept]) and torch.equal(some.keys_B, full.keys_B[kept])


def by_hand(image_CHW: np.ndarray, kind: str, draws: np.ndarray) -> np.ndarray:
    """One picture, pixel by pixel: mirror if the third draw is below one half, then move within a black frame."""
    _, height, width = image_CHW.shape
    pad = height // 8
    down, right = (int(draw * (2 * pad + 1)) - pad for draw in draws[:2])
    result = np.zeros_like(image_CHW)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y + down, x + right
            if 0 <= from_y < height and 0 <= from_x < width:
                mirrored = kind == "shift_flip" and draws[2] < 0.5
                result[:, y, x] = image_CHW[:, from_y, width - 1 - from_x if mirrored else from_x]
    return result


@pytest.mark.parametrize("kind", ["none", "shift", "shift_flip"])
@pytest.mark.parametrize("size", [7, 8, 17])
def test_augmentation_pixel_by_pixel(kind: str, size: int) -> None:
    images = torch.randint(0, 256, (12, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = keyed_random.uniform(1, 0, np.arange(12), 3)
    draws[0], draws[1] = (0.0, 0.0, 0.0), (1 - 2**-53, 1 - 2**-53, 0.5)
    found = augmented(images, kind, draws)
    expected = [
        image if kind == "none" else by_hand(image, kind, d) for image, d in zip(images.numpy(), draws, strict=True)
    ]
    assert found.dtype == torch.uint8 and (found.numpy() == np.stack(expected)).all()


def test_shifts_reach_both_ends_and_half_the_pictures_are_mirrored(noise: Noise) -> None:
    """An eighth of 16 is 2, so five places each way: of 4000 draws 800 each (deviation 25), 2000 mirrored (32)."""
    draws = keyed_random.uniform(0, 0, np.arange(4000), 3)
    for column in draws.T[:2]:
        assert np.abs(np.bincount((column * 5).astype(int)) - 800).max() < 5 * 25.3
    assert abs((draws[:, 2] < 0.5).sum() - 2000) < 5 * 31.7
    assert augmented(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), "shift", draws[:0]).shape == (0, 3, 16, 16)


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
        again, good = augmented_view(source, "shift_flip", plan.seed, epoch % 3, range(23))
        assert good.tolist() == list(range(23)) and all(torch.equal(images[i], again[i]) for i in range(23))
    zero, one, two = (by_index(epochs[view]) for view in range(3))
    assert any(not torch.equal(zero[i], one[i]) for i in range(23)) and any((one[i] != two[i]).any() for i in range(23))
    open_ended = by_index(collect(source, replace(plan, views=None), 3))
    assert any(not torch.equal(zero[i], open_ended[i]) for i in range(23))
    keys = [dict(zip(f[0].indices_B.tolist(), f[0].keys_B.tolist(), strict=True)) for f in (epochs[0], epochs[3])]
    assert all(keys[0][i] != keys[1][i] for i in range(23)), "dropout is drawn anew, it is no part of the view"


def test_without_augmentation_there_is_one_view(noise: Noise) -> None:
    for views in (None, 4):
        plan = replace(PLAN, augment="none", views=views)
        assert [batch.view for epoch in (0, 9) for batch in batches(noise(23), plan, epoch)] == [0] * (2 * plan.steps)


def test_a_closed_view_names_what_could_be_read(noise: Noise) -> None:
    whole, _ = augmented_view(noise(9), "shift", 3, 1, [8, 4, 0])
    images, good = augmented_view(noise(9, bad=(4,), memory=0.0), "shift", 3, 1, [8, 4, 0])
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
