"""FacT against the untouched timm model in float64, its weights changed square by square.

The two formulas of the paper, W_m + s * V core_m U; the order of the squares is q, k, v, o, fc1, fc2 block by block.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method
from remap.tuning.dropout import keep_mask, site_offset

Weights = dict[str, Tensor]
FUSED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SEPARATE = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", "mlp.fc1_x", "mlp.fc1_g", "mlp.fc2")


@pytest.mark.parametrize("method", ["fact_tt", "fact_tk"])
@pytest.mark.parametrize(
    ("variant", "layers"),
    [("plain", FUSED), ("dinov3", FUSED), ("beit", FUSED), ("eva02", FUSED), ("eva02_separate", SEPARATE)],
)
def test_equals_weights_changed_in_closed_form(
    shaken: Callable, plain_logits: Callable, method: str, variant: str, layers: tuple[str, ...]
) -> None:
    _, state, logits = shaken(method, variant, rank=5, scale=3.0)

    def change(weights: Weights) -> None:
        squares = _squares(state, 32)
        for index in range(3):
            for layer in layers:
                _add(weights[f"blocks.{index}.{layer}.weight"], squares, 32, 3.0)
        assert next(squares, None) is None, "all cores are used"

    assert torch.allclose(logits, plain_logits(variant, change), rtol=0, atol=1e-10)
    assert not torch.allclose(logits, plain_logits(variant), atol=1e-3)


@pytest.mark.parametrize("method", ["fact_tt", "fact_tk"])
def test_a_model_whose_width_grows_has_factors_for_every_width(
    shaken: Callable, plain_logits: Callable, method: str
) -> None:
    attached, state, logits = shaken(method, "swin", rank=3)

    def change(weights: Weights) -> None:
        for width in (16, 32):
            squares = _squares(state, width)
            for block in attached.anatomy.blocks:
                if block.width == width:
                    for layer in FUSED:
                        _add(weights[f"{block.block}.{layer}.weight"], squares, width)
            assert next(squares, None) is None

    assert torch.allclose(logits, plain_logits("swin", change), rtol=0, atol=1e-10)


def test_mlps_of_any_ratio(tools: SimpleNamespace) -> None:
    """H = 2.5 * D: the last square of fc1 loses rows, that of fc2 columns."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.5}
        models.append(VisionTransformer(**options, num_classes=5).double().eval())
    attached = attach_method(models[0], anatomy_of(models[0]), "fact_tt", {"rank": 4})
    tools.shake(attached)
    weights, squares = dict(models[1].named_parameters()), _squares(attached.state(), 32)
    with torch.no_grad():
        for index in range(2):
            for layer in FUSED:
                _add(weights[f"blocks.{index}.{layer}.weight"], squares, 32)
    images = tools.images().double()
    assert torch.allclose(models[0](images), models[1](images), rtol=0, atol=1e-10)


def test_dropout_stands_between_core_and_v(shaken: Callable, build: Callable, tools: SimpleNamespace) -> None:
    """s * V(dropout(core(U x))), an element a unit of a square and token."""
    attached, state, _ = shaken("fact_tt", "plain", rank=4, dropout=0.5)
    keys, images = torch.tensor([5, 6]), tools.images().double()
    attached.train()
    attached.set_sample_keys(keys)
    found = attached.model(images)
    base, site = build("plain").double(), 0
    down, up = state["remap_fact.width_32.down"], state["remap_fact.width_32.up"]
    cores = iter(state["remap_fact.width_32.sigma"])
    for index in range(3):
        for layer in FUSED:
            module = base.get_submodule(f"blocks.{index}.{layer}")
            rows, columns = (size // 32 for size in module.weight.shape)
            own = [[next(cores) for _ in range(columns)] for _ in range(rows)]

            def add(module: nn.Module, args: tuple, output: Tensor, own: list = own, site: int = site) -> Tensor:
                slices = args[0].split(32, -1)
                units = [sum(x @ down.T @ core.T for x, core in zip(slices, row, strict=True)) for row in own]
                units = torch.stack(units, -2)  # (B, tokens, rows, r)
                mask = keep_mask(keys, units[0].numel(), 0.5, site_offset(site)).view_as(units)
                return output + (2 * units * mask @ up).flatten(-2)

            module.register_forward_hook(add)
            site += 1
    assert torch.allclose(found, base(images), rtol=0, atol=1e-10)


def test_factors_start_at_no_change(build: Callable[..., nn.Module], attach: Callable[..., Attached]) -> None:
    for method in ("fact_tt", "fact_tk"):
        state = attach(method, build("plain")).state()
        assert [name for name, value in state.items() if not value.any()] == ["remap_fact.width_32.up"]


@pytest.mark.parametrize(
    ("method", "rank", "expected"),
    [("fact_tt", 8, 21_504), ("fact_tt", 16, 61_440), ("fact_tk", 16, 30_976), ("fact_tk", 32, 86_528)],
)
def test_count(count: Callable[..., int], method: str, rank: int, expected: int) -> None:
    assert count(method, rank=rank) == expected


def _squares(state: Weights, width: int) -> Iterator[Tensor]:
    """The changes V core_m U (D, D) of all squares of one width."""
    at = f"remap_fact.width_{width}"
    down, up = state[f"{at}.down"], state[f"{at}.up"]
    if f"{at}.sigma" in state:
        cores = list(state[f"{at}.sigma"])
    else:
        mix, core = state[f"{at}.mix"], state[f"{at}.core"]
        cores = [sum(mix[m, k] * core[k] for k in range(len(core))) for m in range(len(mix))]
    return iter([up.T @ core @ down for core in cores])


def _add(weight: Tensor, squares: Iterator[Tensor], width: int, scale: float = 1.0) -> None:
    """Squares from left to right, then down; the last ones are cut where they stand over."""
    for top in range(0, weight.shape[0], width):
        for left in range(0, weight.shape[1], width):
            part = weight[top : top + width, left : left + width]
            part += scale * next(squares)[: part.shape[0], : part.shape[1]]


def test_cores_start_as_linear_layers_do(build: Callable, attach: Callable) -> None:
    """uniform(-b, b), b = 1 / sqrt(inputs) of Linear: r inputs, and 2*r for the cores of fc2, twice as wide."""
    torch.manual_seed(0)
    attached = attach("fact_tt", build("plain"), rank=16)
    ((_, sigma),) = [(name, value) for name, value in attached.state().items() if name.endswith("sigma")]
    of_layers = sigma.view(-1, 8, 16, 16)
    for squares, inputs in ((slice(0, 6), 16), (slice(6, 8), 32)):
        assert 0.998 < of_layers[:, squares].abs().max() * inputs**0.5 <= 1.0
