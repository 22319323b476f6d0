"""Every family on tiny models: what the anatomy says, against what the model does. All in float64."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

from remap.backbones.anatomy import (
    AttentionBlock,
    AttentionScores,
    ConvBlock,
    admit_tokens,
    anatomy_of,
    module_at,
    rest_of_forward,
    set_fused_attention,
    tensor_at,
    watch_attention,
)
from remap.backbones.build import fresh_head
from remap.backbones.families import FAMILIES, PARTS
from remap.errors import BackboneError
from remap.pipeline.probe import write_head
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]


def images_for(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *anatomy_of(model).image_size, dtype=torch.float64)


def recorded(model: nn.Module, path: str, images: Tensor, what: str = "output") -> Tensor:
    """What the module at ``path`` takes or gives in one pass of ``forward_features``."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        found.append((output if what == "output" else args[0]).detach().clone())

    handle = module_at(model, path).register_forward_hook(keep)
    with torch.no_grad():
        model.forward_features(images)
    handle.remove()
    (tensor,) = found
    return tensor


def test_every_row_is_a_whole_family() -> None:
    for row in FAMILIES:
        family = row.load()
        assert not family.__abstractmethods__, row.name
        assert row.parts <= set(PARTS)


def test_shapes_are_those_of_the_forward(tiny_name: str, tiny_model: Build) -> None:
    """Source: the tensors of timm's own forward."""
    model = tiny_model(tiny_name)
    anatomy, images = anatomy_of(model), images_for(model)
    assert anatomy.depth == len(anatomy.blocks)
    for block in anatomy.blocks:
        x = recorded(model, block.block, images)
        if "sequence" in anatomy.parts:
            assert x.shape[1:] == (anatomy.num_prefix_tokens + anatomy.num_patches, block.width)
            assert block.grid == anatomy.grid
        elif block.channels_last:
            assert x.shape[1:] == (*block.grid, block.width)
        else:
            assert x.shape[1:] == (block.width, *block.grid)
    assert anatomy.grid == anatomy.blocks[-1].grid
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert features.shape == (2, anatomy.width)


def test_norms_are_all_there_are(tiny_name: str, tiny_model: Build) -> None:
    """Source: all modules of the model whose class is a norm of torch or timm."""
    model = tiny_model(tiny_name)
    anatomy = anatomy_of(model)
    kinds = (nn.LayerNorm, nn.modules.batchnorm._NormBase, nn.GroupNorm, timm.layers.RmsNorm)
    there = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    outside = {*anatomy.embedding_norms, anatomy.final_norm} - {None}
    inside = [norm for block in anatomy.blocks for norm in block.norms]
    assert outside | set(inside) == there and len(inside) == len(set(inside))
    for block in anatomy.blocks:
        order: list[str] = []
        for norm in block.norms:
            module_at(model, norm).register_forward_hook(lambda *_, norm=norm, order=order: order.append(norm))
        model.forward_features(images_for(model, 1))
        assert tuple(order) == block.norms


def test_input_module_takes_the_image(tiny_name: str, tiny_model: Build) -> None:
    model = tiny_model(tiny_name)
    images = images_for(model)
    assert torch.equal(recorded(model, anatomy_of(model).input_module, images, "input"), images)


@torch.no_grad()
def test_rest_of_forward_is_the_rest(tiny_name: str, tiny_model: Build) -> None:
    """Source: timm's ``forward_features``, entered with its own tensors in front of each block."""
    model = tiny_model(tiny_name)
    anatomy, images = anatomy_of(model), images_for(model)
    whole = model.forward_features(images)
    for index, block in enumerate(anatomy.blocks):
        x = recorded(model, block.block, images, "input")
        assert torch.equal(rest_of_forward(model, anatomy, index, x), whole), index
    x = recorded(model, anatomy.blocks[-1].block, images)
    assert torch.equal(rest_of_forward(model, anatomy, anatomy.depth, x), whole)


