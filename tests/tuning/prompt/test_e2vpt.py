"""E2VPT against the papers' formulas (see ``conftest``), its pruning against definitions, and its counts."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of, set_fused_attention
from remap.tuning import METHODS
from remap.tuning.attached import Attached

DEPTH, P, N, SEGMENTS = 3, 4, 2, 16
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


def key_values(attached: Attached) -> dict[int, Tensor]:
    return {i: attached.state()[f"blocks.{i}.attn.remap_key_values.key_values"] for i in range(DEPTH)}


def prompts_of(attached: Attached) -> Tensor:
    return attached.state()["remap_prompts.prompts"]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", SEQUENCES)
def test_the_whole_model_equals_the_formula(
    build: Build, attach: Attach, tools: SimpleNamespace, formula: SimpleNamespace, variant: str, fused: bool
) -> None:
    base, images = build(variant).double(), tools.images().double()
    attached = attach("e2vpt", build(variant).double(), num_prompts=P, num_kv=N)
    set_fused_attention(attached.model, attached.anatomy, fused)
    tools.shake(attached)
    wanted = formula.sequence(base, images, dict(enumerate(prompts_of(attached))), key_values(attached))
    assert torch.allclose(attached.model(images), wanted, rtol=0, atol=1e-10)
    without = formula.sequence(base, images, dict(enumerate(prompts_of(attached))))
    assert (wanted - without).abs().max() > 1e-5, "the key-value prompts matter"


@pytest.mark.parametrize("variant", ["beit", "eva02"])
def test_biases_added_apart_from_the_layer(build: Build, attach: Attach, tools: SimpleNamespace, variant: str) -> None:
    """The same function by timm's definition, with the qkv layer called or only read."""
    attached = attach("e2vpt", build(variant).double(), num_prompts=P, num_kv=N)
    images = tools.images().double()
    read = attached.model(images)
    for block in attached.model.blocks:
        block.attn.qkv_bias_separate = True
    assert torch.allclose(attached.model(images), read, rtol=0, atol=1e-10)


def test_attention_arguments_are_respected(build: Build, attach: Attach) -> None:
    """A mask over the tokens leaves the key-value prompts visible; hiding all later tokens is the causal flag."""
    attached = attach("e2vpt", build("plain").double(), num_prompts=P, num_kv=N)
    attention, x = attached.model.blocks[0].attn, torch.randn(2, 6, 32, dtype=torch.float64)
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    causal = attention(x, is_causal=True)
    assert torch.allclose(attention(x, attn_mask=lower), causal, rtol=0, atol=1e-12)
    changed = x.clone()
    changed[:, 3:] += 1.0
    assert torch.allclose(attention(changed, is_causal=True)[:, :3], causal[:, :3], rtol=0, atol=1e-12)
    with torch.no_grad():
        attention.remap_key_values.key_values.add_(1.0)
    assert not torch.allclose(attention(x, is_causal=True)[:, 0], causal[:, 0])


