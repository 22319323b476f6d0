"""mixup and CutMix: shares against their closed forms, pixels one by one, and nothing that depends on processes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from remap.data import keyed_random
from remap.data.augmentation import PRESETS
from remap.data.augmented_pixels import augmented_view
from remap.data.batches import Batch, batches
from remap.data.mixing import DRAWS, mix
from remap.data.order import EpochPlan
from remap.data.views import ViewSource
from remap.progress import Silent
from remap.remapping.labels import Labels

Noise = Callable[..., ViewSource]
PLAN = EpochPlan(
    seed=3,
    images=23,
    batch_size=7,
    accumulation=1,
    rank=0,
    processes=1,
    augmentation=PRESETS["shift_flip"],
    mixup=0.8,
    cutmix=1.0,
)


def flat(value: int, count: int, size: int = 8) -> torch.Tensor:
    return torch.full((count, 3, size, size), value, dtype=torch.uint8)


def draws(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, DRAWS))


def at(quantile: list[float], y: float = 0.5, x: float = 0.5) -> np.ndarray:
    """Draws that mix for certain, with these quantiles of Beta and this centre of the box."""
    return np.asarray([[0.0, 0.0, q, y, x] for q in quantile])


@pytest.mark.parametrize("a", [0.2, 1.0, 3.0])
def test_shares_have_the_mean_and_variance_of_beta(a: float) -> None:
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)); the fourth central moment is at most 1/16."""
    count = 20000
    share = mix(flat(0, count, 1), flat(9, count, 1), draws(count), mixup=a, cutmix=0.0, chance=1.0)[1].double()
    variance = 1 / (4 * (2 * a + 1))
    assert abs(share.mean() - 0.5) < 5 * (variance / count) ** 0.5
    assert abs(share.var() - variance) < 5 * (1 / 16 / count) ** 0.5
    assert share.min() >= 0 and share.max() <= 1


def test_shares_are_the_quantiles_where_these_have_a_closed_form() -> None:
    """Beta(1, 1) is uniform; Beta(1/2, 1/2) is the arcsine law; Beta(2, 2) has the distribution 3 x^2 - 2 x^3."""
    u = np.linspace(0.0, 1.0, 41)[:-1]
    share = {
        a: mix(flat(0, 40), flat(9, 40), at(list(u)), mixup=a, cutmix=0.0, chance=1.0)[1].double().numpy()
        for a in (1.0, 0.5, 2.0)
    }
    assert np.allclose(share[1.0], u, atol=1e-6)
    assert np.allclose(share[0.5], np.sin(np.pi * u / 2) ** 2, atol=1e-6)
    assert np.allclose(3 * share[2.0] ** 2 - 2 * share[2.0] ** 3, u, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "other", "quantile", "expected"),
    [
        (200, 100, 0.25, 125),
        (100, 200, 0.25, 175),
        (0, 255, 0.0, 255),
        (7, 7, 0.375, 7),
        (1, 2, 0.5, 2),
        (2, 3, 0.5, 2),
    ],
)
def test_mixup_of_two_flat_images(own: int, other: int, quantile: float, expected: int) -> None:
    """With a = 1 the share is the quantile itself; halves are rounded to the even number."""
    before = flat(own, 1)
    found, share = mix(before, flat(other, 1), at([quantile]), mixup=1.0, cutmix=0.0, chance=1.0)
    assert found.dtype == torch.uint8 and (found == expected).all() and share.tolist() == [quantile]
    assert (before == own).all(), "the caller's images are left alone"


@pytest.mark.parametrize("size", [1, 7, 8, 17])
@pytest.mark.parametrize("a", [0.3, 1.0])
def test_the_share_of_cutmix_is_counted_in_pixels(size: int, a: float) -> None:
    found, share = mix(flat(0, 300, size), flat(255, 300, size), draws(300), mixup=0.0, cutmix=a, chance=1.0)
    own = (found == 0).double().mean((2, 3))
    assert set(found.unique().tolist()) <= {0, 255}
    assert torch.equal(own.float(), share[:, None].expand(-1, 3))
    for picture in found[:, 0] == 255:  # a box: every row that has any of it has the same part of it
        rows = picture[picture.any(1)]
        assert bool((rows == rows[:1]).all())
        edges = torch.nn.functional.pad(rows[:1].int(), (1, 1)).diff().abs().sum()
        assert edges in (0, 2)