def test_rest_of_forward_under_gradient_checkpointing(tiny_name: str, tiny_model: Build) -> None:
    """Source: the same gradient without checkpointing."""
    model = tiny_model(tiny_name)
    anatomy, images = anatomy_of(model), images_for(model)
    x, gradients = recorded(model, anatomy.blocks[1].block, images, "input"), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        start = x.clone().requires_grad_()
        rest_of_forward(model, anatomy, 1, start).square().sum().backward()
        gradients.append(start.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_branch_ends_are_added_to_the_residual_stream(attention_name: str, tiny_model: Build) -> None:
    """Closed form: mid = x + attn_branch(x), out = mid + mlp_branch(mid); a constant c at a branch's end adds c."""
    model = tiny_model(attention_name)
    anatomy, images = anatomy_of(model), images_for(model)
    for block in anatomy.blocks:
        constant = torch.randn(block.width, dtype=torch.float64)
        x = recorded(model, block.block, images, "input")
        run = partial(_run_one, model, block, x)
        plain = run()
        flat = plain["mid"].shape
        torch.testing.assert_close(plain["mid"], (x + plain["attn_end"].reshape_as(x)).reshape(flat))
        torch.testing.assert_close(plain["out"].reshape(flat), plain["mid"] + plain["mlp_end"].reshape(flat))
        scale = 1.0 if block.attn_scale is None else tensor_at(model, block.attn_scale)
        if not anatomy.family.startswith("swin"):  # whose attention modules see windows
            torch.testing.assert_close(plain["attn_end"], scale * plain["attn"])
        scale = 1.0 if block.mlp_scale is None else tensor_at(model, block.mlp_scale)
        norm = module_at(model, block.norm2) if block.norms_behind else nn.Identity()
        torch.testing.assert_close(plain["mlp_end"], scale * norm(plain["mlp"]))

        shifted = run(block.mlp_branch_end, constant)
        torch.testing.assert_close(shifted["out"], plain["out"] + constant)
        shifted = run(block.attn_branch_end, constant)
        torch.testing.assert_close(shifted["mid"], plain["mid"] + constant)
        torch.testing.assert_close(shifted["out"].reshape(flat), shifted["mid"] + shifted["mlp_end"].reshape(flat))


def _run_one(
    model: nn.Module, block: AttentionBlock, x: Tensor, shifted: str | None = None, constant: Tensor | None = None
) -> dict[str, Tensor]:
    """One block on its own, with ``constant`` added to the output of the module at ``shifted``."""
    found: dict[str, Tensor] = {}
    watched = {
        "attn": block.attn,
        "attn_end": block.attn_branch_end,
        "mlp": block.mlp,
        "mlp_end": block.mlp_branch_end,
    }
    handles = []
    if shifted is not None:
        handles.append(module_at(model, shifted).register_forward_hook(lambda m, args, output: output + constant))
    for word, path in watched.items():
        handles.append(module_at(model, path).register_forward_hook(partial(_keep, found, word)))
    first = module_at(model, block.mlp if block.norms_behind else block.norm2)
    handles.append(first.register_forward_pre_hook(lambda m, args: found.update(mid=args[0])))
    rope = {}
    if getattr(model, "rope", None) is not None:
        angles = torch.linspace(-3, 3, 16 * block.head_dim, dtype=torch.float64).reshape(16, block.head_dim)
        rope = {"rope": torch.cat([angles.sin(), angles.cos()], dim=-1)}
    with torch.no_grad():
        found["out"] = module_at(model, block.block)(x, **rope)
    for handle in handles:
        handle.remove()
    return found


def _keep(found: dict[str, Tensor], word: str, module: nn.Module, args: tuple, output: Tensor) -> None:
    found[word] = output


def test_branch_ends_of_convolutional_blocks(convolutional_name: str, tiny_model: Build) -> None:
    """Closed form: a large constant at the branch's end passes the ReLU of a residual network unchanged."""
    model = tiny_model(convolutional_name)
    anatomy, images = anatomy_of(model), images_for(model)
    assert "convolutions" in anatomy.parts
    for block in anatomy.blocks:
        assert isinstance(block, ConvBlock)
        x, module = recorded(model, block.block, images, "input"), module_at(model, block.block)
        sums = []
        for constant in (1e3, 1.5e3):
            end = module_at(model, block.branch_end)
            handle = end.register_forward_hook(lambda m, args, output, constant=constant: output + constant)
            sums.append(module(x.clone()))
            handle.remove()
        torch.testing.assert_close(sums[1], sums[0] + 500)
        if anatomy.family == "convnext":
            torch.testing.assert_close(sums[0], module(x) + 1e3)
        for site in block.convs:
            conv, seen = module_at(model, site.conv), recorded(model, site.conv, images)
            assert isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1)
            normed = recorded(model, site.norm, images, "input")
            assert torch.equal(seen.permute(0, 2, 3, 1) if normed.shape != seen.shape else seen, normed)


