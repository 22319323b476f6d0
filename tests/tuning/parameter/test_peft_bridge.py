"""Changes of whole layers against the untouched timm model in float64 with the papers' weights written into it.

The formulas are written from the papers (ids in the table of methods) and from what each tensor of the state is
called; nothing here calls peft or remap's forward.
"""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.nn import functional as F

import remap
from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning import METHODS
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method
from remap.tuning.parameter.boft import Butterfly
from remap.tuning.parameter.peft_layer import SharedLinear

Weights = dict[str, Tensor]
PEFT = [row.name for row in METHODS if "peft_bridge" in row.target]
ALL = [*PEFT, "pissa", "olora", "boft", "hira"]


def block_diagonal(blocks: Tensor, indices: list[list[int]], size: int) -> Tensor:
    """(size, size) with every block at its rows and columns."""
    matrix = torch.zeros(size, size, dtype=blocks.dtype)
    for block, own in zip(blocks, indices, strict=True):
        matrix[torch.tensor(own)[:, None], torch.tensor(own)] = block
    return matrix


def cayley(skew: Tensor) -> Tensor:
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return (unit - skew) @ torch.linalg.inv(unit + skew)


def dora(w: Tensor, p: Weights, o: dict) -> Tensor:
    v = w + o.get("alpha", o["rank"]) / o["rank"] * p["lora_B"] @ p["lora_A"]
    return p["lora_magnitude_vector"][:, None] * v / v.norm(dim=1, keepdim=True)


def rslora(w: Tensor, p: Weights, o: dict) -> Tensor:
    return w + o.get("alpha", o["rank"]) / math.sqrt(o["rank"]) * p["lora_B"] @ p["lora_A"]


def adalora(w: Tensor, p: Weights, o: dict) -> Tensor:
    rank = o["initial_rank"]
    # peft keeps the divisor away from 0.
    scale = o.get("alpha", rank) / (rank + 1e-5)
    return w + scale * p["lora_B"] @ torch.diag(p["lora_E"].flatten()) @ p["lora_A"]


def loha(w: Tensor, p: Weights, o: dict) -> Tensor:
    product = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    return w + o.get("alpha", o["rank"]) / o["rank"] * product


def lokr(w: Tensor, p: Weights, o: dict) -> Tensor:
    left = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    right = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    kron = torch.cat([torch.cat([element * right for element in row], 1) for row in left], 0)
    return w + o.get("alpha", o["rank"]) / o["rank"] * kron


