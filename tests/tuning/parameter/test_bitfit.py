"""Which biases train. Expected names are written out from timm's modules; counts are summed by hand."""

from collections.abc import Callable

import pytest
from torch import nn

from remap.errors import BackboneError
from remap.tuning.attached import Attached

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]

LINEARS = {"attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"}
NORMS = {"norm1.bias", "norm2.bias"}


@pytest.mark.parametrize(
    ("biases", "inside", "outside"),
    [
        ("all", LINEARS | NORMS, {"patch_embed.proj.bias", "norm.bias"}),
        ("no_norm", LINEARS, {"patch_embed.proj.bias"}),
        ("blocks", LINEARS | NORMS, set()),
    ],
)
def test_names_on_a_plain_vit(build: Build, attach: Attach, biases: str, inside: set[str], outside: set[str]) -> None:
    attached = attach("bitfit", build("plain"), biases=biases)
    assert set(attached.trainable) == {f"blocks.{i}.{name}" for i in range(3) for name in inside} | outside
    assert set(attached.no_decay) == set(attached.trainable)


def test_separate_query_and_value_biases_train_and_position_tables_do_not(build: Build, attach: Attach) -> None:
    names = set(attach("bitfit", build("beit")).trainable)
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= names
    assert not [name for name in names if "relative_position" in name]
    swin = attach("bitfit", build("swin")).trainable
    assert not [name for name in swin if "relative_position" in name]


def test_biases_of_batch_norms_train(build: Build, attach: Attach) -> None:
    model = build("resnet")
    expected = {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert set(attach("bitfit", model).trainable) == expected
    with pytest.raises(BackboneError, match="no biases"):
        attach("bitfit", build("resnet"), biases="no_norm")


def test_a_shift_of_all_keys_is_left_out(build: Build, attach: Attach) -> None:
    """softmax(q k + c) = softmax(q k): the bias of the keys' norm has no gradient."""
    names = attach("bitfit", build("avg_pool")).trainable
    assert "blocks.0.attn.q_norm.bias" in names and "blocks.0.attn.k_norm.bias" not in names


# A block has 2,304 + 768 + 3,072 + 768 without norms and 2 * 768 in norms; 768 in patch embedding and final norm each.
@pytest.mark.parametrize(("biases", "expected"), [("all", 102_912), ("no_norm", 83_712), ("blocks", 12 * 8_448)])
def test_count(count: Callable[..., int], biases: str, expected: int) -> None:
    assert count("bitfit", biases=biases) == expected
