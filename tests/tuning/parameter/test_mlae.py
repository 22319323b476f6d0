"""MLAE against the untouched timm model in float64 with the paper's weights written into it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from remap.tuning.dropout import keep_mask, site_offset

Weights = dict[str, Tensor]
MARK = ".remap_mlae."


def changed(weights: Weights, state: Weights, mask: Callable[[int], Tensor] = lambda site: torch.ones(8)) -> None:
    """W + sum_k m_k lambda_k b_k a_k^T, expert by expert."""
    layers = sorted({key.split(MARK)[0] for key in state if MARK in key})
    for site, layer in enumerate(layers):
        a, b, strength = (state[f"{layer}{MARK}{name}"] for name in ("down", "up", "coefficients"))
        for k in range(len(strength)):
            weights[f"{layer}.weight"] += mask(site)[k] * strength[k] * torch.outer(b[:, k], a[k])


@pytest.mark.parametrize("variant", ["plain", "eva02", "swin", "convnext"])
def test_equals_weights_changed_in_closed_form(shaken: Callable, plain_logits: Callable, variant: str) -> None:
    _, state, logits = shaken("mlae", variant)
    assert torch.allclose(logits, plain_logits(variant, lambda weights: changed(weights, state)), rtol=0, atol=1e-10)
    assert not torch.allclose(logits, plain_logits(variant), atol=1e-3)


def test_training_masks_whole_experts_of_every_image(
    shaken: Callable, plain_logits: Callable, tools: SimpleNamespace
) -> None:
    """The mask of an image is the keyed one of the dropout module, divided by the share that stays."""
    attached, state, _ = shaken("mlae", "plain", dropout=0.25)
    keys = torch.tensor([11, 12])
    attached.train()
    attached.set_sample_keys(keys)
    logits = attached.model(tools.images().double())
    for row in range(2):
        masks = [keep_mask(keys, 8, 0.25, site_offset(site))[row].double() / 0.75 for site in range(3)]
        assert 0 < sum(float(mask.sum()) for mask in masks) < 32, "some are masked, not all"
        expected = plain_logits("plain", lambda weights, masks=masks: changed(weights, state, masks.__getitem__))
        assert torch.allclose(logits[row], expected[row], rtol=0, atol=1e-10)


def test_count(count: Callable[..., int]) -> None:
    """Rank-8 LoRA on fused q, k, v, and a coefficient for each expert."""
    assert count("mlae") == 294_912 + 12 * 8
