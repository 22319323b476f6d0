"""Students cut from constructed teachers, whose useless parts are known.

Sources: what was built into the teacher, the teacher's own tensors indexed by what stays, timm alone in a fresh
process, and closed forms of parameter counts.
"""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.build import Backbone, build
from remap.backbones.families.vit import mlp_ratio
from remap.errors import BackboneError, RunError
from remap.recipe.schema import ShrinkSpec
from remap.remapping.architecture import shrink as module
from remap.remapping.architecture.pruning import prune_inside, prune_width
from remap.remapping.architecture.remove_blocks import evenly, least_missed
from remap.remapping.architecture.shrink import Shrunk, shrink

Make = Callable[..., nn.Module]
Wrap = Callable[[nn.Module], Backbone]
Batches = Callable[[], Iterator[Tensor]]
CRITERIA = ("taylor", "magnitude")
PRUNABLE = ("plain", "registers", "distilled", "no_class", "clip", "qk_norm", "inner_norms")


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that are written, as they are in memory."""
    seen: list[nn.Module] = []
    save = module.save_model_folder

    def keep(model: nn.Module, *rest: object) -> None:
        seen.append(model)
        save(model, *rest)

    monkeypatch.setattr(module, "save_model_folder", keep)
    return seen


@pytest.mark.slow
def test_a_process_that_knows_timm_alone_opens_the_same_function(
    make: Make, as_teacher: Wrap, batches: Batches, images: Tensor, pruned: list[nn.Module], tmp_path: Path
) -> None:
    folders = []
    for name in PRUNABLE:
        folders.append(tmp_path / name)
        shrink(as_teacher(make(name)), ShrinkSpec(depth=3, width=24, mlp=36), batches, folders[-1])
    folders.append(tmp_path / "mini")
    mini = build("mini_teacher", "pretrained", 10)
    shrink(mini, ShrinkSpec(depth=2, width=96, heads=3), batches, folders[-1])
    save_file({"images": images}, tmp_path / "images.safetensors")
    code = f"""
import sys, timm, torch
from safetensors.torch import load_file, save_file
images = load_file({str(tmp_path / "images.safetensors")!r})["images"]
found = {{}}
for folder in {[str(folder) for folder in folders]!r}:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    with torch.no_grad():
        found[folder] = model(images).contiguous()
save_file(found, {str(tmp_path / "found.safetensors")!r})
assert not [name for name in sys.modules if name.startswith(("remap", "torch_pruning"))]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    with torch.no_grad():
        for folder, model in zip(folders, pruned, strict=True):
            assert torch.allclose(found[str(folder)], model(images), rtol=1e-5, atol=1e-5), folder.name


@pytest.mark.parametrize("name", [name for name in PRUNABLE if name != "inner_norms"])  # they see every unit
@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_heads_and_units_without_effect_go_and_nothing_changes(
    make: Make, batches: Batches, images: Tensor, name: str, criterion: str
) -> None:
    """Another head and other units in every block."""
    model = make(name)
    draws = torch.Generator().manual_seed(3)
    useful: dict[str, Tensor] = {}
    for index, block in enumerate(model.blocks):
        units = torch.randperm(64, generator=draws)
        _silence_head(block.attn, head=(index + 1) % 4, everything=criterion == "magnitude")
        block.mlp.fc2.weight[:, units[:24]] = 0.0
        if criterion == "magnitude":
            block.mlp.fc1.weight[units[:24]] = 0.0
            block.mlp.fc1.bias[units[:24]] = 0.0
        useful[f"{index}"] = block.mlp.fc1.weight[units[24:].sort().values].clone()
    expected = model(images)
    with torch.enable_grad():
        prune_inside(model, 3, 8, 40, criterion, batches)
    for index, block in enumerate(model.blocks):
        assert torch.equal(block.mlp.fc1.weight, useful[f"{index}"])
        assert block.attn.qkv.weight.shape == (3 * 24, 32) and block.attn.proj.weight.shape == (32, 24)
    assert torch.allclose(model(images), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_taylor_keeps_what_the_features_feel_whatever_the_weights_weigh(make: Make, batches: Batches) -> None:
    """In every block 24 units and a head are read at a thousandth of what the others are, though their own rows are
    the largest: magnitude would keep them."""
    model = make("plain")
    draws = torch.Generator().manual_seed(6)
    felt = []
    for block in model.blocks:
        units, head = torch.randperm(64, generator=draws), int(torch.randint(4, (), generator=draws))
        block.mlp.fc1.weight[units[:24]] *= 3.0
        block.mlp.fc2.weight[:, units[:24]] *= 1e-3
        columns = torch.arange(8 * head, 8 * head + 8)
        block.attn.qkv.weight[64 + columns] *= 3.0
        block.attn.proj.weight[:, columns] *= 1e-3
        kept = [column for column in range(32) if column not in columns]
        felt.append((block.mlp.fc1.weight[units[24:].sort().values].clone(), block.attn.proj.weight[:, kept].clone()))
    other = copy.deepcopy(model)
    with torch.enable_grad():
        prune_inside(model, 3, 8, 40, "taylor", batches)
        prune_inside(other, 3, 8, 40, "magnitude", batches)
    for block, (rows, columns) in zip(model.blocks, felt, strict=True):
        assert torch.equal(block.mlp.fc1.weight, rows) and torch.equal(block.attn.proj.weight, columns)
    assert not torch.equal(other.blocks[0].mlp.fc1.weight, felt[0][0])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["plain", "registers"])
