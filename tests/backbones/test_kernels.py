"""Kernels are chosen by the table, and the same choice comes out every time."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from remap.backbones import kernels
from remap.backbones.anatomy import anatomy_of, plain_class
from remap.backbones.build import Backbone, Identity
from remap.backbones.kernels import channels_last, compiled, fused_attention, train_depthwise_in_float32
from remap.backbones.preprocess import PreprocessSpec
from remap.distributed.launch import accelerator
from remap.engine.teacher import Teacher
from remap.network import Runner, tuned
from remap.pipeline import doctor
from remap.pipeline.components import build_components
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import make_teacher
from remap.progress import Silent

LAST = torch.channels_last


@pytest.mark.parametrize(
    ("tokens", "fused"), [(5, False), (64, False), (65, False), (196, False), (197, True), (1025, True), (None, False)]
)
def test_attention_is_chosen_by_the_row_of_the_most_tokens(
    monkeypatch: pytest.MonkeyPatch, tokens: int | None, fused: bool
) -> None:
    monkeypatch.setattr(kernels, "FUSED_OVER_EXPLICIT", {("cpu", "fp32", True): {65: 0.96, 197: 0.8}})
    assert fused_attention("auto", "cpu", bf16=False, trains=True, tokens=tokens)[0] is fused
    assert fused_attention("auto", "cpu", bf16=True, trains=True, tokens=tokens)[0] is False, "no row in bf16"
    assert fused_attention("auto", "cuda", bf16=False, trains=True, tokens=tokens)[0] is True, "as PyTorch has it"
    for setting in ("on", "off"):
        assert fused_attention(setting, "cpu", bf16=False, trains=True, tokens=tokens)[0] is (setting == "on")


@pytest.mark.parametrize(
    ("name", "options", "fp32", "bf16"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32}, False, False),  # patches do not overlap
        ("test_resnet", {}, False, True),  # no grouped convolution
        ("test_efficientnet", {}, True, True),
    ],
)
def test_channels_come_last_where_convolutions_overlap(
    name: str, options: dict[str, int], fp32: bool, bf16: bool
) -> None:
    model = timm.create_model(name, **options)
    assert [channels_last(model, "cpu", bf16=precision) for precision in (False, True)] == [fp32, bf16]
    assert not channels_last(model, "cuda", bf16=True), "not measured"


@pytest.mark.parametrize("channels", [1, 3])
def test_every_convolution_gives_its_channels_last(channels: int) -> None:
    """Of images of one channel too, and behind a map that was cached, which has its channels first."""
    model = timm.create_model("test_convnext", in_chans=channels)
    model.pretrained_cfg |= {"input_size": (channels, 64, 64)}
    identity = Identity("test_convnext", "none", "")
    backbone = Backbone(model, anatomy_of(model), PreprocessSpec.of(model), identity, head_is_fresh=True)
    runner = Runner(tuned(backbone, "partial", {}), bf16=True)
    images = torch.randint(0, 256, (2, channels, 64, 64), dtype=torch.uint8)
    last: list[bool] = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda _layer, _args, y: last.append(y.stride(1) == 1 and y.is_contiguous(memory_format=LAST))
            )
    complete = runner(images).logits_BC
    count = len(last)
    kept = {name: value.contiguous() for name, value in runner.stem(images).items()}
    assert kept["input"].stride(1) > 1 and all(last)
    del last[:]
    assert torch.equal(runner(images[:, :, :0, :0], kept).logits_BC, complete)
    assert all(last) and 0 < len(last) < count


def test_depthwise_convolutions_compute_in_float32_where_a_backward_pass_reaches_them() -> None:
    """Source: the same layers with their inputs and weights in float32, outside of autocast."""
    first, second = (nn.Conv2d(4, 4, 3, groups=4) for _ in range(2))
    other = nn.Conv2d(4, 8, 1)
    first.requires_grad_(False)
    model = nn.Sequential(first, second, other)
    names = [name for name, _ in model.named_modules()]
    plain = copy.deepcopy(model)
    for _ in range(2):
        train_depthwise_in_float32(model)
    assert len(type(second).__mro__) == len(nn.Conv2d.__mro__) + 2, "once"
    assert plain_class(second) is nn.Conv2d, "families see the layer that it was"
    assert [name for name, _ in model.named_modules()] == names and repr(model) == repr(plain)
    images = torch.rand(2, 4, 8, 8)
    for network in (model, copy.deepcopy(model)):
        with torch.autocast("cpu", torch.bfloat16):
            frozen, trained = network[0](images), network[1](images)
            assert network[2](images).dtype is frozen.dtype is torch.bfloat16
        assert torch.equal(trained, plain[1](images))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert torch.equal(frozen, plain[0](images))
        assert torch.equal(network[1](images), plain[1](images)), "without autocast nothing changes"


def test_blocks_are_compiled_where_the_run_is_long_enough() -> None:
    least = kernels.COMPILED_FROM["cuda"]
    assert [compiled("auto", "cuda", steps)[0] for steps in (least - 1, least)] == [False, True]
    assert compiled("auto", "cpu", 10 * least)[0] is False
    assert compiled("auto", "cuda", least, checkpointed=True) == (False, "train.checkpoint_blocks")
    assert [compiled(setting, "cpu", 1)[0] for setting in (True, False, "graphs")] == [True, False, True]


def test_a_choice_that_was_added_leaves_digests_alone(tiny: Any) -> None:
    assert tiny.recipe().digest() == tiny.recipe("train.compile=false").digest()
    assert len({tiny.recipe(f"train.compile={word}").digest() for word in ("false", "true", "graphs")}) == 3


def test_the_doctor_says_what_would_be_chosen() -> None:
    found = {row["what"]: row["found"] for row in doctor.examine()["checks"]}
    assert found["attention of a ViT at 224 px"].startswith("training: ")
    assert "compile 'auto'" in found


def test_a_frozen_teacher_in_bf16_gives_the_same_bits(tiny: Any) -> None:
    """Source: autocast, which rounds float32 weights in each pass. Closed, the teacher has its weights back."""
    components = build_components(
        tiny.recipe("train.precision=bf16", "teacher.allow_weak=true", losses="ce,kd"),
        None,
        Silent(),
        SharedResources(),
    )
    network, objective = components.teachers[0].network, components.objective
    images = torch.arange(4 * 3 * 16 * 16).remainder(251).to(torch.uint8).view(4, 3, 16, 16)
    before = dict(network.model.named_parameters())
    plain = Teacher(network, objective, 0, accelerator(), bf16=True)
    expected = plain.items(images)
    plain.close()
    teacher = make_teacher(components, 0)
    types = {name: parameter.dtype for name, parameter in network.model.named_parameters()}
    assert types["blocks.0.attn.qkv.weight"] == types["patch_embed.proj.bias"] == torch.bfloat16
    assert types["blocks.0.norm1.weight"] == types["pos_embed"] == types["head.weight"] == torch.float32
    found = teacher.items(images)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in found)
    teacher.close()
    after = dict(network.model.named_parameters())
    assert all(after[name] is before[name] for name in before)