def test_projections_are_the_rows_that_act(attention_name: str, tiny_model: Build) -> None:
    """Closed form: without values attention gives norm(0) of its inner norm and then the bias of its output layer;
    without queries and keys every row of the map is uniform where nothing else is added to the scores."""
    model = tiny_model(attention_name)
    anatomy, images = anatomy_of(model), images_for(model)
    for block in anatomy.blocks:
        projections = block.projections
        assert set(projections) - {"fc1_gate"} == {"q", "k", "v", "o", "fc1", "fc2"}
        assert projections["q"].stop - projections["q"].start == block.heads * block.head_dim
        assert projections["fc1"].stop - projections["fc1"].start == block.mlp_hidden
        x = recorded(model, block.attn, images, "input")
        for word, projection in projections.items():
            rows = module_at(model, projection.path).weight[projection.rows]
            if projection.bias is not None:
                stop = projection.bias_start + projection.stop - projection.start
                assert tensor_at(model, projection.bias)[projection.bias_start : stop].shape == rows.shape[:1], word
        twin = copy.deepcopy(model)
        _zero(twin, projections["v"])
        silent = torch.zeros(*x.shape[:2], projections["o"].stop - projections["o"].start, dtype=torch.float64)
        silent = silent[..., :1].expand(-1, -1, block.heads * block.head_dim)
        inner = getattr(module_at(twin, block.attn), "norm", nn.Identity())
        expected = module_at(twin, block.proj)(inner(silent))
        torch.testing.assert_close(module_at(twin, block.attn)(x), expected)
        for word in ("fc1", "fc1_gate"):
            if word in projections:
                twin = copy.deepcopy(model)
                _zero(twin, projections[word])
                mlp = module_at(twin, block.mlp)
                hidden = torch.zeros(1, block.mlp_hidden, dtype=torch.float64)
                expected = mlp.fc2(getattr(mlp, "norm", nn.Identity())(hidden))
                torch.testing.assert_close(mlp(x), expected.expand_as(mlp(x)))


def _zero(model: nn.Module, projection: object) -> None:
    with torch.no_grad():
        module_at(model, projection.path).weight[projection.rows] = 0
        if projection.bias is not None:
            size = projection.stop - projection.start
            tensor_at(model, projection.bias)[projection.bias_start : projection.bias_start + size] = 0