@torch.no_grad()
def test_head_dimensions_without_effect_go_and_the_scale_stays(
    make: Make, batches: Batches, images: Tensor, name: str, criterion: str
) -> None:
    """Pairs of query and key dimensions, and value dimensions, each head and each kind its own; 8 to 5."""
    model = make(name)
    draws = torch.Generator().manual_seed(4)
    for block in model.blocks:
        for head in range(4):
            pairs, values = (8 * head + torch.randperm(8, generator=draws)[:3] for _ in range(2))
            rows = torch.cat([pairs, 32 + pairs, 64 + values])
            block.attn.qkv.weight[rows] = 0.0
            block.attn.qkv.bias[rows] = 0.0
            block.attn.proj.weight[:, values] = 0.0
    expected = model(images)
    with torch.enable_grad():
        prune_inside(model, 4, 5, 64, criterion, batches)
    assert model.blocks[0].attn.qkv.weight.shape == (3 * 20, 32)
    assert torch.allclose(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", PRUNABLE)
@torch.no_grad()
def test_width_keeps_the_channels_in_use_and_every_tensor_goes_along(
    make: Make, batches: Batches, name: str, criterion: str
) -> None:
    """Eight channels that nothing writes or reads; the result is the teacher's tensors without them."""
    model = make(name)
    unused = torch.randperm(32, generator=torch.Generator().manual_seed(5))[:8]
    for tensor, dims in _stream(model):
        for dim in dims:
            tensor.index_fill_(dim, unused, 0.0)
    kept = torch.tensor([channel for channel in range(32) if channel not in unused])
    before = copy.deepcopy(model)
    with torch.enable_grad():
        prune_width(model, 24, criterion, batches)
    expected = {}
    in_stream = {id(tensor): dims for tensor, dims in _stream(before)}
    for key, tensor in before.named_parameters():
        for dim in in_stream.get(id(tensor), ()):
            tensor = tensor.index_select(dim, kept)
        expected[key] = tensor
    found = dict(model.named_parameters())
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in expected.items()}
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert len(in_stream) > 40, "the list of the stream's tensors is not empty by mistake"


