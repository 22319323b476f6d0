"""KronA against the untouched timm model in float64 with W + A (x) B written into its weights, element by element."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from remap.errors import BackboneError
from remap.tuning.attached import Attached

Weights = dict[str, Tensor]


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("plain", {"scale": 1.0}),
        ("plain", {"factor": 2, "scale": 3.0}),
        ("beit", {"scale": 1.0}),
        ("eva02", {"scale": 0.5}),
        ("swin", {"scale": 1.0}),
    ],
)
def test_equals_weights_changed_in_closed_form(
    shaken: Callable, plain_logits: Callable, variant: str, options: dict
) -> None:
    attached, state, logits = shaken("krona", variant, **options)

    def change(weights: Weights) -> None:
        for block in attached.anatomy.blocks:
            q, _, v = weights[f"{block.block}.attn.qkv.weight"].chunk(3)
            for part, word in ((q, "q"), (v, "v")):
                left, right = (state[f"{block.block}.remap_krona_{word}.{side}"] for side in ("left", "right"))
                part += options["scale"] * _kronecker(left, right)

    assert torch.allclose(logits, plain_logits(variant, change), rtol=0, atol=1e-10)
    assert not torch.allclose(logits, plain_logits(variant), atol=1e-3)


def test_rectangular_layers(shaken: Callable, plain_logits: Callable) -> None:
    _, state, logits = shaken("krona", "plain", targets=["o", "fc1", "fc2"], scale=1.0)

    def change(weights: Weights) -> None:
        for index in range(3):
            for word, layer in (("o", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
                left, right = (state[f"blocks.{index}.remap_krona_{word}.{side}"] for side in ("left", "right"))
                weights[f"blocks.{index}.{layer}.weight"] += _kronecker(left, right)

    assert torch.allclose(logits, plain_logits("plain", change), rtol=0, atol=1e-10)


def test_shapes_are_next_to_the_square_root(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], count: Callable[..., int]
) -> None:
    """32 = 8 * 4; 768 = 32 * 24."""
    state = attach("krona", build("plain")).state()
    assert state["blocks.0.remap_krona_q.left"].shape == (8, 4)
    assert state["blocks.0.remap_krona_q.right"].shape == (4, 8)
    assert state["blocks.0.remap_krona_q.right"].abs().max() == 0
    assert count("krona") == 12 * 2 * (32 * 24 + 24 * 32) == 36_864
    assert count("krona", factor=768) == 12 * 2 * (768 * 24 + 1 * 32)


def test_a_factor_must_divide(build: Callable[..., nn.Module], attach: Callable[..., Attached]) -> None:
    with pytest.raises(BackboneError, match="does not divide"):
        attach("krona", build("plain"), factor=5)
    with pytest.raises(BackboneError, match="has a layer called q"):
        attach("krona", build("convnext"), targets=["q"])


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    """Element (i*b1 + k, j*b2 + l) is left[i, j] * right[k, l]."""
    (a1, a2), (b1, b2) = left.shape, right.shape
    out = torch.empty(a1 * b1, a2 * b2, dtype=left.dtype)
    for i in range(a1):
        for j in range(a2):
            out[i * b1 : (i + 1) * b1, j * b2 : (j + 1) * b2] = left[i, j] * right
    return out
