"""The order of images: complete, and the same for any number of processes."""

from dataclasses import replace

import pytest

from remap.data.augmentation import PRESETS
from remap.data.order import EpochPlan

PLAN = EpochPlan(
    seed=3, images=23, batch_size=6, accumulation=1, rank=0, processes=1, augmentation=PRESETS["shift_flip"]
)


def steps(plan: EpochPlan, epoch: int, first: int = 0) -> list[list[int]]:
    """Indices of each step of one process, its micro-batches joined."""
    micro = [indices.tolist() for indices, _ in plan.pairs(epoch, first)]
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


@pytest.mark.parametrize("batch", [6, 7])
def test_two_domains_take_turns_and_the_smaller_begins_again(batch: int) -> None:
    plan = replace(PLAN, images=23, batch_size=batch, source_images=18)
    for epoch in range(2):
        flat = sum(steps(plan, epoch), [])
        source, target = flat[0::2], flat[1::2]
        assert max(source) < 18 <= min(target) and len(flat) == 23 // batch * batch
        assert len(set(source)) == len(source)  # 18 images suffice
        # Each pass over the five others is complete before the next begins.
        assert all(len(set(target[start : start + 5])) == len(target[start : start + 5]) for start in range(0, 11, 5))
        assert steps(plan, epoch, 1) == steps(plan, epoch)[1:]
    # Source of the share: half of the images of a batch, and of two batches of an odd size.
    assert plan.labeled_share(18 / 23) == 0.5
    ranks = [replace(plan, rank=rank, processes=2) for rank in (0, 1)]
    together = [sum(parts, []) for parts in zip(*(steps(one, 0) for one in ranks), strict=True)]
    assert together == steps(plan, 0)
