"""Networks of timm that no exact family reads: tiny ones of many kinds, random weights."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import anatomy_of
from remap.backbones.build import Backbone, build
from remap.backbones.families import FAMILIES
from remap.backbones.families.stages import StageBlock
from remap.backbones.lookup import family_of_name
from remap.backbones.projected_head import ProjectedHead
from remap.errors import BackboneError
from remap.network import Network, tuned
from remap.remapping.knowledge.features.tokens import TokenFeature
from remap.remapping.objective import Pair
from remap.remapping.signals import Needs
from remap.tuning.attaching import attach_method

# Depthwise convolutions and squeeze-and-excitation; grouped ones; 1x1 convolution as classifier; norm in front of the
# classifier and two of those; a classifier a branch; stages with attention; no norms; attention of a fixed grid.
SIZES = {
    "test_efficientnet": 32,
    "regnetx_002": 32,
    "dla46x_c": 64,
    "levit_128s": 64,
    "starnet_s050": 32,
    "mobilevit_xxs": 64,
    "test_nfnet": 32,
    "test_coatnet": 160,
}
NAMES = list(SIZES)
LEARNERS = ["test_efficientnet", "dla46x_c", "levit_128s"]


@cache
def _opened(name: str) -> Backbone:
    torch.manual_seed(0)
    return build(name, "none", 3, image_size=SIZES[name])


def opened(name: str) -> Backbone:
    return copy.deepcopy(_opened(name))


def images_for(backbone: Backbone, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *backbone.anatomy.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_signals_are_those_of_the_forward(name: str) -> None:
    """Source: timm's own forward, its ``forward_head(pre_logits=True)`` and the outputs of the modules it names."""
    backbone = opened(name)
    model, anatomy, images = backbone.model.eval(), backbone.anatomy, images_for(backbone)
    assert anatomy.family == family_of_name(name) == "generic" and anatomy.image_size == (SIZES[name],) * 2
    seen: dict[str, Tensor] = {}
    for block in anatomy.blocks:
        if block.block:
            keep: Callable[..., None] = lambda _m, _args, out, path=block.block: seen.update({path: out})  # noqa: E731
            model.get_submodule(block.block).register_forward_hook(keep)
    network = tuned(backbone, "linear", {})
    with network.tap(Needs(pooled=True, tokens=frozenset(range(anatomy.depth + 1)))) as tap:
        signals = tap(images)
        assert torch.equal(signals.logits_BC, model(images)) and not signals.attention
        if tap.seam is not None:
            again = tap.seam.rest(tap.seam.stem(images), images, whole_blocks=False)
            assert torch.allclose(again, signals.logits_BC, atol=1e-5)
    assert signals.pooled_BD is not None and signals.pooled_BD.shape == (2, anatomy.width)
    compared = 0
    for index, block in enumerate(anatomy.blocks):
        patches = signals.tokens[index].patches_BND
        assert patches.shape == (2, block.grid[0] * block.grid[1], block.width)
        if (map_BDhw := seen.get(block.block)) is not None and map_BDhw.shape[1:] == (block.width, *block.grid):
            compared += 1
            assert torch.equal(patches, map_BDhw.flatten(2).mT)
    assert compared or name == "levit_128s"  # whose blocks give sequences
    assert torch.equal(signals.tokens[anatomy.depth].patches_BND, signals.tokens[anatomy.depth - 1].patches_BND)


@pytest.mark.parametrize("method", ["linear", "full", "norm", "lora"])
@pytest.mark.parametrize("name", LEARNERS)
def test_one_step_moves_what_trains_and_reloads(name: str, method: str) -> None:
    network, other = (tuned(opened(name), method, {}) for _ in range(2))
    images, before = images_for(_opened(name), 4), copy.deepcopy(network.model.state_dict())
    step(network, images)
    changed = {key for key, tensor in network.model.state_dict().items() if not torch.equal(tensor, before[key])}
    kept = network.attached.state()
    assert changed and changed <= {*kept, *network.head}
    assert any("running_mean" in key for key in changed) == (method == "full")
    other.attached.load(kept)
    other.model.load_state_dict({key: tensor.detach() for key, tensor in network.head.items()}, strict=False)
    assert torch.equal(network.model.eval()(images), other.model.eval()(images))


def step(network: Network, images: Tensor) -> None:
    network.attached.train()
    F.cross_entropy(network.model(images), torch.tensor([0, 1, 2, 0])).backward()
    torch.optim.SGD(network.trained.values(), lr=0.01).step()


def test_lora_changes_weights_of_all_kinds_of_layers() -> None:
    """Source: the convolution with W + B A, written out in float64: pointwise (called), strided, grouped, dense 3x3."""
    backbone = opened("test_efficientnet")
    model = backbone.model.double()
    network = tuned(backbone, "lora", {"targets": ["linear", "conv"], "rank": 4, "alpha": 8})
    layers = {path: m for path, m in model.named_modules() if hasattr(m, "remap_lora")}
    shapes = {(m.kernel_size, m.groups == 1) for m in layers.values() if isinstance(m, nn.Conv2d)}
    assert (
        ((1, 1), True) in shapes and ((3, 3), True) in shapes and any(isinstance(m, nn.Conv2d) for m in layers.values())
    )
    plain = opened("test_efficientnet").model.double()
    with torch.no_grad():
        for path, layer in layers.items():
            layer.remap_lora.up.normal_(std=0.1)
            change = 2.0 * layer.remap_lora.up[0] @ layer.remap_lora.down
            plain.get_submodule(path).weight.add_(change.view_as(plain.get_submodule(path).weight))
        images = images_for(backbone).double()
        wanted = plain.eval()(images)
        assert torch.allclose(model.eval()(images), wanted, atol=1e-10)
        assert torch.allclose(network.attached.merge().eval()(images), wanted, atol=1e-10)