def test_queries_and_keys_rows(attention_name: str, tiny_model: Build) -> None:
    """Closed form: scores of zero give a uniform map. Query and key norms and position biases are taken away."""
    model = tiny_model(attention_name)
    anatomy, images = anatomy_of(model), images_for(model)
    set_fused_attention(model, anatomy, False)
    for word in ("q", "k"):
        twin, maps = copy.deepcopy(model), list[Tensor]()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if "q_norm" in name or "k_norm" in name or "relative_position" in name or "cpb" in name:
                    parameter.zero_()
        for block in anatomy.blocks:
            _zero(twin, block.projections[word])
            module_at(twin, block.attn).attn_drop.register_forward_pre_hook(
                lambda m, args, maps=maps: maps.append(args[0])
            )
        twin.forward_features(images)
        assert len(maps) == anatomy.depth
        for block, found in zip(anatomy.blocks, maps, strict=True):
            # Shifted windows mask what is not in the window.
            live = found > 1e-20
            expected = live.double() / live.sum(dim=-1, keepdim=True)
            torch.testing.assert_close(found, expected)
            assert block.heads == found.shape[1]


def test_called_says_whether_a_hook_would_run(attention_name: str, tiny_model: Build) -> None:
    """Source: hooks on timm's own forward."""
    model = tiny_model(attention_name)
    anatomy, ran = anatomy_of(model), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    model(images_for(model))
    for block in anatomy.blocks:
        for word, projection in block.projections.items():
            assert projection.called == (projection.path in ran), word
    assert set(anatomy.classifier_heads) <= ran


def test_cosine_attention_of_windows_in_closed_form(tiny_model: Build) -> None:
    """Liu et al. 2021 (arXiv 2111.09883), equation 2: softmax(cos(q, k) / tau + B) v, from the anatomy's rows."""
    model = tiny_model("swinv2")
    for block in anatomy_of(model).attention_blocks:
        attention, words = module_at(model, block.attn), block.projections
        x = torch.randn(3, 16, block.width, dtype=torch.float64)
        q, k, v = (
            (x @ module_at(model, p.path).weight[p.rows].mT + tensor_at(model, p.bias)).unflatten(-1, (block.heads, -1))
            for p in (words["q"], words["k"], words["v"])
        )
        cosines = torch.cosine_similarity(q[:, :, None], k[:, None], dim=-1)  # (windows, query, key, heads)
        cells = [(row, column) for row in range(4) for column in range(4)]
        bias = torch.stack([torch.stack([_position_bias(attention, a, b) for b in cells]) for a in cells])
        scores = cosines * attention.logit_scale.flatten().exp().clamp(max=100) + bias
        mixed = torch.einsum("wqkh,wkhd->wqhd", scores.softmax(dim=2), v).flatten(2)
        torch.testing.assert_close(module_at(model, block.proj)(mixed), attention(x))


def _position_bias(attention: nn.Module, query: tuple[int, int], key: tuple[int, int]) -> Tensor:
    """16 sigmoid of an MLP of sign(d) log2(1 + 8 |d| / 3) / 3, d the offsets in a window of 4 x 4: one value a head."""
    offset = 8 * (torch.tensor(query, dtype=torch.float64) - torch.tensor(key)) / 3
    return 16 * attention.cpb_mlp(offset.sign() * torch.log2(1 + offset.abs()) / 3).sigmoid()


def test_fused_attention_is_a_choice_of_kernel_only(attention_name: str, tiny_model: Build) -> None:
    model = tiny_model(attention_name)
    anatomy, images, outputs = anatomy_of(model), images_for(model), []
    for enabled in (True, False):
        set_fused_attention(model, anatomy, enabled)
        assert all(module_at(model, block.attn).fused_attn == enabled for block in anatomy.blocks)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)


def test_biases_are_those_that_are_added(sequence_name: str, tiny_model: Build) -> None:
    """Source: autograd. The bias a projection names is in the graph, except the key's zero buffer in Eva and BEiT."""
    model = tiny_model(sequence_name)
    anatomy = anatomy_of(model)
    model(images_for(model)).square().sum().backward()
    for block in anatomy.blocks:
        for word, projection in block.projections.items():
            if projection.bias is not None:
                bias = tensor_at(model, projection.bias)
                assert (bias.grad is not None) == isinstance(bias, nn.Parameter), word
                assert isinstance(bias, nn.Parameter) or (word == "k" and not bias.any())


