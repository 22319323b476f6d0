"""Attention copy against timm's own unfused attention with the teacher's maps put in; the rules for other tokens."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of, module_at, set_fused_attention
from remap.backbones.build import build as build_backbone
from remap.errors import BackboneError, RemapError, RunError
from remap.remapping.alignment import Resize
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

TEACHER = "vit_mini_teacher_patch4_32.cifar10"  # embedded: 4 blocks, 3 heads, a class token, 8 x 8 patches
HEADS, GRID = 3, (8, 8)
MEAN, STD = 0.5, 0.5  # of the embedded teacher


@pytest.fixture(scope="module")
def embedded() -> nn.Module:
    return timm.create_model(TEACHER, pretrained=True).eval()


def student_of(build_network: Any, family: str = "plain", **changes: int) -> Any:
    """A frozen student on images of 32 x 32 pixels, 8 x 8 patches unless told, 3 heads, 4 blocks."""
    network = build_network(family, **{"img_size": 32, "patch_size": 4, "depth": 4, **changes})
    network.model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    return network


def attach(network: Any, method: str = "attention_copy", **options: Any) -> Attached:
    return attach_method(network.model, network.anatomy, method, options)


def maps_of_teacher(embedded: nn.Module, images: Tensor, maps_of_timm: Any) -> list[Tensor]:
    """timm's maps of the embedded teacher, of images that are normalised for the student."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    return maps_of_timm(embedded, anatomy_of(embedded), (images * std + mean - MEAN) / STD)


def logits_with_maps(network: Any, shared: dict[int, Tensor], has_class: bool) -> Tensor:
    """timm's own unfused forward, with maps put in between softmax and values.

    Tokens that the maps are not about keep their own rows, and are in no other row.
    """
    model, anatomy = copy.deepcopy(network.model), network.anatomy
    set_fused_attention(model, anatomy, False)
    at = [0] * has_class + list(range(anatomy.num_prefix_tokens, anatomy.num_prefix_tokens + anatomy.num_patches))

    def put_in(module: nn.Module, args: tuple, map_BHSS: Tensor) -> tuple:
        full = args[0].clone()
        full[:, :, at] = 0.0
        rows = full[:, :, at]
        rows[..., at] = map_BHSS.expand(-1, full.shape[1], -1, -1)
        full[:, :, at] = rows
        return (full,)

    for index, one in shared.items():
        dropout = module_at(model, anatomy.blocks[index].attn).attn_drop
        dropout.register_forward_pre_hook(lambda module, args, one=one: put_in(module, args, one))
    with torch.no_grad():
        return model(network.images)