def oft(w: Tensor, p: Weights, o: dict) -> Tensor:
    size = math.gcd(o["block_size"], w.shape[1])
    upper = torch.zeros(w.shape[1] // size, size, size, dtype=w.dtype)
    for index, (row, column) in enumerate((r, c) for r in range(size) for c in range(r + 1, size)):
        upper[:, row, column] = p["oft_R"][:, index]
    blocks = [list(range(start, start + size)) for start in range(0, w.shape[1], size)]
    return w @ block_diagonal(cayley(upper - upper.mT), blocks, w.shape[1]).T


def boft(w: Tensor, p: Weights, o: dict) -> Tensor:
    """Factor k pairs half-blocks 2^k apart, as a Fourier transform pairs its elements."""
    half, rotation = o["block_size"] // 2, torch.eye(w.shape[1], dtype=w.dtype)
    for k in reversed(range(o["factors"])):
        halves = [list(range(start, start + half)) for start in range(0, w.shape[1], half)]
        pairs = [halves[n] + halves[n + 2**k] for n in range(len(halves)) if n // 2**k % 2 == 0]
        rotation = rotation @ block_diagonal(cayley((p["blocks"][k] - p["blocks"][k].mT) / 2), pairs, w.shape[1])
    return p["scale"][:, None] * (w @ rotation.T)


def vera(w: Tensor, p: Weights, o: dict) -> Tensor:
    a, b = p["vera_A"][:, : w.shape[1]], p["vera_B"][: w.shape[0]]
    return w + torch.diag(p["vera_lambda_b"]) @ b @ torch.diag(p["vera_lambda_d"]) @ a


def randlora(w: Tensor, p: Weights, o: dict) -> Tensor:
    """Every (base j, row r) has a random column of its own; peft counts them with r outside."""
    bases = p["randlora_gamma"].shape[0]
    a, b = p["randlora_A"][:, 0, : w.shape[1]], p["randlora_B"][: w.shape[0], :bases].flatten(1)
    delta = torch.zeros_like(w)
    for r in range(o["rank"]):
        for j in range(bases):
            row = p["randlora_lambda"][r, j] * a[r] * p["randlora_gamma"][j]
            delta += torch.outer(b[:, r * bases + j], row)
    return w + o["alpha"] / o["rank"] * delta


def ia3(w: Tensor, p: Weights, o: dict) -> Tensor:
    """(o, 1) scales outputs, (1, i) inputs."""
    return w * p["ia3_l"]


def hra(w: Tensor, p: Weights, o: dict) -> Tensor:
    for u in p["hra_u"].T:
        w = w @ (torch.eye(len(u), dtype=w.dtype) - 2 * torch.outer(u, u) / u.dot(u))
    return w


def road(w: Tensor, p: Weights, o: dict) -> Tensor:
    pairs = w.shape[0] // 2
    theta, alpha = (p[f"road_{name}"].reshape(pairs, -1) for name in ("theta", "alpha"))
    # Index of angle and scale in a pair for the elements (0, 0), (0, 1), (1, 0), (1, 1).
    places = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 4: (0, 2, 3, 1)}[o.get("per_pair", 1)]
    cos_0, sin_0, sin_1, cos_1 = (
        (alpha[:, at] * function(theta[:, at]))[:, None]
        for at, function in zip(places, (torch.cos, torch.sin, torch.sin, torch.cos), strict=True)
    )
    even, odd = w[0::2], w[1::2]
    return torch.stack([cos_0 * even - sin_0 * odd, sin_1 * even + cos_1 * odd], 1).flatten(0, 1)


def miss(w: Tensor, p: Weights, o: dict) -> Tensor:
    shards = math.ceil(w.shape[1] / o["rank"])
    return w + p["miss_block"].T.repeat(1, shards)[:, : w.shape[1]]


def hira(w: Tensor, p: Weights, o: dict) -> Tensor:
    return w + w * (p["hira_B"] @ p["hira_A"])


def gralora(w: Tensor, p: Weights, o: dict) -> Tensor:
    """Block (m, n) is B[m, n] A[n, m] with factors of rank r / k."""
    k, rank = o.get("blocks", 2), o["rank"] // o.get("blocks", 2)
    rows, columns = w.shape[0] // k, w.shape[1] // k
    w = w.clone()
    for m in range(k):
        for n in range(k):
            a = p["gralora_A"][n][:, m * rank : (m + 1) * rank].T
            b = p["gralora_B"][m][n * rank : (n + 1) * rank].T
            w[m * rows : (m + 1) * rows, n * columns : (n + 1) * columns] += o["alpha"] / o["rank"] * b @ a
    return w


def glora(w: Tensor, p: Weights, o: dict) -> Tensor:
    """The weight alone; ``apply`` has the bias."""
    a, b = (p[f"glora_{path}.Xd"] @ p[f"glora_{path}.Xu"] for path in "AB")
    return w + w * a + b


def fourierft(w: Tensor, p: Weights, o: dict) -> Tensor:
    """The inverse transform as a sum of cosines, equation 3."""
    rows, columns = torch.arange(w.shape[0])[:, None], torch.arange(w.shape[1])
    delta = torch.zeros_like(w)
    for value, u, v in zip(p["fourierft_spectrum"], *p["indices"].tolist(), strict=True):
        delta += value * torch.cos(2 * math.pi * (u * rows / w.shape[0] + v * columns / w.shape[1]))
    return w + 150.0 * delta / w.numel()


def waveft(w: Tensor, p: Weights, o: dict) -> Tensor:
    """Haar's basis: every coefficient is a square of 2 x 2 elements, +-1/2 each."""
    rows, columns = w.shape[0] // 2, w.shape[1] // 2
    w = w.clone()
    for value, row, column in zip(p["waveft_spectrum"], *p["waveft_indices"].tolist(), strict=True):
        for s, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
            sign = (-1) ** (s * (column >= columns) + t * (row >= rows))
            w[2 * (row % rows) + s, 2 * (column % columns) + t] += 5.0 * sign * value / 2
    return w


def vblora(w: Tensor, p: Weights, o: dict) -> Tensor:
    factors = []
    for logits in (p["vblora_logits_A"], p["vblora_logits_B"]):
        top, chosen = logits.topk(2, dim=-1)
        factors.append((top.softmax(-1)[..., None] * p["vblora_vector_bank"][chosen]).sum(-2))
    a_ri, pieces = factors[0].flatten(1), factors[1]
    return w + torch.cat([pieces[n].T for n in range(len(pieces))]) @ a_ri


def shira(w: Tensor, p: Weights, o: dict) -> Tensor:
    assert p["shira_indices"].unique(dim=1).shape[1] == o["rank"] * sum(w.shape)
    for value, row, column in zip(p["shira_weight"], *p["shira_indices"].tolist(), strict=True):
        w[row, column] += value
    return w


def c3a(w: Tensor, p: Weights, o: dict) -> Tensor:
    size = o["block_size"]
    shift = (torch.arange(size) - torch.arange(size)[:, None]) % size
    blocks = p["c3a_kernel"][:, :, shift]
    return w + blocks.permute(0, 2, 1, 3).reshape(w.shape) / w.shape[1]


def delora(w: Tensor, p: Weights, o: dict) -> Tensor:
    w_norm, delta = w.norm(dim=0), torch.zeros_like(w)
    for a, b in zip(p["delora_A"], p["delora_B"].T, strict=True):
        delta += torch.outer(b, a) / (a.norm() * b.norm())
    return w + p["delora_lambda"] / o["rank"] * delta * w_norm


def psoft(w: Tensor, p: Weights, o: dict) -> Tensor:
    a, b, rank = p["_psoft_A_cache"], p["_psoft_B_cache"], o["rank"]
    u, s, v = torch.linalg.svd(w)
    assert torch.allclose(b @ a, u[:, :rank] * s[:rank] @ v[:rank], atol=1e-5), "the best approximation of its rank"
    skew = torch.zeros(rank, rank, dtype=w.dtype)
    skew[tuple(torch.triu_indices(rank, rank, 1))] = p["psoft_R"]
    rotation = cayley(skew - skew.T).T
    inside = torch.diag(p["psoft_R.vector_b"]) @ rotation @ torch.diag(p["psoft_R.vector_a"])
    return w + b @ (inside - torch.eye(rank)) @ a


def tinylora(w: Tensor, p: Weights, o: dict) -> Tensor:
    inside = sum(v * matrix for v, matrix in zip(p["tinylora_v"], p["tinylora_P"], strict=True))
    return w + p["tinylora_B"] @ inside @ p["tinylora_A"]


def unilora(w: Tensor, p: Weights, o: dict) -> Tensor:
    a, b = (p["unilora_theta_d"][p[f"unilora_indices_{f}"]] * p[f"unilora_scales_{f}"] for f in "AB")
    return w + b @ a


def moved_factors(w: Tensor, p: Weights, o: dict) -> Tensor:
    return w + p["b"] @ p["a"] - p["first_b"] @ p["first_a"]


FORMULAS = {
    **{f.__name__: f for f in (dora, rslora, adalora, loha, lokr, oft, boft, vera, randlora)},
    **{f.__name__: f for f in (ia3, hra, road, miss, hira, gralora)},
    **{f.__name__: f for f in (glora, fourierft, waveft, vblora, shira, c3a, delora, psoft, tinylora, unilora)},
    "pissa": moved_factors,
    "olora": moved_factors,
}
MOVE_BIAS = ("ia3", "road")
# All defaults that the formulas read.
DEFAULTS = {
    "adalora": {"initial_rank": 6},
    "oft": {"block_size": 32},
    "boft": {"block_size": 4, "factors": 2},
    "vera": {"rank": 4},
    "randlora": {"rank": 4, "alpha": 4},
    "gralora": {"rank": 4, "alpha": 4},
    "ia3": {},
    "road": {},
    "shira": {"rank": 2},
    "c3a": {"block_size": 8},
    "psoft": {"rank": 4},
}
# peft computes these transforms in float32.
SINGLE = ("fourierft", "c3a")


def short(name: str) -> str:
    """Leave out the name of peft's adapter: a.default, a.default.weight -> a; a.default.b -> a.b."""
    parts = name.split(".")
    return parts[0] if len(parts) < 3 or parts[-1] == "weight" else f"{parts[0]}.{parts[-1]}"


def apply(method: str, weights: Weights, state: Weights, options: dict) -> set[str]:
    """Write the formula's weights into ``weights``; the layers are those the state speaks of."""
    options = {**DEFAULTS.get(method, {"rank": 8}), **options}
    mark = f".remap_{method}."
    shared = {key.split(".")[1]: value for key, value in state.items() if key.startswith(mark[1:])}
    layers = {key.split(mark)[0] for key in state if mark in key}
    for layer in layers:
        own = {short(key.split(mark)[1]): value for key, value in state.items() if key.startswith(layer + mark)}
        weight = weights[f"{layer}.weight"]
        formula, tensors = FORMULAS[method], {**shared, **own}
        before = weight.flatten(1).clone()
        weight.copy_(formula(before, tensors, options).reshape(weight.shape))
        if method == "glora" and f"{layer}.bias" in weights:
            bias, c = weights[f"{layer}.bias"], before @ own["glora_C.Xd"] @ own["glora_C.Xu"]
            bias.copy_(bias + bias * own["glora_D.X"] + own["glora_E.X"] + c[:, 0])
        if method in MOVE_BIAS and (bias := bias_of(weights, layer, len(weight))) is not None:
            moved = bias if own.get("ia3_l", weight).shape[0] == 1 else formula(bias[:, None], tensors, options)[:, 0]
            write_bias(weights, layer, moved)
    return layers


def bias_of(weights: Weights, layer: str, size: int) -> Tensor | None:
    """EVA-02 and BEiT keep the biases of q and v beside the fused layer, and 0 for k."""
    parent = layer.rpartition(".")[0]
    if f"{parent}.q_bias" in weights and layer.endswith("qkv"):
        zero = torch.zeros(size // 3, dtype=torch.float64)
        return torch.cat([weights[f"{parent}.q_bias"], zero, weights[f"{parent}.v_bias"]])
    return weights[f"{layer}.bias"].clone() if f"{layer}.bias" in weights else None


def write_bias(weights: Weights, layer: str, bias: Tensor) -> None:
    parent = layer.rpartition(".")[0]
    if f"{layer}.bias" in weights:
        weights[f"{layer}.bias"].copy_(bias)
    else:
        thirds = bias.chunk(3)
        weights[f"{parent}.q_bias"].copy_(thirds[0])
        weights[f"{parent}.v_bias"].copy_(thirds[2])


EVERYTHING = {"targets": ["q", "k", "v", "o", "fc1", "fc2"]}
CASES = [
    *((method, variant, {}) for method in ALL for variant in ("plain", "eva02")),
    *((method, "eva02_separate", {}) for method in ("dora", "ia3", "road", "oft")),
    *((method, "beit", {}) for method in ("dora", "ia3", "road", "vera", "pissa")),
    *(
        (method, "convnext", {})
        for method in ("dora", "oft", "boft", "gralora", "glora", "shira", "ia3", "miss", "olora")
    ),
    *((method, "swin", EVERYTHING) for method in ("dora", "hra", "vera", "ia3", "road", "pissa")),
    *((method, "plain", {"rank": 4, "alpha": 12.0}) for method in ("dora", "rslora", "loha", "lokr")),
    ("lokr", "plain", {"rank": 1, "decompose_both": True}),
    ("lokr", "plain", {"rank": 2, "factor": 2}),
    ("adalora", "plain", {"initial_rank": 6, "rank": 2, "alpha": 3.0}),
    ("oft", "plain", {"block_size": 8}),
    ("boft", "plain", {"block_size": 4, "factors": 4}),
    ("boft", "plain", {"block_size": 2, "factors": 3}),
    ("miss", "plain", {"rank": 5}),
    ("hra", "plain", {"rank": 2}),
    ("road", "plain", {"per_pair": 2}),
    ("road", "plain", {"per_pair": 4}),
    ("gralora", "plain", {"rank": 8, "blocks": 4, "alpha": 4}),
]


@pytest.mark.parametrize("factors", [1, 3])
@pytest.mark.parametrize("rows", [3, 80])
def test_boft_is_one_function_whether_the_inputs_or_the_weight_is_smaller(rows: int, factors: int) -> None:
    layer, x = nn.Linear(48, 80).double(), torch.randn(rows, 48, dtype=torch.float64)
    change = Butterfly(SharedLinear(layer), 4, factors).double()
    assert torch.equal(change(x), layer(x))
    own = [change.blocks, change.scale]
    for tensor in own:
        nn.init.normal_(tensor)
    changed = boft(layer.weight, {"blocks": own[0], "scale": own[1]}, {"block_size": 4, "factors": factors})
    ours, expected = change(x), F.linear(x, changed, layer.bias)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-10)
    weighting = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weighting).sum(), own) for y in (ours, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "variant", "options"), CASES)