# --- queries, keys and values


def watched(model: nn.Module, block: int, images: Tensor, values: bool = True) -> tuple[AttentionScores, Tensor]:
    """What ``watch_attention`` gives of a block, and what timm gives its output layer in the same pass."""
    anatomy, scores, mixed = anatomy_of(model), list[AttentionScores](), list[Tensor]()
    handles = watch_attention(model, anatomy, block, scores.append, values=values)
    handles.append(
        module_at(model, anatomy.blocks[block].proj).register_forward_pre_hook(lambda m, args: mixed.append(args[0]))
    )
    model(images)
    for handle in handles:
        handle.remove()
    assert len(scores) == 1
    return scores[0], mixed[0]


def attended(model: nn.Module, block: int, scores: AttentionScores) -> Tensor:
    """The textbook formula: softmax(q k^T + bias) v, heads side by side, and the norm some modules have behind it."""
    map_BHTT = scores.q_BHTh @ scores.k_BHTh.mT + (0 if scores.bias_HTT is None else scores.bias_HTT)
    merged_BTE = torch.einsum("bhst,bhtd->bshd", map_BHTT.softmax(-1), scores.v_BHTh).flatten(2)
    return getattr(module_at(model, anatomy_of(model).blocks[block].attn), "norm", nn.Identity())(merged_BTE)


def assert_attention_is_timms(model: nn.Module, images: Tensor, parameters: dict[str, Tensor]) -> set[str]:
    """Value and gradient of ``attended`` are those of timm's own pass.

    Returns:
        The parameters that the watched values depend on.
    """
    reached: set[str] = set()
    for block in range(len(model.blocks)):
        scores, mixed = watched(model, block, images)
        found = attended(model, block, scores)
        torch.testing.assert_close(found, mixed, rtol=1e-5, atol=1e-7)
        weights = torch.randn_like(mixed)
        gradients = [
            torch.autograd.grad((x * weights).sum(), parameters.values(), retain_graph=True, allow_unused=True)
            for x in (found, mixed)
        ]
        for name, mine, timms in zip(parameters, *gradients, strict=True):
            # The zero that an unused parameter has not.
            mine, timms = (torch.zeros_like(parameters[name]) if g is None else g for g in (mine, timms))
            torch.testing.assert_close(mine, timms, rtol=1e-5, atol=1e-7, msg=f"{name}, block {block}")
        alone = torch.autograd.grad(scores.v_BHTh.sin().sum(), parameters.values(), allow_unused=True)
        reached |= {name for name, g in zip(parameters, alone, strict=True) if g is not None and g.abs().sum() > 0}
    return reached


@pytest.mark.parametrize("fused", [False, True])
def test_values_are_what_attention_mixes(sequence_name: str, fused: bool, tiny_model: Build) -> None:
    """Source: the input of timm's output layer, and autograd through timm's own forward."""
    model = tiny_model(sequence_name)
    anatomy = anatomy_of(model)
    set_fused_attention(model, anatomy, fused)
    reached = assert_attention_is_timms(model, images_for(model), dict(model.named_parameters()))
    for block in anatomy.blocks:
        value = block.projections["v"]
        assert f"{value.path}.weight" in reached
        assert value.bias is None or value.bias in reached
    scores, _ = watched(model, 0, images_for(model), values=False)
    assert scores.v_BHTh is None


@pytest.mark.parametrize("name", ["eva02_fused", "eva_no_rope", "dinov3_bias", "beit", "beit_shared_only"])
def test_values_with_biases_added_separately(name: str, tiny_model: Build) -> None:
    model = tiny_model(name)
    for block in model.blocks:
        assert block.attn.v_bias is not None
        block.attn.qkv_bias_separate = True
    reached = assert_attention_is_timms(model, images_for(model), dict(model.named_parameters()))
    assert "blocks.0.attn.v_bias" in reached