def test_every_family_attends_with_the_teachers_maps(
    network: Any, embedded: nn.Module, build_network: Any, maps_of_timm: Any, request: pytest.FixtureRequest
) -> None:
    # Source: timm's unfused forward of both networks; equal grids and heads, so nothing of ours is in the numbers.
    family = request.node.callspec.params["network"]
    student = student_of(build_network, family)
    has_class = student.anatomy.has_class_token
    maps = maps_of_teacher(embedded, student.images, maps_of_timm)
    if not has_class:
        maps = [one[:, :, 1:, 1:] / one[:, :, 1:, 1:].sum(dim=-1, keepdim=True) for one in maps]
    expected = logits_with_maps(student, dict(enumerate(maps)), has_class)
    plain = student.model(student.images)
    attach(student, teacher=TEACHER)
    found = student.model(student.images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2


def test_other_grids_heads_and_pairs(embedded: nn.Module, build_network: Any, maps_of_timm: Any) -> None:
    # Source: as above; the average over heads, resized by what has its own tests, in two of three blocks.
    student = student_of(build_network, patch_size=8, depth=3, num_heads=2, embed_dim=16)
    maps = maps_of_teacher(embedded, student.images, maps_of_timm)
    mean = [Resize(GRID, (4, 4), True).attention(one.mean(dim=1, keepdim=True)) for one in maps]
    expected = logits_with_maps(student, {0: mean[2], 2: mean[3]}, True)
    attach(student, teacher=TEACHER, layers=[[0, 2], [-1, -1]])
    torch.testing.assert_close(student.model(student.images), expected, rtol=1e-4, atol=1e-4)


def test_copying_its_own_maps_changes_nothing() -> None:
    # Source: identity. The student is the teacher, so its maps are replaced by themselves.
    backbone = build_backbone(TEACHER, "pretrained", 5)
    images = torch.randn(2, 3, 32, 32)
    before = backbone.model.eval()(images)
    attached = attach_method(backbone.model, backbone.anatomy, "attention_copy", {"heads": "each"})
    torch.testing.assert_close(attached.model(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["plain", "qk_norm", "eva02_fused", "eva02_split", "dinov3", "beit"])
def test_with_full_tuning_queries_and_keys_get_zeros_and_values_do_not(family: str, build_network: Any) -> None:
    # Source: the copied maps do not depend on the student, and distributed training wants every gradient there.
    student = student_of(build_network, family, depth=2)
    attached = attach(student, teacher=TEACHER, trains="all")
    assert set(attached.trainable) == set(attach(student_of(build_network, family, depth=2), "full").trainable)
    attached.train()
    student.model(student.images).square().sum().backward()
    parameters = dict(student.model.named_parameters())
    assert not [name for name in attached.trainable if parameters[name].grad is None]
    for block in student.anatomy.blocks:
        size = {}
        for word in ("q", "k", "v"):
            projection = block.projections[word]
            size[word] = parameters[f"{projection.path}.weight"].grad[projection.rows].abs().max().item()
        assert size["v"] > 1e-6
        assert size["q"] == size["k"] == 0.0


@pytest.mark.parametrize("method", ["lora", "vpt_deep", "ssf", "bitfit"])
def test_combinations_train_what_the_other_method_trains(method: str, build_network: Any) -> None:
    student = student_of(build_network)
    alone = set(attach(student_of(build_network), method).trainable)
    attached = attach(student, f"{method}+attention_copy", attention_copy={"layers": "last"})
    assert set(attached.trainable) == alone
    optimiser = torch.optim.SGD([p for p in student.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        attached.train()
        student.model(student.images).square().sum().backward()
        assert all(p.grad is not None for n, p in student.model.named_parameters() if n in alone)
        optimiser.step()
    assert set(attached.buffers) >= {"remap_attention_copy.teacher_sha256"}


def test_values_are_those_of_the_method_beside(build_network: Any, embedded: nn.Module, maps_of_timm: Any) -> None:
    # Source: the same network with LoRA folded into plain weights, and the copy attached to those.
    student = student_of(build_network)
    torch.manual_seed(3)
    attached = attach(student, "lora+attention_copy", attention_copy={"layers": "uniform"})
    with torch.no_grad():
        for name in attached.trainable:
            parameter = student.model.get_parameter(name)
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = student_of(build_network)
    torch.manual_seed(3)
    folded = attach(plain, "lora")
    folded.load({name: value for name, value in attached.state().items() if name in folded.trainable})
    folded.merge()
    maps = maps_of_teacher(embedded, student.images, maps_of_timm)
    expected = logits_with_maps(plain, dict(enumerate(maps)), True)
    torch.testing.assert_close(student.model(student.images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "vpt_deep", "vpt_shallow", "ssf", "adaptformer"])
def test_the_order_of_a_combination_does_not_matter(method: str, build_network: Any) -> None:
    # Source: each order against the other, with the same tuned tensors, away from their starting values.
    found, state = [], None
    for name in (f"{method}+attention_copy", f"attention_copy+{method}"):
        student = student_of(build_network)
        attached = attach(student, name, attention_copy={"layers": [[1, 1], [2, 3]]})
        generator = torch.Generator().manual_seed(2)
        state = state or {
            key: value + 0.3 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for key, value in attached.state().items()
        }
        plain = student.model(student.images)
        attached.load(state)
        found.append(student.model(student.images))
        assert (found[-1] - plain).abs().max() > 1e-2
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_block_without_maps_says_so(build_network: Any) -> None:
    student = student_of(build_network)
    attach(student)
    with pytest.raises(BackboneError, match="block 2 carries no attention maps"):
        student.model.blocks[2](torch.zeros(1, 65, 24))


def test_a_task_of_another_teacher_is_refused(build_network: Any) -> None:
    student = student_of(build_network)
    attached = attach(student)
    attached.load(attached.state())
    student.model(student.images)
    attached.load({name: value ^ 1 for name, value in attached.state().items()})
    with pytest.raises(RunError, match="(?s)other weights of mini_teacher.*bring back"):
        student.model(student.images)


def test_the_teacher_is_no_part_of_the_student(build_network: Any) -> None:
    student = student_of(build_network)
    names = set(student.model.state_dict())
    attached = attach(student)
    assert set(student.model.state_dict()) - names == {"remap_attention_copy.teacher_sha256"}
    assert set(attached.state()) == {"remap_attention_copy.teacher_sha256"}
    twin = copy.deepcopy(student.model)
    assert twin.remap_attention_copy.teacher is student.model.remap_attention_copy.teacher
    assert twin.remap_attention_copy is not student.model.remap_attention_copy
    student.model.train()
    assert not any(module.training for module in student.model.remap_attention_copy.teacher.networks.modules())


def test_the_students_draws_do_not_depend_on_the_teacher(build_network: Any) -> None:
    student = student_of(build_network)
    torch.manual_seed(5)
    attach(student)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "none"}, "random weights exist nowhere else"),
        ({"heads": "each"}, "student 2, teacher 3"),
        ({"layers": [[0, 1], [0, 2]]}, "one teacher block"),
        ({"layers": [[0, 9]]}, "the teacher 4"),
        ({"teacher": "vit_nonsense"}, "unknown model"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], message: str, build_network: Any) -> None:
    student = student_of(build_network, num_heads=2, embed_dim=16)
    with pytest.raises(RemapError, match=message):
        attach(student, **options)
    assert not hasattr(student.model, "remap_attention_copy")