def test_detach_gives_the_attention_back(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    base, attached = build("beit"), attach("e2vpt", build("beit"))
    attached.detach()
    assert torch.equal(attached.model(tools.images()), base(tools.images()))
    assert all("forward" not in vars(block.attn) for block in attached.model.blocks)
    assert anatomy_of(attached.model) == anatomy_of(base)


def train(attached: Attached, tools: SimpleNamespace, steps: range, total: int) -> list[dict[str, Tensor]]:
    """Plain gradient steps; gives the gradients and values of the prompts in front of each."""
    seen = []
    prompts = tools.trained(attached)["remap_prompts.prompts"]
    for step in steps:
        attached.model.zero_grad()
        loss = nn.functional.cross_entropy(attached.model(tools.images(4, seed=step)), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        seen.append({"gradient": prompts.grad.clone(), "value": prompts.detach().clone()})
        with torch.no_grad():
            for parameter in tools.trained(attached).values():
                parameter -= 0.5 * parameter.grad
        attached.after_step(step, total)
    return seen


PRUNING = {"num_prompts": P, "num_kv": N, "dropout": 0.0, "prune_tokens": 0.5, "prune_segments": 0.25, "prune_at": 0.5}


@pytest.mark.parametrize("options", [{}, {"segments": "interleaved"}, {"quota": "all"}])
def test_the_least_important_tokens_and_segments_go_and_the_rest_starts_again(
    build: Build, attach: Attach, tools: SimpleNamespace, options: dict
) -> None:
    """Importance is the mean |dL/dm| of a mask m of ones, here by differentiating through the mask itself."""
    attached = attach("e2vpt", build("plain"), **PRUNING, **options)
    first = {name: value for name, value in attached.state().items() if "mask" not in name}
    twin = copy.deepcopy(attached.model)
    masks = {name: dict(twin.named_buffers())[f"remap_prompts.{name}"] for name in ("token_mask", "segment_mask")}
    importance = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for step in range(3):
        for mask in masks.values():
            mask.grad = None
            mask.requires_grad_(True)
        twin_prompts = twin.remap_prompts.prompts
        with torch.no_grad():
            for name, parameter in tools.trained(attached).items():
                dict(twin.named_parameters())[name].copy_(parameter)
        assert torch.equal(twin_prompts, tools.trained(attached)["remap_prompts.prompts"])
        loss = nn.functional.cross_entropy(twin(tools.images(4, seed=step)), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        for name, mask in masks.items():
            importance[name] += mask.grad.abs()
        train(attached, tools, range(step, step + 1), 6)
    state = attached.state()
    tokens, segments = state["remap_prompts.token_mask"], state["remap_prompts.segment_mask"]
    assert set(importance["token_mask"].argsort()[:2].tolist()) == set((tokens == 0).nonzero().flatten().tolist())
    kept = tokens.bool()
    # A quarter of the 16 segments of each of 2 tokens, or of the 32 of both.
    groups = 1 if options.get("quota") == "all" else 2
    ranked = importance["segment_mask"][kept].view(groups, -1).argsort(dim=1)[:, : 8 // groups]
    gone = (segments[kept].view(groups, -1) == 0).nonzero()[:, 1].view(groups, -1)
    assert torch.equal(ranked.sort(dim=1).values, gone)
    assert all(torch.equal(state[name], value) for name, value in first.items())


@pytest.mark.parametrize(
    ("options", "channels"), [({}, slice(10, 12)), ({"segments": "interleaved"}, slice(5, 32, 16))]
)
def test_pruned_entries_are_zero_in_every_block(
    build: Build, attach: Attach, tools: SimpleNamespace, formula: SimpleNamespace, options: dict, channels: slice
) -> None:
    """32 channels in 16 segments of 2: the sixth has channels 10 and 11, or 5 and 21."""
    base, images = build("dinov2_registers").double(), tools.images().double()
    attached = attach("e2vpt", build("dinov2_registers").double(), **PRUNING, **options)
    tools.shake(attached)
    tokens, segments = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.ones(P, SEGMENTS)
    segments[2, 5] = 0.0
    attached.load({**attached.state(), "remap_prompts.token_mask": tokens, "remap_prompts.segment_mask": segments})
    pruned = prompts_of(attached)
    pruned[:, 1] = 0.0
    pruned[:, 2, channels] = 0.0
    wanted = formula.sequence(base, images, dict(enumerate(pruned)), key_values(attached))
    assert torch.allclose(attached.model(images), wanted, rtol=0, atol=1e-10)


def test_pruning_is_the_same_when_training_was_interrupted(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    whole = attach("e2vpt", build("plain"), **PRUNING)
    train(whole, tools, range(4), 6)
    before = attach("e2vpt", build("plain"), **PRUNING)
    train(before, tools, range(2), 6)
    state, memory = before.state(), {name: value.clone() for name, value in before.memory().items()}
    resumed = attach("e2vpt", build("plain"), seed=99, **PRUNING)
    assert set(resumed.memory()) == set(memory)
    resumed.load(state)
    resumed.recall(memory)
    train(resumed, tools, range(2, 4), 6)
    wanted, found = whole.state(), resumed.state()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert (found["remap_prompts.token_mask"] == 0).sum() == 2


def test_pruning_rewinds_to_what_the_run_before_has_learned(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    """As `extend` does: attach, take over what was learned, begin the session. Without, all of it would be lost."""
    attached = attach("e2vpt", build("plain"), seed=99, **PRUNING)
    learned = {name: value + 0.25 for name, value in attached.state().items() if "mask" not in name}
    attached.load({**attached.state(), **learned})
    attached.start_session()
    train(attached, tools, range(3), 6)
    state = attached.state()
    assert (state["remap_prompts.token_mask"] == 0).sum() == 2
    assert all(torch.equal(state[name], value) for name, value in learned.items())


def test_pruning_follows_a_model_that_is_converted_after_attaching(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    """What the method remembers outside the model goes where the model goes; the rewind is to the same numbers."""
    attached = attach("e2vpt", build("plain"), **PRUNING)
    first = {name: value.double() for name, value in attached.state().items() if "mask" not in name}
    model = attached.model.double()
    for step in range(3):
        model.zero_grad()
        model(tools.images().double()).square().sum().backward()
        with torch.no_grad():
            for parameter in tools.trained(attached).values():
                parameter -= 0.5 * parameter.grad
        attached.after_step(step, 6)
    assert all(value.dtype == torch.float64 for value in attached.memory().values())
    state = attached.state()
    assert (state["remap_prompts.token_mask"] == 0).sum() == 2
    assert all(torch.equal(state[name], value) for name, value in first.items())


def test_nothing_is_pruned_by_default(build: Build, attach: Attach) -> None:
    attached = attach("e2vpt", build("plain"))
    assert not attached.buffers
    assert type(attached) is Attached


def test_trained_parameters(count_on_meta: Callable[..., int]) -> None:
    """L*(p + n)*D = 12 * 15 * 768."""
    assert count_on_meta("vit_base_patch16_224", "e2vpt", {}) == 138_240 == METHODS.row("e2vpt").vit_base
    assert count_on_meta("vit_base_patch16_224", "e2vpt", {"num_kv": 1, "prune_tokens": 0.5}) == 12 * 11 * 768