@pytest.mark.parametrize("method", ["lora", "bitfit", "ssf", "boft", "vpt_deep", "full"])
@pytest.mark.parametrize("name", ["vit", "vit_avg", "eva02_fused", "eva02_split", "dinov3_bias", "beit", "beit_shared"])
def test_values_of_a_tuned_model(name: str, method: str, tiny_model: Build) -> None:
    """Source: as above, with every tuned parameter away from where it starts."""
    model = tiny_model(name)
    attached = attach_method(model, anatomy_of(model), method, {"targets": ("v",)} if method == "lora" else {})
    model.double().eval()
    tuned = {key: p for key, p in model.named_parameters() if key in attached.trainable}
    with torch.no_grad():
        for parameter in tuned.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    reached = assert_attention_is_timms(model, images_for(model), tuned)
    assert reached == set(tuned) if method == "lora" else reached


# --- more tokens


def prompted(model: nn.Module, count: int) -> list:
    """Insert random tokens behind the prefix in front of block 0, and cut them behind the last block."""
    anatomy = anatomy_of(model)
    at = anatomy.num_prefix_tokens
    prompts = torch.randn(1, count, anatomy.width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def insert(module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        return (torch.cat([x[:, :at], prompts.expand(len(x), -1, -1), x[:, at:]], dim=1), *args[1:])

    def cut(module: nn.Module, args: tuple, x: Tensor) -> Tensor:
        return torch.cat([x[:, :at], x[:, at + count :]], dim=1)

    return [
        module_at(model, anatomy.blocks[0].block).register_forward_pre_hook(insert),
        module_at(model, anatomy.blocks[-1].block).register_forward_hook(cut),
    ]


def test_prompts_attend_and_undo_is_exact(sequence_name: str, tiny_model: Build) -> None:
    model = tiny_model(sequence_name)
    anatomy, images = anatomy_of(model), images_for(model)
    keys, plain = list(model.state_dict()), model(images)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    undo = [admit_tokens(model, anatomy, 2), admit_tokens(model, anatomy, 1)]
    hooks = prompted(model, 3)
    assert list(model.state_dict()) == keys
    assert not torch.allclose(model(images), plain)
    for handle in hooks:
        handle.remove()
    for step in undo:  # the order does not matter
        step()
    assert torch.equal(model(images), plain)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


@pytest.mark.parametrize("name", ["eva02_fused", "dinov3", "rope_mixed", "beit", "beit_shared"])
def test_without_room_prompts_do_not_fit(name: str, tiny_model: Build) -> None:
    """Why ``admit_tokens`` is there: timm's own error."""
    model = tiny_model(name)
    prompted(model, 3)
    with pytest.raises(RuntimeError, match="must match"):
        model(images_for(model))


def test_prompted_attention_in_closed_form(tiny_model: Build) -> None:
    """softmax(q k^T / sqrt(h) + b) v over class token, prompts, patches; b is timm's bias with zeros for prompts."""
    model = tiny_model("beit")
    attention, width = model.blocks[0].attn, 32
    bias = attention._get_rel_pos_bias()[0].detach()
    admit_tokens(model, anatomy_of(model), 3)
    x = torch.randn(2, 1 + 3 + 16, width, dtype=torch.float64)
    whole = torch.zeros(2, 20, 20, dtype=torch.float64)
    old = torch.tensor([0, *range(4, 20)])
    whole[:, old[:, None], old[None, :]] = bias
    weights = attention.qkv.weight.reshape(3, 2, 16, width)
    q, k, v = (torch.einsum("btd,hed->bhte", x, weight) for weight in weights)
    q, v = q + attention.q_bias.reshape(2, 1, 16), v + attention.v_bias.reshape(2, 1, 16)
    out = (q @ k.mT / 4.0 + whole).softmax(-1) @ v
    expected = attention.proj(out.transpose(1, 2).reshape(2, 20, width))
    torch.testing.assert_close(attention(x), expected)


def test_prompts_are_not_rotated(tiny_model: Build) -> None:
    """Two equal prompts get equal outputs from a block, wherever they stand; two equal patches do not."""
    model = tiny_model("dinov3")
    admit_tokens(model, anatomy_of(model), 2)
    x = torch.randn(1, 5 + 2 + 16, 32, dtype=torch.float64)
    x[:, 6] = x[:, 5]
    x[:, 8] = x[:, 7]
    y = model.blocks[0](x, rope=model.rope.get_embed(shape=(4, 4)))
    torch.testing.assert_close(y[:, 6], y[:, 5])
    assert not torch.allclose(y[:, 8], y[:, 7])


@pytest.mark.parametrize("name", ["vit", "eva02_fused", "dinov3", "beit", "beit_shared"])
@pytest.mark.slow
def test_room_survives_a_deep_copy_and_checkpointing_and_compile(name: str, tiny_model: Build) -> None:
    model = tiny_model(name)
    anatomy, images = anatomy_of(model), images_for(model)
    undo = admit_tokens(model, anatomy, 3)
    hooks = prompted(model, 3)
    expected = model(images)
    twin = copy.deepcopy(model)
    undo()
    for handle in hooks:
        handle.remove()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # The copy keeps its room and reads its own parameters.
    assert torch.equal(twin(images), expected)

    gradients = []
    for checkpointing in (False, True):
        twin.set_grad_checkpointing(checkpointing)
        twin.zero_grad()
        twin(images).square().sum().backward()
        gradients.append(twin.get_parameter(f"{anatomy.blocks[0].fc1}.weight").grad.clone())
    torch.testing.assert_close(*gradients)
    twin.set_grad_checkpointing(False)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(twin, backend="eager")(images), expected)


@torch.no_grad()
def test_rest_of_forward_with_prompts(sequence_name: str, tiny_model: Build) -> None:
    model = tiny_model(sequence_name)
    anatomy, images = anatomy_of(model), images_for(model)
    admit_tokens(model, anatomy, 3)
    prompted(model, 3)
    whole = model.forward_features(images)
    x = recorded(model, anatomy.blocks[1].block, images, "input")
    assert torch.equal(rest_of_forward(model, anatomy, 1, x), whole)


def test_models_with_stages_take_no_tokens(tiny_model: Build) -> None:
    for name in ("swin", "convnext", "resnet_basic"):
        model = tiny_model(name)
        with pytest.raises(BackboneError, match="cannot take more tokens"):
            admit_tokens(model, anatomy_of(model), 3)


# --- the classifier


def test_a_fresh_head_is_the_whole_classifier(tiny_name: str, tiny_model: Build) -> None:
    """Source: with weights of zero and known biases the logits are the biases."""
    model = tiny_model(tiny_name)
    anatomy, images = anatomy_of(model), images_for(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if not anatomy.is_head(k)}
    fresh_head(model, anatomy, 7)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key for key in after if key not in before} == {
        f"{path}.{part}" for path in anatomy.classifier_heads for part in ("weight", "bias")
    }
    assert model(images).shape == (2, 7)
    with torch.no_grad():
        for path in anatomy.classifier_heads:
            head = module_at(model, path)
            assert head.weight.shape == (7, anatomy.width) and not head.bias.any()
            head.weight.zero_()
            head.bias.copy_(torch.arange(7))
    torch.testing.assert_close(model(images), torch.arange(7.0, dtype=torch.float64).expand(2, 7))


