"""VPT against the papers' formulas (see ``conftest``), its options, its counts, and what surrounds a forward pass."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError, TrainingError
from remap.remapping.signals import Needs
from remap.remapping.tap import Tap
from remap.tuning import METHODS
from remap.tuning.attached import Attached
from remap.tuning.base import Sample

DEPTH, P = 3, 3
SEQUENCES = [
    "plain",
    "dinov2_registers",
    "deit_distilled",
    "siglip",
    "clip",
    "avg_pool",
    "eva02",
    "eva02_separate",
    "dinov3",
    "beit",
]

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


def stored(attached: Attached, name: str = "prompts") -> Tensor:
    return attached.state()[f"remap_prompts.{name}"]


@pytest.mark.parametrize("variant", SEQUENCES)
@pytest.mark.parametrize(
    ("method", "options", "of_blocks"),
    [
        ("vpt_shallow", {}, {0: 0}),
        ("vpt_deep", {}, {0: 0, 1: 1, 2: 2}),
        ("vpt_deep", {"shared": True}, {0: 0, 1: 0, 2: 0}),
        ("vpt_deep", {"num_blocks": 2}, {0: 0, 1: 1}),
        ("vpt_deep", {"num_blocks": 2, "last": True}, {1: 0, 2: 1}),
    ],
)
def test_prepended_prompts_equal_the_formula(
    build: Build,
    attach: Attach,
    tools: SimpleNamespace,
    formula: SimpleNamespace,
    variant: str,
    method: str,
    options: dict,
    of_blocks: dict[int, int],
) -> None:
    base, images = build(variant).double(), tools.images().double()
    assert torch.allclose(base(images), formula.sequence(base, images, {}), rtol=0, atol=1e-10), "the formula itself"
    attached = attach(method, build(variant).double(), **options)
    tools.shake(attached)
    prompts = stored(attached)
    assert len(prompts) == len(set(of_blocks.values()))
    wanted = formula.sequence(base, images, {block: prompts[row] for block, row in of_blocks.items()})
    assert torch.allclose(attached.model(images), wanted, rtol=0, atol=1e-10)
    assert (wanted - base(images)).abs().max() > 1e-5


@pytest.mark.parametrize("variant", ["dinov2_registers", "siglip", "dinov3", "beit"])
@pytest.mark.parametrize(
    ("method", "place"),
    [("vpt_shallow", "add"), ("vpt_deep", "add"), ("vpt_shallow", "add_all"), ("vpt_deep", "add_all")],
)
def test_added_prompts_are_added_to_the_patches_or_to_all_tokens(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str, method: str, place: str
) -> None:
    """The untouched model with the prompts added by a hook of the test's own."""
    base, images = build(variant).double(), tools.images().double()
    attached = attach(method, build(variant).double(), place=place)
    tools.shake(attached)
    prompts, prefix = stored(attached), base.num_prefix_tokens if place == "add" else 0
    tokens = 16 + base.num_prefix_tokens - prefix
    assert prompts.shape == (DEPTH if method == "vpt_deep" else 1, tokens, 32)
    assert attached.extra_tokens == 0
    for row, block in zip(prompts, base.blocks, strict=False):
        padded = F.pad(row, (0, 0, prefix, 0))
        block.register_forward_pre_hook(lambda block, args, padded=padded: (args[0] + padded, *args[1:]))
    assert torch.allclose(attached.model(images), base(images), rtol=0, atol=1e-10)


@pytest.mark.parametrize("place", ["prepend", "add", "add_all"])
def test_projected_prompts_equal_plain_ones_of_the_same_value(
    build: Build, attach: Attach, tools: SimpleNamespace, place: str
) -> None:
    images = tools.images().double()
    narrow = attach("vpt_deep", build("plain").double(), projection=4, place=place)
    tools.shake(narrow)
    wide = attach("vpt_deep", build("plain").double(), place=place)
    weight, bias = stored(narrow, "projection.weight"), stored(narrow, "projection.bias")
    wide.load({"remap_prompts.prompts": stored(narrow) @ weight.T + bias})
    assert stored(narrow).shape[-1] == 4
    assert torch.allclose(narrow.model(images), wide.model(images), rtol=0, atol=1e-10)
    assert "remap_prompts.projection.weight" not in narrow.no_decay


