"""Dropout keyed by sample. Expected values: the binomial distribution of independent draws, and torch's dropout."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from remap.tuning.dropout import SampleDropout, keep_mask, site_offset


def keys(count: int, seed: int = 0) -> Tensor:
    """int64 keys over the whole range, as the training loop draws them."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def sigmas(hits: int, draws: int, probability: float) -> float:
    """How far a count is from a binomial's mean, in its standard deviations."""
    return (hits - draws * probability) / math.sqrt(draws * probability * (1 - probability))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["random", "counting"])
def test_keep_rate_is_within_four_sigma(p: float, kind: str) -> None:
    chosen = keys(256) if kind == "random" else torch.arange(256)
    mask = keep_mask(chosen, 2000, p, site_offset(3))
    assert abs(sigmas(int(mask.sum()), mask.numel(), 1 - p)) < 4
    # Each row and each column on its own: 5 sigma, as 2256 of them are looked at.
    assert max(abs(sigmas(int(n), 2000, 1 - p)) for n in mask.sum(1)) < 5
    assert max(abs(sigmas(int(n), 256, 1 - p)) for n in mask.sum(0)) < 5.5


def test_a_rows_mask_depends_neither_on_its_batch_nor_on_order() -> None:
    chosen, x = keys(8), torch.ones(8, 5, 6)
    dropout = SampleDropout(0.5, site=1).train()

    def run(rows: Tensor) -> Tensor:
        dropout.keys_B = chosen[rows]
        return dropout(x[rows])

    together, backwards = run(torch.arange(8)), torch.arange(7, -1, -1)
    assert torch.equal(run(backwards), together[backwards])
    for row in range(8):
        assert torch.equal(run(torch.tensor([row]))[0], together[row])


def test_a_mask_repeats_whatever_the_global_generator_does() -> None:
    dropout, x = SampleDropout(0.5, site=1).train(), torch.ones(4, 50)
    dropout.keys_B = keys(4)
    first = dropout(x)
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(dropout(x), first)


def test_sites_and_keys_give_uncorrelated_masks() -> None:
    """Independent fair masks agree in half of the places."""
    chosen = torch.cat([keys(4), torch.arange(4)])
    masks = [keep_mask(chosen, 4000, 0.5, site_offset(site)) for site in (0, 1, 2, 11)]
    rows = torch.cat(masks)
    for first in range(len(rows)):
        for second in range(first):
            agreements = int((rows[first] == rows[second]).sum())
            assert abs(sigmas(agreements, 4000, 0.5)) < 5, (first, second)


def test_neighbouring_elements_are_uncorrelated() -> None:
    mask = keep_mask(keys(64), 1000, 0.5, site_offset(0))
    for lag in (1, 2, 32, 768):
        pairs = mask[:, lag:] == mask[:, :-lag]
        assert abs(sigmas(int(pairs.sum()), pairs.numel(), 0.5)) < 4


def test_without_keys_it_is_torchs_dropout() -> None:
    dropout, x = SampleDropout(0.3).train(), torch.randn(4, 10)
    torch.manual_seed(5)
    found = dropout(x)
    torch.manual_seed(5)
    assert torch.equal(found, F.dropout(x, 0.3, training=True))


@pytest.mark.parametrize("with_keys", [False, True])
def test_eval_and_zero_probability_are_the_identity(with_keys: bool) -> None:
    x = torch.randn(4, 10)
    for dropout in (SampleDropout(0.3).eval(), SampleDropout(0.0).train()):
        dropout.keys_B = keys(4) if with_keys else None
        assert torch.equal(dropout(x), x)


def test_expectation_is_preserved() -> None:
    """Kept elements are 1/(1-p), dropped are 0; the mean of n draws is 1 within 4 * sqrt(p / (1-p) / n)."""
    p, x = 0.3, torch.ones(500, 400)
    dropout = SampleDropout(p, site=2).train()
    dropout.keys_B = keys(500)
    out = dropout(x)
    assert torch.allclose(out.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert abs(out.mean() - 1) < 4 * math.sqrt(p / (1 - p) / x.numel())


def test_gradient_flows_through_kept_elements_only() -> None:
    x = torch.randn(3, 20, requires_grad=True)
    dropout = SampleDropout(0.5).train()
    dropout.keys_B = keys(3)
    out = dropout(x)
    out.sum().backward()
    assert torch.equal(x.grad, 2.0 * (out != 0))


def test_keys_of_another_batch_are_an_error() -> None:
    dropout = SampleDropout(0.5).train()
    dropout.keys_B = keys(3)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        dropout(torch.ones(4, 10))


def test_bfloat16_stays_bfloat16() -> None:
    dropout = SampleDropout(0.5).train()
    dropout.keys_B = keys(3)
    assert dropout(torch.ones(3, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16