def test_a_probe_is_written_into_the_classifier(tiny_name: str, tiny_model: Build) -> None:
    """Source: the linear map itself, of the features that enter the classifier."""
    model = tiny_model(tiny_name)
    anatomy, images = anatomy_of(model), images_for(model)
    weight, bias = torch.randn(4, anatomy.width, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    write_head(SimpleNamespace(model=model, anatomy=anatomy), weight.numpy(), bias.numpy())
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model(images), features @ weight.mT + bias)


def test_pooled_class_token(sequence_name: str, tiny_model: Build) -> None:
    """Source: autograd. Which tokens behind the final norm reach the logits?"""
    model = tiny_model(sequence_name)
    anatomy = anatomy_of(model)
    tokens = model.forward_features(images_for(model)).detach().requires_grad_()
    model.forward_head(tokens).sum().backward()
    reached = tokens.grad.abs().sum(dim=(0, 2)) > 0
    only_class = bool(reached[0]) and not reached[1:].any()
    assert anatomy.class_token_pooled == (only_class and anatomy.final_norm == "norm")


# --- which models are read


NAMES = {
    "vit": """vit_tiny_patch16_224 vit_huge_patch14_224 vit_small_r26_s32_224 vit_base_patch16_clip_224
        vit_base_patch16_siglip_224 vit_small_patch14_dinov2 vit_giant_patch14_reg4_dinov2 flexivit_small
        deit_tiny_patch16_224 deit_base_distilled_patch16_224 deit3_large_patch16_224 eva_large_patch14_196
        vit_little_patch16_reg4_gap_256 beit3_base_patch16_224 vit_mini_teacher_patch4_32""",
    "eva": """eva02_tiny_patch14_224 eva02_base_patch14_224 eva02_base_patch16_clip_224 vit_small_patch16_dinov3
        vit_base_patch16_dinov3_qkvb vit_small_plus_patch16_dinov3 vit_pe_core_base_patch16_224
        vit_pe_spatial_tiny_patch16_512 vit_small_patch16_rope_mixed_224""",
    "naflexvit": "naflexvit_base_patch16_gap naflexvit_base_patch16_siglip naflexvit_large_patch16_radio_v3",
    "beit": "beit_base_patch16_224 beitv2_base_patch16_224 beitv2_large_patch16_224",
    "swin": "swin_tiny_patch4_window7_224 swin_base_patch4_window12_384 swin_s3_tiny_224",
    "swinv2": "swinv2_tiny_window8_256",
    "convnext": "convnext_tiny convnext_atto convnext_zepto_rms convnext_nano_ols convnextv2_nano convnext_tiny_hnf",
    "resnet": "resnet18 resnet50 resnet50d resnet26t seresnet50 resnext50_32x4d wide_resnet50_2 resnetrs50",
}