def test_equals_weights_changed_in_closed_form(
    shaken: Callable, plain_logits: Callable, method: str, variant: str, options: dict
) -> None:
    attached, state, logits = shaken(method, variant, **options)
    layers: set[str] = set()

    def change(weights: Weights) -> None:
        layers.update(apply(method, weights, state, options))

    assert torch.allclose(logits, plain_logits(variant, change), rtol=0, atol=1e-5 if method in SINGLE else 1e-10)
    assert not torch.allclose(logits, plain_logits(variant), atol=1e-5 if method == "tinylora" else 1e-3)
    fused = variant in ("plain", "eva02", "beit", "swin")
    expected = 2 if variant == "convnext" else 1 if fused else 3
    expected += 3 * (options == EVERYTHING) + (method == "ia3" and variant not in ("convnext", "swin"))
    expected -= method == "ia3" and variant == "convnext"
    assert len(layers) == expected * len(attached.anatomy.blocks)


@pytest.mark.parametrize("method", ["dora", "oft", "gralora", "glora", "boft", "ia3", "road", "vera", "hira", "pissa"])
def test_on_1x1_convolutions(tools: SimpleNamespace, method: str) -> None:
    """The small ConvNeXts of timm have them for their MLPs."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "conv_mlp": True, "ls_init_value": 0.5}
        models.append(ConvNeXt(**options, num_classes=5).double().eval())
    small = {"vera": {"rank": 4}, "gralora": {"rank": 4, "alpha": 4}}.get(method, {})
    attached = attach_method(models[0], anatomy_of(models[0]), method, small)
    images = tools.images().double()
    assert torch.equal(models[0](images), models[1](images))
    tools.shake(attached)
    with torch.no_grad():
        apply(method, dict(models[1].named_parameters()), attached.state(), small)
    assert torch.allclose(models[0](images), models[1](images), rtol=0, atol=1e-10)
    assert torch.allclose(attached.merge()(images), models[1](images), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["dora", "loha", "vera", "road", "shira", "pissa", "boft"])
def test_on_kernels_as_matrices(shaken: Callable, plain_logits: Callable, tools: SimpleNamespace, method: str) -> None:
    """1x1 and 3x3 convolutions as matrices of c_out x c_in * k * k."""
    options = {"targets": ["linear", "conv"], "rank": 4} if method == "vera" else {"targets": ["linear", "conv"]}
    attached, state, logits = shaken(method, "resnet_bottleneck", **options)
    changed = {}

    def change(weights: Weights) -> None:
        changed.update(dict.fromkeys(apply(method, weights, state, options)))
        changed.update({layer: tuple(weights[f"{layer}.weight"].shape[2:]) for layer in changed})

    expected = plain_logits("resnet_bottleneck", change)
    assert {(1, 1), (3, 3)} == set(changed.values())
    assert torch.allclose(logits, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(logits, plain_logits("resnet_bottleneck"), atol=1e-3)
    assert torch.allclose(attached.merge()(tools.images().double()), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["dora", "vera", "ia3", "boft"])
@pytest.mark.parametrize("variant", ["plain", "eva02"])
def test_converting_and_loading_after_attaching_reach_everything(
    build: Callable, attach: Callable, tools: SimpleNamespace, method: str, variant: str
) -> None:
    """What is inside the change must move with the model, though the state dict does not show it."""
    attached = attach(method, build(variant))
    tools.shake(attached)
    model, images = attached.model.double(), tools.images().double()
    for other in (build(variant).double(), build(variant, seed=5).double()):
        # New tensors in place of the old ones, as a loader may do it.
        model.load_state_dict({**model.state_dict(), **copy.deepcopy(other).state_dict()}, assign=True)
        with torch.no_grad():
            apply(method, dict(other.named_parameters()), attached.state(), {})
        assert torch.allclose(model(images), other(images), rtol=0, atol=1e-10)
    assert attached.model.half()(images.half()).dtype == torch.float16


def test_pissa_starts_from_the_best_approximation_of_its_rank(
    build: Callable[..., nn.Module], attach: Callable[..., Attached]
) -> None:
    """Eckart and Young: no matrix of rank r is closer to W than the sum of its r largest singular triplets."""
    model = build("plain")
    state = attach("pissa", model, rank=4).state()
    at = "blocks.0.attn.qkv.remap_pissa"
    weight = model.blocks[0].attn.qkv.weight.detach()
    found = (weight - state[f"{at}.b"] @ state[f"{at}.a"]).norm()
    assert found < 1.01 * torch.linalg.svdvals(weight)[4:].norm()
    assert torch.allclose(state[f"{at}.b"].norm(dim=0), state[f"{at}.a"].norm(dim=1), rtol=1e-4), "roots on both sides"


def test_olora_starts_from_the_qr_decomposition(
    build: Callable[..., nn.Module], attach: Callable[..., Attached]
) -> None:
    model = build("plain")
    state = attach("olora", model, rank=4).state()
    at = "blocks.0.attn.qkv.remap_olora"
    q, r = torch.linalg.qr(model.blocks[0].attn.qkv.weight.detach())
    assert torch.allclose(state[f"{at}.b"] @ state[f"{at}.a"], q[:, :4] @ r[:4], atol=1e-5)
    assert torch.allclose(state[f"{at}.b"].T @ state[f"{at}.b"], torch.eye(4), atol=1e-5)


@pytest.mark.parametrize(("method", "matrices"), [("vera", ("vera_A", "vera_B")), ("randlora", ("randlora_B",))])
def test_random_matrices_come_from_the_seed_and_are_kept_once(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], method: str, matrices: tuple[str, ...]
) -> None:
    attached = attach(method, build("plain"), seed=1)
    again, other = attach(method, build("plain"), seed=2), None
    rank = {"rank": 4, "alpha": 4} if method == "randlora" else {"rank": 4}
    other = attach_method(build("plain"), attached.anatomy, method, {**rank, "seed": 7})
    assert len(attached.buffers) == 2, "one A and one B for the whole model"
    assert not set(attached.buffers) & set(attached.trainable)
    for name in matrices:
        key = f"remap_{method}.{name}.default"
        assert torch.equal(attached.state()[key], again.state()[key])
        assert not torch.equal(attached.state()[key], other.state()[key])


def test_a_second_change_of_a_layer_is_refused_where_folding_would_depend_on_the_order(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace
) -> None:
    model = build("plain")
    with pytest.raises(BackboneError, match="already carries"):
        attach("lora+dora", model)
    assert torch.equal(model(tools.images()), build("plain")(tools.images()))
    attached = attach("dora+lora", build("plain").double())
    tools.shake(attached)
    tuned = attached.model(tools.images().double())
    assert torch.allclose(attached.merge()(tools.images().double()), tuned, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("boft", {"block_size": 3}, "butterfly"),
        ("gralora", {"rank": 6, "blocks": 3, "alpha": 4}, "these options of gralora do not fit"),
        ("dora", {"targets": ["q"]}, "no block"),
        ("vblora", {"top": 7}, "these options of vblora do not fit"),
        ("c3a", {"block_size": 7}, "these options of c3a do not fit"),
        ("waveft", {"wavelet": "haar"}, "these options of waveft do not fit"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], method: str, options: dict, match: str
) -> None:
    model = build("convnext" if method == "dora" else "plain")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(BackboneError, match=match):
        attach(method, model, **options)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_factor_of_nothing_is_refused(build: Callable[..., nn.Module], attach: Callable[..., Attached]) -> None:
    with pytest.raises(ValidationError, match="at least 1, or -1"):
        attach("lokr", build("plain"), factor=0)


def test_peft_has_one_home() -> None:
    """Importing it takes seconds, which only those who use its methods should wait."""
    sources = {path: path.read_text() for path in Path(remap.__file__).parent.rglob("*.py")}
    inside = {path for path in sources if path.parent.name == "peft_bridge"}
    exports = {
        path for path in sources if path.name in ("peft_folder.py", "snippets.py")
    }  # which write peft's own files
    found = {path for path, text in sources.items() if re.search(r"^\s*(from|import) peft", text, re.M)}
    assert found < inside | exports
    importers = {path for path, text in sources.items() if re.search(r"^\s*(from|import) .*peft_bridge", text, re.M)}
    assert importers <= inside


def with_gradients(attached: Attached, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in attached.model.named_parameters():
        if name in attached.trainable:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def entries(attached: Attached) -> Tensor:
    """(layers, r)"""
    return torch.stack([value.flatten() for name, value in attached.state().items() if "lora_E" in name])


def test_adalora_keeps_the_most_important_triplets(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace
) -> None:
    """Equations 8 to 12 with beta1 = beta2 = 0.85; 20 steps, of which the ranks shrink in steps 3 to 10."""
    attached = attach("adalora", build("plain"), initial_rank=6, rank=2, interval=4)
    tools.shake(attached)
    smooth: Weights = {}
    unsure: Weights = {}
    budgets = []
    for step in range(20):
        with_gradients(attached, step)
        tensors = tools.trained(attached)
        if step <= 10:
            for name, p in tensors.items():
                now = (p * p.grad).abs().detach()
                smooth[name] = 0.85 * smooth.get(name, torch.zeros_like(now)) + 0.15 * now
                unsure[name] = 0.85 * unsure.get(name, torch.zeros_like(now)) + 0.15 * (now - smooth[name]).abs()
        attached.after_step(step, 20)
        budgets.append(int((entries(attached) != 0).sum()))
        if step == 10:
            scores = []
            for name in (name for name in tensors if "lora_E" in name):
                of = {part: smooth[key] * unsure[key] for part in "AEB" for key in [name.replace("_E", f"_{part}")]}
                scores.append(of["E"][:, 0] + of["A"].mean(1) + of["B"].mean(0))
            best = torch.cat(scores).topk(6).indices
            assert set(entries(attached).flatten().nonzero()[:, 0].tolist()) == set(best.tolist())
        with torch.no_grad():  # an optimiser would move them again
            for name, p in tensors.items():
                p.add_(0.01 * torch.ones_like(p) if "lora_E" in name else 0)
    # 18 at first; cubic from step 2 to 10 every 4 steps; 2 a layer from then on.
    assert budgets[:4] == [18] * 4
    assert budgets[4] == int(12 * (1 - 2 / 8) ** 3 + 6)
    assert budgets[8] == int(12 * (1 - 6 / 8) ** 3 + 6)
    assert budgets[10:] == [6] * 10


def test_adalora_settles_its_ranks_at_a_step_that_is_left_out(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace
) -> None:
    """Two a layer from the eleventh step on, without its gradients."""
    attached = attach("adalora", build("plain"), initial_rank=6, rank=2, interval=4)
    tools.shake(attached)
    for step in range(11):
        with_gradients(attached, step)
        if step == 10:
            attached.model.zero_grad()
        attached.after_step(step, 20)
    assert int((entries(attached) != 0).sum()) == 6


def test_adalora_continues_from_its_memory(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace
) -> None:
    def run(attached: Attached, steps: range) -> None:
        for step in steps:
            with_gradients(attached, step)
            with torch.no_grad():
                for p in tools.trained(attached).values():
                    p.sub_(0.01 * p.grad)
            attached.after_step(step, 20)

    for pause in (1, 7, 14):
        through, first, second = (attach("adalora", build("plain"), interval=2) for _ in range(3))
        run(through, range(20))
        run(first, range(pause))
        second.load(first.state())
        second.recall({key: value.clone() for key, value in first.memory().items()})
        run(second, range(pause, 20))
        assert all(torch.equal(second.state()[name], value) for name, value in through.state().items())


def test_adalora_pulls_towards_orthogonal_factors(shaken: Callable) -> None:
    attached, state, _ = shaken("adalora", "plain", orthogonality=0.3)
    distances = []
    for name, value in state.items():
        if "lora_A" in name or "lora_B" in name:
            rows = (value if "lora_A" in name else value.T).double()
            distances.append(((rows @ rows.T - torch.eye(len(rows))) ** 2).sum().sqrt())
    assert len(distances) == 6
    assert torch.allclose(attached.penalty().double(), 0.3 * torch.stack(distances).mean(), rtol=1e-5)


# Hugging Face peft 0.21 on ViT-B/16's fused q, k, v, where it gives the number; else the formula of the table.
@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("dora", {}, 322_560),
        ("rslora", {}, 294_912),
        ("pissa", {}, 294_912),
        ("olora", {}, 294_912),
        ("adalora", {}, 12 * 12 * (4 * 768 + 1)),
        ("gralora", {}, 294_912),
        ("hira", {}, 294_912),
        ("loha", {}, 589_824),
        ("lokr", {}, 21_504),
        ("miss", {}, 12 * 3 * 768 * 8),
        ("vera", {}, 30_720),
        ("randlora", {}, 12 * (768 * 768 // 32 + 768)),
        ("oft", {}, 142_848),
        ("boft", {"factors": 1}, 64_512),
        ("boft", {}, 12 * (2 * 768 * 4 + 3 * 768)),
        ("hra", {}, 73_728),
        ("road", {}, 27_648),
        ("ia3", {}, 64_512),
        ("ia3", {"targets": ["k", "v"]}, 27_648),
        ("rslora", {"targets": ["q", "o", "fc1", "fc2"]}, 1_179_648),
        ("glora", {}, 12 * (2 * 8 * (768 + 2304) + 8 * (768 + 1) + 2)),
        ("fourierft", {}, 12_000),
        ("waveft", {"coefficients": 100}, 1_200),
        ("vblora", {}, 256 * 256 + 12 * 4 * (3 + 9) * 256),
        ("shira", {}, 294_912),
        ("c3a", {"block_size": 768}, 27_648),
        ("delora", {}, 294_912 + 12),
        ("psoft", {}, 12 * (496 + 64)),
        ("tinylora", {}, 12 * 64),
        ("tinylora", {"tying": 0.5}, 6 * 64),
        ("unilora", {"numbers": 1000}, 1_000),
    ],
)
def test_count(count: Callable[..., int], method: str, options: dict, expected: int) -> None:
    assert count(method, **options) == expected
    if not options:
        assert METHODS.row(method).vit_base == expected
