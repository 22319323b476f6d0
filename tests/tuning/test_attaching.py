"""Combinations of methods. Expected values are the same methods attached by hand, or the untouched model."""

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from timm.models.beit import Beit
from torch import nn

from remap.backbones.anatomy import anatomy_of, module_at
from remap.errors import BackboneError, UnknownName
from remap.tuning import METHODS, category_of, config_of, parts_of
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method
from remap.tuning.dropout import SampleDropout

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]

# Of every kind: tokens, hooks on branches, weights, norms, tuned blocks; orders both ways.
COMBINATIONS = [
    "vpt_deep+adaptformer+lora",
    "lora+vpt_deep",
    "houlsby+norm",
    "lora+repadapter+ssf",
    "repadapter+diffit+ssf",
    "partial+vpt_shallow",
    "adapter_plus+vpt_deep",
    "vpt_deep+adapter_plus",
    "gps+fact_tt",
]

MERGEABLE = [row.name for row in METHODS if row.mergeable and not row.alone]
# What stands at different places of a layer, one of each: its weight, its forward, its outputs, its inputs.
KINDS = ["partial", "repadapter", "residual_adapter", "diffit", "lora", "ssf", "gps", "dora", "ia3"]


@pytest.fixture(params=COMBINATIONS)
def combination(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["plain", "dinov2_registers", "eva02", "beit", "swin"])
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_combination_does_what_its_parts_do(
    build: Build, attach: Attach, tools: SimpleNamespace, combination: str, variant: str
) -> None:
    """Identity, what trains, reloading, merging and detaching, on one object."""
    base, together, images = build(variant), attach(combination, build(variant)), tools.images()
    with torch.no_grad():
        features = base.forward_features(images)
        assert torch.equal(together.model(images), base(images)) == together.identity_at_init
    alone = [set(attach(part, build(variant)).trainable) for part in parts_of(combination)]
    assert set(together.trainable) == set().union(*alone)
    trained = {name for name, p in together.model.named_parameters() if p.requires_grad}
    assert trained - set(together.trainable) == set()
    alive = tools.step(together, 5)
    assert set(together.trainable) <= alive

    fresh = attach(combination, build(variant), seed=99)
    fresh.load(together.state())
    assert torch.equal(fresh.model.forward_features(images), together.model.forward_features(images))
    _merges_if_its_parts_do(build(variant), fresh, images)
    together.detach()
    assert list(together.model.state_dict()) == list(base.state_dict())
    with torch.no_grad():
        assert torch.equal(together.model.eval().forward_features(images), features)
    for again in (together.detach, together.merge):
        with pytest.raises(BackboneError, match="off this model already"):
            again()


def _merges_if_its_parts_do(base: nn.Module, together: Attached, images: torch.Tensor) -> None:
    """Parts that change the same layer are folded in the order in which the forward applies them."""
    tuned = together.model(images).detach()
    if not together.mergeable:
        with pytest.raises(BackboneError, match="cannot be folded"):
            together.merge()
        assert torch.equal(together.model(images), tuned), "a refusal changes nothing"
        return
    base.load_state_dict(together.merge().state_dict())
    assert (base(images) - tuned).abs().max() <= 1e-5 * max(1.0, float(tuned.abs().max()))


@pytest.mark.parametrize(
    ("variant", "first", "seconds"),
    [
        # Each method in front of and behind one of each kind: how two changes of a layer meet depends on their kinds.
        *(("plain", first, MERGEABLE if first in KINDS else KINDS) for first in MERGEABLE),
        *((variant, first, KINDS) for variant in ("eva02", "swin", "convnext", "efficientnet") for first in KINDS),
    ],
)
def test_every_ordered_pair_merges_or_is_refused(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str, first: str, seconds: list[str]
) -> None:
    """The merged weights in a model without hooks against the forward with hooks, in float64."""
    images = tools.images().double()
    start = build(variant, depth=None if variant == "efficientnet" else 1)
    parts = anatomy_of(start).parts
    seconds = [second for second in seconds if second != first and METHODS.row(second).fits(parts)]
    base = copy.deepcopy(start).double()
    with torch.no_grad():
        plain = base(images)
    for name in (f"{first}+{second}" for second in seconds if METHODS.row(first).fits(parts)):
        model = copy.deepcopy(start)
        try:
            attached = attach(name, model)
        except BackboneError as error:
            assert re.search("already carries|would be lost", str(error)), name
            continue
        tools.shake(attached, 0.1)
        model.double()
        with torch.no_grad():
            tuned = model(images)
            assert not torch.allclose(tuned, plain, atol=1e-3), name
            base.load_state_dict(attached.merge().state_dict())
            # peft computes circulant matrices in float32, whatever the weights are.
            bound = 1e-6 if "c3a" in (first, name.partition("+")[2]) else 1e-9
            assert torch.allclose(base(images), tuned, rtol=bound, atol=bound), name