@pytest.mark.parametrize("num_prompts", [3, 20])
def test_prompts_in_pixels_go_through_the_patch_embedding(
    build: Build, attach: Attach, tools: SimpleNamespace, formula: SimpleNamespace, num_prompts: int
) -> None:
    """20 prompts do not fit on one image of 16 patches."""
    base, images = build("dinov2_registers").double(), tools.images().double()
    attached = attach("vpt_deep", build("dinov2_registers").double(), place="pixel", num_prompts=num_prompts)
    tools.shake(attached)
    pixels = stored(attached)
    assert pixels.shape == (DEPTH, num_prompts, 3, 8, 8)
    layer = base.patch_embed.proj
    tokens = pixels.flatten(2) @ layer.weight.flatten(1).T + layer.bias
    wanted = formula.sequence(base, images, dict(enumerate(tokens)))
    assert torch.allclose(attached.model(images), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ["plain", "siglip", "eva02", "beit"])
def test_prompts_start_as_class_means(build: Build, attach: Attach, tools: SimpleNamespace, variant: str) -> None:
    """3 prompts of 2 classes with images: the third is the first class again; class 1 of 3 has no image."""
    base = build(variant)
    batches = [(tools.images(3, seed=1), torch.tensor([0, 2, 0])), (tools.images(2, seed=2), torch.tensor([2, 2]))]
    attached = attach("vpt_deep", build(variant), init="class_mean")
    assert attached.wants_sample
    attached.train()
    before = attached.model(tools.images()).shape
    attached.prepare(Sample(lambda: iter(batches), 3))
    images, labels = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    with torch.no_grad():
        features = base.forward_head(base.forward_features(images), pre_logits=True)
    means = [features[labels == label].mean(0) for label in (0, 2, 0)]
    assert torch.allclose(stored(attached), torch.stack(means).expand(DEPTH, -1, -1), atol=1e-5)
    assert attached.model(tools.images()).shape == before, "the prompts are back"
    assert attached.model.get_submodule("remap_prompts").training
    assert not attached.model.blocks.training
    attached.detach()
    assert torch.equal(attached.model.eval()(images), base(images))


@pytest.mark.parametrize(("method", "options"), [("vpt_deep", {"init": "class_mean"}), ("gps", {})])
@pytest.mark.parametrize("batches", [[-1], []], ids=["no label", "no image"])
def test_class_means_and_weights_chosen_by_classes_need_labels(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, options: dict[str, str], batches: list[int]
) -> None:
    attached = attach(method, build("plain"), **options)
    sample = Sample(lambda: iter((tools.images(2), torch.tensor([label, label])) for label in batches), 3)
    with pytest.raises(TrainingError, match="reads training images with labels"):
        attached.prepare(sample)


def test_without_class_means_no_sample_is_wanted(build: Build, attach: Attach) -> None:
    assert not attach("vpt_deep", build("plain")).wants_sample


@pytest.mark.parametrize(
    "options",
    [
        {"place": "pixel", "projection": 4},
        {"init": "class_mean", "place": "add"},
        {"init": "class_mean", "projection": 4},
    ],
)
def test_options_that_contradict_each_other_are_refused(build: Build, attach: Attach, options: dict) -> None:
    with pytest.raises(ValidationError, match="projected|full width"):
        attach("vpt_deep", build("plain"), **options)


def test_more_blocks_than_there_are_is_refused(build: Build, attach: Attach) -> None:
    with pytest.raises(BackboneError, match="fewer blocks"):
        attach("vpt_deep", build("plain"), num_blocks=DEPTH + 1)