@pytest.mark.parametrize(
    ("quantile", "y", "x", "rows", "columns"),
    [
        (0.75, 0.5, 0.5, (2, 6), (2, 6)),  # side 8 sqrt(1 - 0.75) = 4
        (0.75, 0.0, 0.0, (0, 2), (0, 2)),
        (0.75, 0.25, 0.875, (0, 4), (5, 8)),
        (0.0, 0.5, 0.5, (0, 8), (0, 8)),
        (1 - 2**-53, 0.5, 0.5, (4, 4), (4, 4)),
    ],
)
def test_the_box_of_cutmix(
    quantile: float, y: float, x: float, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    found, share = mix(flat(1, 1), flat(2, 1), at([quantile], y, x), mixup=0.0, cutmix=1.0, chance=1.0)
    expected = flat(1, 1)
    expected[:, :, slice(*rows), slice(*columns)] = 2
    area = (rows[1] - rows[0]) * (columns[1] - columns[0])
    assert torch.equal(found, expected) and share.tolist() == [1 - area / 64]


def test_pairs_draw_whether_and_how_they_are_mixed() -> None:
    """Counts of 4,000 within five standard deviations of the binomial."""
    count = 4000
    found, share = mix(flat(0, count), flat(200, count), draws(count), mixup=1.0, cutmix=1.0, chance=0.7)
    untouched = (found == 0).all((1, 2, 3))
    boxed = ~untouched & ((found == 0) | (found == 200)).all((1, 2, 3))
    assert bool((share[untouched] > 0.99).all()), "mixed by a share that rounds away, or not at all"
    # Besides those not drawn, mixup changes nothing where 200 (1 - share) < 1/2, and CutMix where no pixel is boxed.
    left = int((share == 1.0).sum())
    assert left >= int(0.3 * count) - 5 * 29
    assert abs(int(boxed.sum()) / int((~untouched).sum()) - 0.5) < 0.06
    for chance, which in ((0.0, 0), (1.0, count)):
        share = mix(flat(0, count, 1), flat(200, count, 1), draws(count), mixup=1.0, cutmix=0.0, chance=chance)[1]
        assert int((share < 1.0).sum()) == which
    share = mix(flat(0, count, 1), flat(200, count, 1), draws(count), mixup=1.0, cutmix=0.0, chance=0.7)[1]
    assert abs(int((share < 1.0).sum()) - 0.7 * count) < 5 * (count * 0.21) ** 0.5


def whole_steps(source: ViewSource, plan: EpochPlan, epoch: int) -> list[list[torch.Tensor]]:
    """Each step's global batch: images, labels, others, shares, indices; put together from all processes."""
    found = [list(batches(source, replace(plan, rank=rank), epoch)) for rank in range(plan.processes)]
    steps = []
    for step in range(plan.steps):
        parts: list[Batch] = [
            batch for rank in found for batch in rank[step * plan.accumulation : (step + 1) * plan.accumulation]
        ]
        rows = [(b.images_BCHW, b.labels_B, b.other_B, b.share_B, torch.from_numpy(b.indices_B)) for b in parts]
        steps.append([torch.cat(column) for column in zip(*rows, strict=True)])
    return steps


@pytest.mark.parametrize("memory", [1e9, 0.0])
@pytest.mark.parametrize("bad", [(), (4, 11)])
@pytest.mark.parametrize("batch_size", [7, 8, 23, 64])
def test_any_number_of_processes_mixes_the_same_images(
    noise: Noise, batch_size: int, bad: tuple[int, ...], memory: float
) -> None:
    source, single = noise(23, bad=bad, memory=memory), replace(PLAN, batch_size=batch_size)
    expected = whole_steps(source, single, 1)
    assert any(bool((shares < 1.0).any()) for *_, shares, _ in expected)
    for processes, accumulation in ((1, 2), (2, 1), (3, 1), (3, 2)):
        parted = whole_steps(source, replace(single, processes=processes, accumulation=accumulation), 1)
        for one, other in zip(expected, parted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ways", [{"mixup": 0.5, "cutmix": 0.0}, {"mixup": 0.0, "augmentation": PRESETS["none"]}])
def test_neighbours_of_the_global_batch_are_mixed_with_each_other(noise: Noise, ways: dict[str, Any]) -> None:
    """Partners are read from the order itself (place j with j xor 1), pixels are mixed again in NumPy."""
    source, plan = noise(23), replace(PLAN, **ways)
    order = keyed_random.permutation(plan.seed, 2, 23)
    for step, (images, labels, others, shares, indices) in enumerate(whole_steps(source, plan, 2)):
        chosen = order[step * 7 : step * 7 + 7]
        assert indices.tolist() == chosen.tolist() and labels.tolist() == (chosen % 3).tolist()
        seen = augmented_view(source, plan.augmentation, plan.seed, 2, chosen)[0].numpy()
        assert shares[6] == 1.0 and others[6] == labels[6] and (images[6].numpy() == seen[6]).all()
        for j in range(6):
            own, other, share = seen[j], seen[j ^ 1], shares[j].numpy()
            assert share == shares[j ^ 1].numpy()
            assert others[j] == (labels[j ^ 1] if share < 1 else labels[j])
            if plan.mixup:
                mixed = np.rint(own.astype(np.float32) * share + other.astype(np.float32) * (np.float32(1) - share))
                assert (images[j].numpy() == mixed).all()
            else:
                taken = (images[j].numpy() == other).all(0)
                assert ((images[j].numpy() == own).all(0) | taken).all()
                assert abs((~taken).mean() - share) < 1e-6


def test_an_unreadable_partner_leaves_an_image_as_it_is(noise: Noise) -> None:
    plan = replace(PLAN, batch_size=23, cutmix=0.0)
    (full,), (holed,) = whole_steps(noise(23), plan, 0), whole_steps(noise(23, bad=(4, 11)), plan, 0)
    order = keyed_random.permutation(plan.seed, 0, 23).tolist()
    kept = [j for j, index in enumerate(order) if index not in (4, 11)]
    alone = [j for j in kept if (j ^ 1) < 23 and order[j ^ 1] in (4, 11)]
    assert alone and holed[4].tolist() == [order[j] for j in kept]
    for place, j in enumerate(kept):
        if j not in alone:
            assert all(torch.equal(one[place], other[j]) for one, other in zip(holed, full, strict=True))
            continue
        view, _ = augmented_view(noise(23), PRESETS["shift_flip"], plan.seed, 0, [order[j]])
        assert torch.equal(holed[0][place], view[0]) and holed[3][place] == 1.0 and holed[2][place] == holed[1][place]


def test_a_batch_without_a_readable_image_is_empty(noise: Noise) -> None:
    (batch,) = batches(noise(4, bad=(0, 1, 2, 3), memory=0.0), replace(PLAN, images=4), 0)
    assert batch.images_BCHW.shape == (0, 3, 8, 8) and batch.share == 0.0
    assert len(batch.labels_B) == len(batch.other_B) == len(batch.share_B) == len(batch.indices_B) == 0


def test_each_epoch_mixes_anew_even_when_views_are_replayed(noise: Noise) -> None:
    source, plan = noise(23), replace(PLAN, batch_size=23, views=1, cutmix=0.0)
    shares = [frozenset(whole_steps(source, plan, epoch)[0][3].tolist()) - {1.0} for epoch in range(4)]
    assert all(len(one) == 11 for one in shares) and len(frozenset.union(*shares)) == 44


def test_without_mixing_there_are_no_others(noise: Noise) -> None:
    (batch, *_) = batches(noise(23), replace(PLAN, mixup=0.0, cutmix=0.0), 0)
    assert batch.other_B is None and batch.share_B is None


@pytest.mark.parametrize("chance", [1.0, 0.5])
@pytest.mark.parametrize("size", [3, 7, 20])
def test_the_mean_over_labelled_images_is_one_of_mixed_images_too(noise: Noise, chance: float, size: int) -> None:
    """Source: a loss of 1 for every image has a mean of 1; here over 4,200 images and more, a third labelled."""
    source = noise(60)
    source.load(Silent(), "images")
    source.split.labels[20:] = -1
    plan = replace(PLAN, images=60, batch_size=size, augmentation=PRESETS["none"], mix_probability=chance)
    means = [
        Labels(batch.labels_B, batch.other_B, batch.share_B, plan.labeled_share(20 / 60)).mean(torch.ones(size)).item()
        for epoch in range(70)
        for batch in batches(source, plan, epoch)
    ]
    assert abs(np.mean(means) - 1) < 4 * np.std(means) / len(means) ** 0.5 < 0.25
    assert replace(plan, mixup=0.0, cutmix=0.0).labeled_share(0.25) == 0.25 and plan.labeled_share(1.0) == 1.0


def test_a_pair_has_one_number_whichever_comes_first() -> None:
    one, other = np.meshgrid(np.asarray([0, 1, 2, 999, 2**31 - 1]), np.asarray([0, 1, 3, 2**31 - 1]))
    found = keyed_random.pairs(one.ravel(), other.ravel())
    assert (found == keyed_random.pairs(other.ravel(), one.ravel())).all()
    sets = [frozenset(pair) for pair in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)]
    assert len(set(found.tolist())) == len(set(sets)) and found.dtype == np.int64 and (found >= 0).all()