@pytest.mark.parametrize("name", ["plain", "registers", "siglip", "gated", "eva", "dinov3", "beit"])
@torch.no_grad()
def test_blocks_that_do_nothing_go_first(
    make: Make, as_teacher: Wrap, batches: Batches, images: Tensor, name: str, tmp_path: Path
) -> None:
    model = make(name)
    for index in (1, 3):
        for linear in (model.blocks[index].attn.proj, model.blocks[index].mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    whole = model.forward_head(model.forward_features(images), pre_logits=True)
    found = shrink(as_teacher(model), ShrinkSpec(depth=2), batches, tmp_path / "out")
    assert found.kept == (0, 2) and max(found.changes) < 1e-10
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert len(again.blocks) == 2
    assert torch.allclose(again(images), whole, rtol=1e-5, atol=1e-5)
    assert len(model.blocks) == 4, "the teacher stays whole"


@torch.no_grad()
def test_sensitivity_is_the_relative_change_without_the_block(make: Make, batches: Batches, images: Tensor) -> None:
    """Each block replaced by the identity in a model of its own; then again with the first one gone."""
    model = make("plain").double()

    def feature(without: set[int]) -> Tensor:
        other = copy.deepcopy(model)
        for index in without:
            other.blocks[index] = nn.Identity()
        return other.forward_features(images.double())[:, 0]

    whole, gone, expected = feature(set()), set[int](), []
    for _ in range(2):
        changes = {
            index: float(((feature(gone | {index}) - whole) ** 2).sum() / (whole**2).sum())
            for index in range(4)
            if index not in gone
        }
        best = min(changes, key=changes.get)
        gone.add(best)
        expected.append(changes[best])
    kept, found = least_missed(copy.deepcopy(model), 2, lambda: (part.double() for part in batches()))
    assert set(kept) == {0, 1, 2, 3} - gone
    assert found == pytest.approx(expected, rel=1e-9)


def test_even_distances() -> None:
    assert evenly(12, 4) == [0, 4, 7, 11] and evenly(12, 12) == list(range(12))
    assert evenly(4, 2) == [0, 3] and evenly(5, 3) == [0, 2, 4] and evenly(4, 1) == [0]


@pytest.mark.parametrize(("hidden", "width"), [(1536, 384), (333, 192), (100, 96), (1, 384), (2731, 1024), (49, 7)])
def test_timm_rounds_the_ratio_to_the_hidden_units(hidden: int, width: int) -> None:
    """int(width * ratio) is what timm computes."""
    assert int(width * mlp_ratio(hidden, width)) == hidden
    whole = [(units, channels) for channels in (64, 192, 384) for units in range(1, 4 * channels)]
    assert all(int(channels * mlp_ratio(units, channels)) == units for units, channels in whole)


def test_the_report_counts_parameters_and_multiply_adds(
    make: Make, as_teacher: Wrap, batches: Batches, tmp_path: Path
) -> None:
    """Closed forms for width D, hidden F, 16 patches of 192 values and one class token."""
    found = shrink(as_teacher(make("plain")), ShrinkSpec(depth=2, width=16, mlp=40), batches, tmp_path / "out")

    def parameters(L: int, D: int, F: int) -> int:  # noqa: N803 - shape letters
        block = 4 * D + (3 * D * D + 3 * D) + (D * D + D) + (D * F + F) + (F * D + D)
        return L * block + 2 * D + (192 * D + D) + D + 17 * D

    def macs(L: int, D: int, F: int) -> int:  # noqa: N803 - shape letters
        return 16 * 192 * D + L * (17 * (4 * D * D + 2 * D * F) + 2 * 17 * 17 * D)

    assert found.parameters == (parameters(4, 32, 64), parameters(2, 16, 40))
    assert found.macs == (macs(4, 32, 64), macs(2, 16, 40))
    assert (found.after.heads, found.after.head_dim) == (2, 8), "width alone keeps the head dimension"
    assert isinstance(found, Shrunk) and found.to_dict()["after"]["mlp"] == 40


def test_nothing_is_left_of_a_cut_that_timm_cannot_build(
    make: Make, as_teacher: Wrap, batches: Batches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module.Shape, "arguments", lambda *_: {"depth": 4})
    with pytest.raises(BackboneError, match="another function"):
        shrink(as_teacher(make("plain")), ShrinkSpec(depth=2), batches, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="there already"):
        shrink(as_teacher(make("plain")), ShrinkSpec(depth=2), batches, tmp_path / "out")


def test_a_stem_that_plain_arguments_do_not_describe_is_refused(
    as_teacher: Wrap, batches: Batches, tmp_path: Path
) -> None:
    """Of the embedded teacher with convolutions, as timm raises AttributeError where it reads its weights."""
    teacher = build("mini_conv", "pretrained", 10)
    with pytest.raises(BackboneError, match="timm builds another function"):
        shrink(teacher, ShrinkSpec(depth=2), batches, tmp_path / "out")
    assert not list(tmp_path.iterdir())


MISTAKES = [
    ("plain", {"depth": 5}, "cannot have more than its teacher tiny: depth"),
    ("plain", {"width": 64}, "width, heads"),
    ("plain", {"mlp": 65, "heads": 5}, "heads, mlp"),
    ("plain", {"width": 30, "heads": 4}, "width 30 and 4 heads"),
    ("plain", {"width": 20}, "2 heads|heads of width"),
    ("plain", {"width": 32, "heads": 2}, "heads of width 16 cannot be cut"),
    ("plain", {"depth": 4}, "nothing is to be cut"),
    ("qk_norm", {"width": 16, "heads": 4}, "normalises queries"),
    ("siglip", {"width": 24}, "pools by attention"),
    ("gated", {"width": 24}, "gated"),
    ("eva", {"mlp": 32}, "family is 'eva'"),
    ("beit", {"width": 24}, "family is 'beit'"),
    ("mixed", {"depth": 2}, "their own rotations"),
    ("swin", {"depth": 2}, "family 'swin'"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISTAKES)
def test_a_shape_that_cannot_be_cut_is_one_clear_error(
    make: Make, as_teacher: Wrap, batches: Batches, name: str, options: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        shrink(as_teacher(make(name)), ShrinkSpec(**options), batches, tmp_path / "out")
    assert caught.value.given is not None
    assert not list(tmp_path.iterdir())


def _silence_head(attention: nn.Module, head: int, *, everything: bool) -> None:
    """What the head gives is not read; for a criterion that looks at weights alone, nothing of it is left."""
    columns = torch.arange(8 * head, 8 * head + 8)
    attention.proj.weight[:, columns] = 0.0
    if everything:
        rows = torch.cat([columns, 32 + columns, 64 + columns])
        attention.qkv.weight[rows] = 0.0
        attention.qkv.bias[rows] = 0.0


def _stream(model: nn.Module) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Every parameter that has channels of the residual stream, and in which dimensions; written out by name."""
    found: list[tuple[Tensor, tuple[int, ...]]] = []
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.q_norm.weight", "attn.q_norm.bias", "attn.k_norm.weight", "attn.k_norm.bias")):
            continue
        if name.endswith(("attn.norm.weight", "attn.norm.bias", "mlp.norm.weight", "mlp.norm.bias")):
            continue
        if name.endswith(("qkv.weight", "fc1.weight", "head.weight", "head_dist.weight")):
            found.append((parameter, (1,)))
        elif name.endswith(("cls_token", "reg_token", "dist_token", "pos_embed")):
            found.append((parameter, (2,)))
        elif not name.endswith(("qkv.bias", "fc1.bias", "head.bias", "head_dist.bias")):
            found.append((parameter, (0,)))
    assert anatomy_of(model).width == 32
    return found