def test_last_blocks_only_leave_the_blocks_before_frozen_and_cacheable(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    attached = attach("vpt_deep", build("eva02").double(), num_blocks=1, last=True)
    tools.shake(attached)
    images = tools.images().double()
    kept = attached.seam.stem(images)
    assert attached.seam.first_block == DEPTH - 1
    assert torch.allclose(attached.seam.rest(kept, None, whole_blocks=True), attached.model(images), atol=1e-10)


def test_prompts_start_uniform_within_the_papers_bound(build: Build, attach: Attach) -> None:
    """uniform(-v, v), v = sqrt(6 / (3*8*8 + 32)) = 0.16366; its standard deviation is v / sqrt(3)."""
    prompts = stored(attach("vpt_deep", build("plain"), num_prompts=200))
    assert prompts.shape == (3, 200, 32)
    assert 0.1630 < prompts.abs().max() <= 0.16367
    assert abs(prompts.std() - 0.16366 / 3**0.5) < 0.002


def test_prompts_of_all_stages_start_within_the_bound_of_the_first(build: Build, attach: Attach) -> None:
    """Swin of width 16 and 32 with patches of side p: v = sqrt(6 / (3*p*p + 16)), as the official code draws them."""
    model = build("swin")
    side = model.patch_embed.proj.kernel_size[0]
    bound = (6 / (3 * side * side + 16)) ** 0.5
    attached = attach("vpt_deep", model, num_prompts=500)
    assert [stage.shape[-1] for stage in attached.state().values()] == [16, 32]
    for stage in attached.state().values():
        assert 0.998 * bound < stage.abs().max() <= bound


@pytest.mark.parametrize(
    ("method", "options", "of_blocks"),
    [
        ("vpt_shallow", {}, [0]),
        ("vpt_deep", {}, [0, 1, 2]),
        ("vpt_deep", {"num_blocks": 2}, [0, 1]),
        ("vpt_deep", {"num_blocks": 2, "last": True}, [1, 2]),
    ],
)
def test_prompts_in_windows_equal_the_formula(
    build: Build,
    attach: Attach,
    tools: SimpleNamespace,
    formula: SimpleNamespace,
    method: str,
    options: dict,
    of_blocks: list[int],
) -> None:
    """The formula takes one image after the other, so images of a batch do not mix either."""
    base, images = build("swin").double(), tools.images(3).double()
    assert torch.allclose(base(images), formula.windows(base, images, {}), rtol=0, atol=1e-10), "the formula itself"
    attached = attach(method, build("swin").double(), **options)
    tools.shake(attached)
    rows = [row for name, stage in attached.state().items() for row in stage]
    wanted = formula.windows(base, images, dict(zip(of_blocks, rows, strict=True)))
    assert torch.allclose(attached.model(images), wanted, rtol=0, atol=1e-10)
    assert (wanted - base(images)).abs().max() > 1e-5


@pytest.mark.parametrize("options", [{"place": "add"}, {"projection": 4}, {"init": "class_mean"}, {"shared": True}])
def test_windows_refuse_what_needs_one_width(build: Build, attach: Attach, options: dict) -> None:
    model = build("swin")
    with pytest.raises(BackboneError, match="differ in width"):
        attach("vpt_deep", model, **options)
    assert list(model.state_dict()) == list(build("swin").state_dict())


@pytest.mark.parametrize("variant", ["plain", "swin"])
def test_an_image_gets_its_own_dropout_mask_whatever_stands_beside_it(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str
) -> None:
    attached = attach("vpt_shallow", build(variant), dropout=0.5)
    attached.train()
    keys, images = torch.tensor([11, 12]), tools.images()
    attached.set_sample_keys(keys)
    both = attached.model(images)
    attached.set_sample_keys(keys[1:])
    assert torch.allclose(attached.model(images[1:]), both[1:], atol=1e-5)
    attached.set_sample_keys(keys[:1])
    assert not torch.allclose(attached.model(images[1:]), both[1:], atol=1e-5)


def test_a_forward_that_was_broken_off_can_be_copied(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    attached = attach("vpt_shallow", build("swin"))

    def stop(module: nn.Module, args: tuple) -> None:
        raise InterruptedError

    handle = attached.model.layers[0].blocks[0].norm2.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        attached.model(tools.images())
    handle.remove()
    twin = copy.deepcopy(attached.model)
    assert torch.equal(twin(tools.images()), attached.model(tools.images()))


def test_shallow_prompts_lost_between_blocks_are_an_error(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    attached = attach("vpt_shallow", build("plain"))
    attached.model.blocks[0].register_forward_hook(lambda block, args, output: output.clone())
    with pytest.raises(BackboneError, match="prompts are lost"):
        attached.model(tools.images())


# VPT, section 4 and its code's defaults; Swin: blocks of a stage times its width, 2*128 + 2*256 + 18*512 + 2*1024.
@pytest.mark.parametrize(
    ("backbone", "method", "options", "count"),
    [
        ("vit_base_patch16_224", "vpt_shallow", {}, 7_680),
        ("vit_base_patch16_224", "vpt_shallow", {"num_prompts": 50}, 38_400),
        ("vit_base_patch16_224", "vpt_shallow", {"place": "add"}, 196 * 768),
        ("vit_base_patch16_224", "vpt_shallow", {"place": "add_all"}, 197 * 768),
        ("vit_base_patch16_224", "vpt_shallow", {"place": "pixel"}, 10 * 3 * 16 * 16),
        ("vit_base_patch16_224", "vpt_shallow", {"projection": 64}, 10 * 64 + 64 * 768 + 768),
        ("vit_base_patch16_224", "vpt_deep", {}, 92_160),
        ("vit_base_patch16_224", "vpt_deep", {"num_prompts": 50}, 460_800),
        ("vit_base_patch16_224", "vpt_deep", {"shared": True}, 7_680),
        ("vit_base_patch16_224", "vpt_deep", {"num_blocks": 4, "last": True}, 4 * 7_680),
        ("swin_base_patch4_window7_224", "vpt_shallow", {}, 10 * 128),
        ("swin_base_patch4_window7_224", "vpt_deep", {}, 10 * (2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024)),
    ],
)
def test_trained_parameters(
    count_on_meta: Callable[..., int], backbone: str, method: str, options: dict, count: int
) -> None:
    assert count_on_meta(backbone, method, options) == count
    if not options and backbone.startswith("vit"):
        assert METHODS.row(method).vit_base == count


@pytest.mark.parametrize(("method", "percent"), [("vpt_shallow", "0.04"), ("vpt_deep", "0.53")])
def test_percentage_that_vpt_prints(count_on_meta: Callable[..., int], method: str, percent: str) -> None:
    """Tuned over total in percent, prompts in the total and no head, 50 prompts (log_model_info of VPT's code)."""
    tuned = count_on_meta("vit_base_patch16_224", method, {"num_prompts": 50})
    assert f"{100 * tuned / (85_798_656 + tuned):.2f}" == percent


def test_anatomy_is_unchanged_after_detaching_rotary_prompts(build: Build, attach: Attach) -> None:
    """The rotary prefix is raised where the prompts are, and lowered again."""
    model = build("dinov3")
    before = [block.attn.num_prefix_tokens for block in model.blocks]
    attached = attach("vpt_deep", model, num_blocks=1, last=True)
    assert [block.attn.num_prefix_tokens for block in model.blocks] == [*before[:-1], before[-1] + P]
    attached.detach()
    assert [block.attn.num_prefix_tokens for block in model.blocks] == before
    assert anatomy_of(model) == anatomy_of(build("dinov3"))


@pytest.mark.parametrize("variant", ["plain", "eva02", "beit"])
@pytest.mark.parametrize(("options", "first"), [({}, 0), ({"num_blocks": 1}, 0), ({"num_blocks": 2, "last": True}, 1)])
def test_attention_can_be_read_in_every_block(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str, options: dict, first: int
) -> None:
    """Blocks in front of the first prompts have none, those behind the last ones do."""
    attached = attach("vpt_deep", build(variant), **options)
    assert (attached.extra_tokens, attached.tokens_from) == (3, first)
    needs = Needs(attention=frozenset(range(3)))
    with Tap(attached.model, attached.anatomy, needs, attached.extra_tokens, None, attached.tokens_from) as tap:
        found = tap(tools.images()).attention
    shared = attached.anatomy.num_patches + attached.anatomy.has_class_token
    assert [attention.map_BHSS().shape[-1] for attention in found.values()] == 3 * [shared]


def test_pixels_are_refused_where_the_embedding_adds_positions(build: Build, attach: Attach) -> None:
    with pytest.raises(BackboneError, match="prompts in pixels do not fit"):
        attach("vpt_deep", build("naflexvit"), place="pixel")