@pytest.mark.parametrize(("family", "name"), [(f, name) for f, names in NAMES.items() for name in names.split()])
def test_names_of_timm_are_read(family: str, name: str) -> None:
    """Source: timm's forward on the meta device, at the size of its own configuration."""
    with torch.device("meta"):
        model = timm.create_model(name)
        anatomy = anatomy_of(model)
        assert anatomy.family == family
        features = model.forward_features(torch.zeros(1, 3, *anatomy.image_size))
    if "sequence" in anatomy.parts:
        assert features.shape == (1, anatomy.num_prefix_tokens + anatomy.num_patches, anatomy.width)
    else:
        assert features.numel() == anatomy.num_patches * anatomy.blocks[-1].width


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_18x2_224", {"depth": 1}),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}),
        ("vit_tiny_patch16_224", {"attn_layer": type("Gated", (Attention,), {})}),
        ("vit_small_patch16_dinov3", {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 3}),
        ("eva02_tiny_patch14_224", {"use_post_norm": True}),
    ],
)
def test_unusual_options_are_read_by_their_stages(name: str, options: dict) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    assert anatomy_of(model).family == "generic"


def test_one_gated_or_replaced_block_is_enough_to_be_another_family(tiny_model: Build) -> None:
    for name in ("vit", "dinov3"):
        model = tiny_model(name)
        model.blocks[1].attn.gate = nn.Linear(32, 32)
        assert anatomy_of(model).family == "generic"
    model = tiny_model("resnet_basic")
    model.layer4[0] = nn.Conv2d(24, 32, 1).double()
    assert anatomy_of(model).family == "generic"
