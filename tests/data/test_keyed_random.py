"""Keyed numbers against published values and the closed forms of uniform numbers."""

import numpy as np
import pytest

from remap.data import keyed_random

N = 20_000


# SplitMix64's first outputs: for 0 in the Java and C references (Vigna, prng.di.unimi.it/splitmix64.c), for
# 1234567 in Rosetta Code, "Pseudo-random numbers/Splitmix64".
@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (
            1234567,
            [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
        ),
    ],
)
def test_splitmix64_gives_the_published_outputs(seed: int, outputs: list[int]) -> None:
    with np.errstate(over="ignore"):
        states = np.uint64(seed) + np.arange(len(outputs), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        assert keyed_random._splitmix(states).tolist() == outputs


def test_uniform_numbers_have_the_moments_and_the_shape_of_uniform_numbers() -> None:
    """Mean 1/2, variance 1/12 (five standard errors), Kolmogorov's bound 2.23/sqrt(n) (chance below 1e-4)."""
    draws = keyed_random.uniform(7, 3, np.arange(N), 3)
    assert draws.shape == (N, 3) and draws.min() >= 0 and draws.max() < 1
    for column in draws.T:
        assert abs(column.mean() - 1 / 2) < 5 * (1 / 12 / N) ** 0.5
        assert abs(column.var() - 1 / 12) < 5 * (1 / 180 / N) ** 0.5
        steps = np.sort(column) - np.arange(N) / N
        assert max(steps.max(), 1 / N - steps.min()) < 2.23 / N**0.5


STREAMS = (keyed_random.ORDER, keyed_random.AUGMENT, keyed_random.DROPOUT, keyed_random.SPLIT, keyed_random.STEP)


def test_seeds_epochs_streams_and_draws_are_uncorrelated() -> None:
    """The correlation of n independent pairs has standard deviation 1/sqrt(n); six of them bound all pairs."""
    rows = [
        keyed_random.uniform(seed, epoch, np.arange(N), 1, stream)[:, 0]
        for seed in (0, 1, 2)
        for epoch in (0, 1)
        for stream in STREAMS
    ]
    rows += list(keyed_random.uniform(0, 5, np.arange(N), 3).T)
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 6 / N**0.5
    shifted = np.corrcoef(rows[0][1:], rows[0][:-1])[0, 1]
    assert abs(shifted) < 6 / N**0.5


def test_no_two_places_share_keys() -> None:
    """Seeds below and streams are both small numbers: seed 1 of stream 2 must not be seed 2 of stream 1."""
    index = np.arange(4)
    seen = {
        tuple(keyed_random.keys(seed, epoch, index, stream).tolist())
        for seed in range(8)
        for epoch in range(8)
        for stream in STREAMS
    }
    assert len(seen) == 8 * 8 * len(STREAMS)
    assert len(np.unique(keyed_random.keys(2**32 - 1, 0, np.arange(N), keyed_random.ORDER))) == N


def test_an_image_has_its_numbers_whatever_the_batch() -> None:
    everything = keyed_random.uniform(3, 2, np.arange(50), 3)
    chosen = np.asarray([41, 3, 3, 17])
    assert (keyed_random.uniform(3, 2, chosen, 3) == everything[chosen]).all()
    assert (keyed_random.uniform(3, 2, chosen, 2) == everything[chosen, :2]).all()
    assert (keyed_random.keys(3, 2, chosen, 1) == keyed_random.keys(3, 2, np.arange(50), 1)[chosen]).all()


@pytest.mark.parametrize("count", [0, 1, 2, 97])
def test_permutations_are_permutations_and_differ(count: int) -> None:
    orders = [keyed_random.permutation(seed, epoch, count) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len({tuple(order) for order in orders}) == (6 if count > 2 else len({tuple(order) for order in orders}))


def test_every_image_is_equally_likely_in_first_place() -> None:
    """600 orders of 6 images: 100 each, standard deviation sqrt(600 * 1/6 * 5/6) = 9.1."""
    first = [keyed_random.permutation(0, epoch, 6)[0] for epoch in range(600)]
    assert np.abs(np.bincount(first, minlength=6) - 100).max() < 5 * 9.2


def test_step_seeds_fit_torch_and_are_not_dropouts_keys() -> None:
    seeds = [keyed_random.step_seed(0, epoch, step) for epoch in range(4) for step in range(50)]
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] != int(keyed_random.keys(0, 0, np.asarray([0]), keyed_random.DROPOUT)[0] >> np.uint64(1))