@pytest.mark.parametrize("place", ["parallel", "series"])
@pytest.mark.parametrize("other", ["ssf", "gps", "norm"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("variant", ["convnext", "resnet", "efficientnet"])
def test_adapters_of_convolutions_merge_with_what_changes_the_same_convolution(
    build: Build, tools: SimpleNamespace, place: str, other: str, last: bool, variant: str
) -> None:
    base, model = build(variant).double(), build(variant).double()
    for one in (base, model):  # the statistics of a new norm change nothing
        for module in filter(lambda module: isinstance(module, nn.BatchNorm2d), one.modules()):
            module.running_mean.copy_(torch.linspace(-0.5, 0.5, len(module.running_mean)))
            module.running_var.copy_(torch.linspace(0.5, 2.0, len(module.running_var)))
    name = f"{other}+residual_adapter" if last else f"residual_adapter+{other}"
    attached = attach_method(model, anatomy_of(model), name, {"residual_adapter": {"place": place}})
    tools.shake(attached, 0.1)
    images = tools.images().double()
    with torch.no_grad():
        tuned = model(images)
        base.load_state_dict(attached.merge().state_dict())
        assert torch.allclose(base(images), tuned, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ssf+e2vpt", "ia3+e2vpt", "e2vpt+ssf"])
@pytest.mark.parametrize("variant", ["eva02", "beit"])
def test_attention_whose_biases_are_changed_takes_key_value_prompts(
    build: Build, attach: Attach, tools: SimpleNamespace, name: str, variant: str
) -> None:
    together = attach(name, build(variant))
    assert set(together.trainable) <= tools.step(together, 5)


@pytest.mark.parametrize("name", ["vpt_pad+vp", "vp+vpt_pad"])
def test_a_border_on_the_image_stands_inside_one_around_it(
    build: Build, attach: Attach, tools: SimpleNamespace, name: str
) -> None:
    attached = attach(name, build("resnet"))
    seen = []
    handle = module_at(attached.model, attached.anatomy.input_module).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    images = tools.images()
    attached.model(images)
    handle.remove()
    assert seen[0].shape == (2, 3, 36, 36)
    inside = (seen[0][:, :, 2:-2, 2:-2] - images).detach()
    assert torch.equal(inside[0] != 0, inside[1] != 0)
    border = (inside[0] != 0).any(0)
    assert border[:4].all() and not border[4:-4, 4:-4].any()


@pytest.mark.parametrize("name", ["vpt_deep+adaptformer+fact_tt", "e2vpt+lora", "adapter_plus+fact_tk"])
def test_parts_do_not_drop_the_same_elements(build: Build, name: str) -> None:
    models = [build("plain") for _ in range(2)]
    sites = []
    for model in models:
        parts = {part: {"dropout": 0.5} for part in parts_of(name) if part != "adapter_plus"}
        attach_method(model, anatomy_of(model), name, parts)
        sites.append({path: (m.site, int(m.offset)) for path, m in model.named_modules() if _drops(m)})
    assert sites[0] == sites[1], "a resumed run draws the masks of the first one"
    assert len(set(sites[0].values())) == len(sites[0]) == len({offset for _, offset in sites[0].values()})


@pytest.mark.parametrize(
    ("variant", "name", "options"),
    [
        ("beit_shared", "vpt_deep", {"num_blocks": 1, "last": True}),
        ("eva02", "ia3+gps", {}),
        ("swin", "dora+gps", {}),
        ("plain", "lora+oft+dora", {}),
        ("beit", "ssf+krona", {"krona": {"targets": ["fc1", "q"], "factor": 64}}),
        ("eva02", "vpt_deep+e2vpt", {}),
        ("swin", "houlsby+fact_tt", {"fact_tt": {"rank": 4000}}),
    ],
)
def test_a_failed_attach_leaves_the_model_as_it_was(
    build: Build, tools: SimpleNamespace, variant: str, name: str, options: dict
) -> None:
    if variant == "beit_shared":
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
        model = Beit(**shape, use_abs_pos_emb=False, use_shared_rel_pos_bias=True, num_classes=5).eval()
    else:
        model = build(variant)
    before, logits, state = _everything(model), model(tools.images()), list(model.state_dict())
    with pytest.raises(BackboneError):
        attach_method(model, anatomy_of(model), name, options)
    assert _everything(model) == before and list(model.state_dict()) == state
    assert torch.equal(model(tools.images()), logits)
    lora = attach_method(model, anatomy_of(model), "lora", {})
    assert set(lora.trainable) <= tools.step(lora, 5)


def test_a_refusal_to_merge_names_the_part_that_stays(build: Build, attach: Attach) -> None:
    with pytest.raises(BackboneError, match="^vpt_deep cannot be folded"):
        attach("vpt_deep+lora", build("plain")).merge()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dora+oft", "do:      give the two different targets"),
        ("gps+oft", "do:      give the two different targets"),
        ("lora+dora", "name this method first"),
        ("dora+gps", "leave one of the two out"),
    ],
)
def test_what_cannot_change_one_layer_together_says_what_helps(
    build: Build, attach: Attach, name: str, hint: str
) -> None:
    with pytest.raises(BackboneError, match=hint):
        attach(name, build("plain"))


def test_what_does_not_fit_is_said_in_words_and_something_made_for_the_family_is_offered(build: Build) -> None:
    model = build("resnet")
    with pytest.raises(BackboneError, match="it needs blocks of attention and MLP") as caught:
        attach_method(model, anatomy_of(model), "fact_tt", {})
    assert "lora" in str(caught.value)


def test_options_of_a_part_stand_under_its_name(build: Build) -> None:
    model = build("plain")
    attached = attach_method(model, anatomy_of(model), "vpt_deep+lora", {"lora": {"rank": 2}, "vpt_deep": {}})
    ranks = {p.shape[0] for name, p in model.named_parameters() if name.endswith("remap_lora.down")}
    assert ranks == {2 * 2} and attached.extra_tokens == 10
    with pytest.raises(ValidationError, match="rank"):
        attach_method(build("plain"), anatomy_of(build("plain")), "vpt_deep+lora", {"rank": 2})
    assert list(config_of("vpt_deep+lora").model_fields) == ["vpt_deep", "lora"]


def test_two_methods_that_add_tokens_are_refused_and_leave_nothing(build: Build) -> None:
    model = build("plain")
    before = model.state_dict()
    with pytest.raises(BackboneError, match="both add tokens"):
        attach_method(model, anatomy_of(model), "vpt_deep+e2vpt", {})
    assert list(model.state_dict()) == list(before) and all(p.requires_grad for p in model.parameters())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_part_that_does_not_fit_is_refused(build: Build) -> None:
    model = build("resnet")
    with pytest.raises(BackboneError, match="fact_tt does not fit"):
        attach_method(model, anatomy_of(model), "bitfit+fact_tt", {})
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UnknownName, match="did you mean 'lora'"):
        attach_method(model, anatomy_of(model), "bitfit+lorra", {})


@pytest.mark.parametrize(
    ("method", "category"),
    [("lora", "parameter"), ("lora+ssf", "parameter"), ("vpt_deep+lora", "adapter"), ("vpt_deep+vp", "prompt")],
)
def test_the_category_of_a_mix_is_adapter_tuning(method: str, category: str) -> None:
    """Source: the survey (arXiv 2305.06061) files mixed methods under adapter tuning."""
    assert category_of(method) == category


def _drops(module: nn.Module) -> bool:
    return isinstance(module, SampleDropout) and module.p > 0


def _everything(model: nn.Module) -> dict[str, object]:
    """Classes, attributes, hooks and children of all modules, and what trains."""
    found: dict[str, object] = {name: p.requires_grad for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{path}.{key}"] = list(value) if isinstance(value, dict) else str(value)
        found[f"{path}:class"] = type(module)
    return found