def test_partial_trains_the_last_stage_and_what_is_behind_it() -> None:
    """Source: the modules of timm's regnet: stem, s1 to s4, final_conv and head."""
    attached = tuned(opened("regnetx_002"), "partial", {}).attached
    assert {name.partition(".")[0] for name in attached.trainable} == {"s4"}
    assert {path.partition(".")[0] for path in attached.tuned_modules} == {"s4"}
    two = tuned(opened("regnetx_002"), "partial", {"num_blocks": 2}).attached
    assert {name.partition(".")[0] for name in two.trainable} == {"s3", "s4"}


def test_tokens_go_from_a_grid_of_convolutions_to_patches_and_back() -> None:
    """Source: the resized teacher's map, by F.interpolate, in the loss's formula."""
    network, vit = (
        tuned(b, "linear", {}) for b in (opened("regnetx_002"), build("test_vit", "none", 3, image_size=32))
    )
    images = images_for(_opened("regnetx_002"))
    for student, teacher in ((network, vit), (vit, network)):
        term = TokenFeature(Pair(student.anatomy, teacher.anatomy, 3), TokenFeature.Config())
        student.model.eval(), teacher.model.eval()
        with student.tap(term.student_needs()) as ours, teacher.tap(term.teacher_needs()) as theirs:
            signals, target = ours(images), term.target(theirs(images))
        tokens = theirs_tokens(teacher, images)
        wanted = F.interpolate(tokens, student.anatomy.grid, mode="bilinear", antialias=True).flatten(2).mT
        assert torch.allclose(next(iter(target.values())), wanted, atol=1e-4)
        loss = term(signals, target, None)
        projected = term.projectors[0](signals.tokens[student.anatomy.depth].patches_BND)
        assert torch.allclose(loss, F.smooth_l1_loss(projected, F.layer_norm(wanted, wanted.shape[-1:])), atol=1e-4)


@torch.no_grad()
def theirs_tokens(network: Network, images: Tensor) -> Tensor:
    anatomy = network.anatomy
    features = network.model.eval().forward_features(images)
    if features.ndim == 4:
        return features
    return features[:, anatomy.num_prefix_tokens :].mT.unflatten(2, anatomy.grid)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize(
    ("name", "method", "options", "words"),
    [
        ("test_nfnet", "norm", {}, "no norms"),
        ("dm_nfnet_f0", "norm", {}, "no norms"),  # whose blocks own a gain
        ("starnet_s050", "vpt_deep", {}, "it needs blocks of attention"),
        ("levit_128s", "vpt_pad", {}, "takes no images of 234 x 234"),
        ("starnet_s050", "lora", {"targets": ["q"]}, "no block of this backbone has a layer called q"),
        ("gmlp_ti16_224", "conv_adapter", {}, "no plain spatial convolution"),
        ("crossvit_tiny_240", "vp", {}, "no single module that takes the image"),
        ("crossvit_tiny_240", "mlp", {}, "several"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(name: str, method: str, options: dict, words: str) -> None:
    model = on_meta(name)
    with pytest.raises(BackboneError, match=words):
        attach_method(model, anatomy_of(model), method, options)


def test_scales_of_a_network_with_two_embeddings_leave_its_classifiers_alone() -> None:
    """Source: timm's CrossViT has a patch embedding, a first stage and a classifier for each of its branches."""
    model = on_meta("crossvit_tiny_240")
    anatomy = anatomy_of(model)
    with torch.device("meta"):
        added = attach_method(model, anatomy, "ssf", {}).added
    assert {f"patch_embed.{branch}.proj.remap_ssf" for branch in (0, 1)} <= set(added)
    assert not any(anatomy.is_head(path) for path in added)


def test_sizes_are_passed_on_or_refused() -> None:
    """Source: timm's LeViTs are built for a size, its EfficientNets take any; VGG's five poolings need 32."""
    family = FAMILIES.load("generic")()
    for name, size, wanted in (("levit_128s", 64, {"img_size": 64}), ("test_efficientnet", 100, {})):
        model = on_meta(name)
        assert family.size_arguments(model, anatomy_of(model), size) == wanted
    with pytest.raises(BackboneError, match="takes no images of 8 x 8"):
        family.size_arguments(on_meta("vgg11"), anatomy_of(model), 8)


def test_variants_that_exact_families_do_not_read_fall_through() -> None:
    """Source: blocks with norms behind their branches are not those of the plain family."""
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ResPostBlock)
    anatomy = anatomy_of(model)
    assert anatomy.family == "generic" and all(isinstance(block, StageBlock) for block in anatomy.blocks)


@pytest.mark.parametrize("projected", [True, False])
def test_a_classifier_behind_a_projection_is_one(projected: bool) -> None:
    """Also where it has as many classes as the projection has dimensions, and where there is no projection."""
    model = timm.create_model("test_efficientnet", num_classes=0)
    shared = 7 if projected else model.num_features
    proj = nn.Linear(model.num_features, shared, bias=False) if projected else nn.Identity()
    model.classifier = ProjectedHead(proj, shared, 7)
    anatomy = anatomy_of(model)
    assert (anatomy.classifier_heads, anatomy.projected_width) == (("classifier.classifier",), shared)
    assert anatomy.averaged_heads and anatomy.width == model.num_features
