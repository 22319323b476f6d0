"""Weights from every source remap knows, on small things made here: no network is needed."""

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models import save_for_hf
from torch import nn

from remap.backbones.anatomy import anatomy_of, module_at
from remap.backbones.build import build, require_at_hand, require_stored, state_hash
from remap.backbones.families import FAMILIES
from remap.backbones.mini import WEIGHTS, fold_norms
from remap.backbones.names import MODELS, PRESETS, SHORT_NAMES
from remap.errors import BackboneError, UnknownName, WeightsError

NAME = "vit_mini_student_patch4_32"


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A safetensors file of a mini model with a five-class head, and the model it came from."""
    torch.manual_seed(3)
    model = timm.create_model(NAME, num_classes=5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", model


def _same_backbone(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[k], right[k]) for k in left if not k.startswith("head"))


def test_a_safetensors_file_gives_its_weights_and_a_fresh_head(weights: tuple[Path, nn.Module]) -> None:
    path, model = weights
    built = build(NAME, str(path), 7)
    assert _same_backbone(built.model, model)
    assert built.model.head.weight.shape == (7, 128) and built.head_is_fresh
    assert torch.equal(built.model.head.bias, torch.zeros(7))


def test_even_a_head_of_the_same_size_is_fresh_unless_kept(weights: tuple[Path, nn.Module]) -> None:
    """Ten CIFAR classes are not ten digits: a head is never taken over because its size happens to fit."""
    path, model = weights
    assert not torch.equal(build(NAME, str(path), 5).model.head.weight, model.head.weight)
    kept = build(NAME, str(path), 5, keep_head=True)
    assert torch.equal(kept.model.head.weight, model.head.weight) and not kept.head_is_fresh
    assert build(NAME, str(path), 6, keep_head=True).model.num_classes == 5  # matched with the data's classes later


def test_a_local_folder_as_timm_saves_it(weights: tuple[Path, nn.Module], tmp_path: Path) -> None:
    save_for_hf(weights[1], tmp_path / "folder", safe_serialization=True)
    assert _same_backbone(build(f"local-dir:{tmp_path / 'folder'}", "pretrained", 3).model, weights[1])


@pytest.mark.slow
def test_a_hub_cache_made_by_hand_and_a_hub_out_of_reach(weights: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """timm's own loader reads a cache laid out as the hub lays it out; the tag is one of timm's.

    What is not there is an error that names repository, cache and ways on.
    """
    name = "vit_tiny_patch16_224.augreg_in21k"
    model = timm.create_model(name, num_classes=21843)
    snapshot = tmp_path / "hub" / f"models--timm--{name}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    code = textwrap.dedent(
        """
        from remap.backbones.build import build
        built = build("vit_tiny", "pretrained", 3)
        print(built.identity.model, built.identity.sha256)
        build("vit_large", "pretrained", 3)
        """
    )
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [name, state_hash(model, anatomy_of(model))], done.stderr
    for part in (
        "WeightsError",
        "timm/vit_large_patch16_224.augreg_in21k",
        str(tmp_path / "hub"),
        "hf download",
        "local-dir:",
        "--weights none",
    ):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("word", "weights", "error", "part"),
    [
        ("vit_smal", "none", UnknownName, "did you mean 'vit_small'"),
        ("vit_small_patch16_224.nonsense", "pretrained", UnknownName, "no weights tagged 'nonsense'"),
        ("runs/absent", "pretrained", UnknownName, "no such model or run directory"),
        (NAME, "model.npz", WeightsError, "unknown source of weights"),
        (NAME, "model.pt", WeightsError, "cannot read model.pt"),
        (NAME, "absent.safetensors", WeightsError, "cannot read absent.safetensors"),
        ("local-dir:/nowhere", "pretrained", WeightsError, "there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_built_says_why(word: str, weights: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        build(word, weights, 3)


def test_weights_of_another_shape_are_refused(weights: tuple[Path, nn.Module]) -> None:
    with pytest.raises(WeightsError, match="does not fit"):
        build("vit_mini_teacher_patch4_32", str(weights[0]), 3)


def test_weights_with_holes_are_refused(weights: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """timm itself loads such a file without a word when the number of classes differs; the rest stays random."""
    tensors = {key: value for key, value in weights[1].state_dict().items() if not key.startswith("blocks.3.")}
    save_file(tensors, tmp_path / "holes.safetensors")
    with pytest.raises(WeightsError, match=r"12 tensors would stay random"):
        build(NAME, str(tmp_path / "holes.safetensors"), 3)


def test_a_file_without_a_head_will_do(weights: tuple[Path, nn.Module], tmp_path: Path) -> None:
    tensors = {key: value for key, value in weights[1].state_dict().items() if not key.startswith("head.")}
    save_file(tensors, tmp_path / "headless.safetensors")
    for classes in (3, 10):
        assert _same_backbone(build(NAME, str(tmp_path / "headless.safetensors"), classes).model, weights[1])


def test_a_pickle_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="as safetensors"):
        build(NAME, str(tmp_path / "w.safetensors"), 3)


def test_the_hash_sees_one_flipped_bit_and_no_head() -> None:
    """Second formula: the same bytes through hashlib in the documented order."""
    built = build(NAME, "none", 3)
    digest = hashlib.sha256()
    for name, tensor in sorted(built.model.state_dict().items()):
        if not name.startswith("head."):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode() + tensor.numpy().tobytes())
    assert built.identity.sha256 == digest.hexdigest()
    with torch.no_grad():
        built.model.head.weight.zero_()
    assert state_hash(built.model, built.anatomy) == built.identity.sha256
    built.model.cls_token.data.view(torch.int32)[0, 0, 0] ^= 1
    assert state_hash(built.model, built.anatomy) != built.identity.sha256


@pytest.mark.parametrize("short", [name for name in SHORT_NAMES if not name.startswith("mini")])
def test_short_names_are_tags_of_timm_with_the_sizes_listed(short: str) -> None:
    """Source: timm's own model of that name, built without a head on the meta device."""
    architecture, _, tag = SHORT_NAMES[short].partition(".")
    assert any(name.endswith(tag) for name in timm.list_pretrained(f"{architecture}.*"))
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0)
    assert MODELS[short].parameters == round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert MODELS[short].pixels == timm.get_pretrained_cfg(SHORT_NAMES[short]).input_size[-1]
    assert FAMILIES.row(anatomy_of(model).family)


def test_the_tables_of_names_agree() -> None:
    assert set(PRESETS) <= set(SHORT_NAMES)


def test_folded_norms_compute_what_they_did_in_evaluation() -> None:
    """In float64; the statistics, scales and shifts are those of no fresh layer."""
    trained, plain = (timm.create_model(f"vit_mini_{name}_patch4_32").double() for name in ("convbn", "conv"))
    torch.manual_seed(0)
    for module in trained.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand_like(tensor) + 0.5)
    plain.load_state_dict(fold_norms(trained.state_dict()))
    images_BCHW = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images_BCHW), trained.eval()(images_BCHW), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("short", "limit"), [("mini_student", 0.7e6), ("mini_teacher", 5e6)])
def test_the_mini_pair_is_as_small_as_promised(short: str, limit: float) -> None:
    model = build(short, "none", 10).model
    assert sum(p.numel() for p in model.parameters()) <= limit
    assert model.patch_embed.patch_size == (4, 4) and model.patch_embed.img_size == (32, 32)


def test_the_mini_teacher_with_convolutions_has_the_tokens_of_the_pair() -> None:
    built = build("mini_conv", "pretrained", 10)
    assert built.anatomy.grid == (8, 8) and sum(p.numel() for p in built.model.parameters()) <= 5e6
    assert sum(file.stat().st_size for file in WEIGHTS.glob("*.safetensors")) <= 12e6


def test_the_distilled_student_is_the_student_with_other_weights() -> None:
    student, distilled = (
        build(short, "pretrained", 10).model.state_dict() for short in ("mini_student", "mini_distilled")
    )
    assert {name: one.shape for name, one in student.items()} == {name: one.shape for name, one in distilled.items()}
    assert not any(torch.equal(student[name], distilled[name]) for name in student if name.endswith("weight"))


# --- another size of images


@pytest.mark.parametrize("source", ["pretrained", "file", "folder"])
def test_position_embeddings_of_another_size_are_resampled(
    source: str, weights: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    """Source: timm's own function on the grid of 8 x 8; everything else is as it was."""
    word, own = NAME, weights[1].state_dict()
    if source == "pretrained":  # timm resamples in the file's own precision
        own = load_file(timm.get_pretrained_cfg(NAME).file)
    if source == "folder":
        save_for_hf(weights[1], tmp_path / "folder", safe_serialization=True)
        word = f"local-dir:{tmp_path / 'folder'}"
    built = build(word, str(weights[0]) if source == "file" else "pretrained", 3, image_size=48)
    assert built.identity.image_size == built.preprocess.size == 48
    assert built.anatomy.image_size == (48, 48) and built.anatomy.grid == (12, 12)
    expected = {key: tensor for key, tensor in own.items() if not key.startswith("head.")}
    expected["pos_embed"] = resample_abs_pos_embed(expected["pos_embed"], (12, 12), num_prefix_tokens=1)
    for key, tensor in expected.items():
        assert torch.equal(built.model.state_dict()[key], tensor.float()), key
    assert built.model(torch.randn(2, 3, 48, 48)).shape == (2, 3)


def test_a_preset_and_a_size_go_together(weights: tuple[Path, nn.Module]) -> None:
    path, model = weights
    built = build(NAME, str(path), 3, preset="mae", image_size=40)
    expected = resample_abs_pos_embed(model.pos_embed.detach(), (10, 10), num_prefix_tokens=1)
    assert torch.equal(built.model.pos_embed, expected)
    assert (built.preprocess.size, built.preprocess.mean) == (40, (0.485, 0.456, 0.406))
    assert built.model.global_pool == "avg"


def test_the_models_own_size_changes_nothing() -> None:
    plain, named = build(NAME, "pretrained", 3), build(NAME, "pretrained", 3, image_size=32)
    assert plain.identity.image_size is None
    assert (named.identity.sha256, named.preprocess) == (plain.identity.sha256, plain.preprocess)
    assert named.anatomy == plain.anatomy


@pytest.mark.parametrize("keep_head", [False, True])
def test_every_family_takes_another_size(other_family: tuple[str, str], keep_head: bool) -> None:
    """Source: the shapes of timm's own forward, and its own weights but for what depends on the size."""
    family, word = other_family
    own, built = build(word, "pretrained", 7), build(word, "pretrained", 7, image_size=64, keep_head=keep_head)
    assert built.anatomy.family == family and built.anatomy.image_size == (64, 64) and built.preprocess.size == 64
    shapes: dict[str, torch.Size] = {}
    for block in built.anatomy.blocks:
        module_at(built.model, block.block).register_forward_hook(
            lambda m, args, output, path=block.block: shapes.update({path: output.shape})
        )
    with torch.no_grad():
        assert built.model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    for block in built.anatomy.blocks:
        shape = shapes[block.block]
        if "sequence" in built.anatomy.parts:
            assert shape[1] == built.anatomy.num_prefix_tokens + built.anatomy.num_patches
        else:
            assert tuple(shape[1:3] if block.channels_last else shape[2:]) == block.grid
    assert tuple(side * 2 for side in own.anatomy.grid) == built.anatomy.grid
    found = built.model.state_dict()
    for key, tensor in own.model.state_dict().items():
        if found[key].shape == tensor.shape:
            assert torch.equal(found[key], tensor) or built.anatomy.is_head(key), key
        elif key == "pos_embed":
            assert torch.equal(found[key], resample_abs_pos_embed(tensor, (8, 8), num_prefix_tokens=1))
        else:  # grids of 4 x 4 and 8 x 8 patches
            assert key.endswith("relative_position_bias_table")
            expected = resize_rel_pos_bias_table(tensor, (8, 8), found[key].shape)
            assert not torch.equal(found[key][:49], tensor[:49]) and torch.equal(found[key], expected), key


def test_a_model_folder_says_which_sizes_it_takes(other_family: tuple[str, str]) -> None:
    family, word = other_family
    of_family = dict.fromkeys(("naflexvit", "eva", "beit"), "32 and 40") | dict.fromkeys(
        ("swin", "swinv2"), "32 and 64"
    )
    nearest = of_family.get(family)
    if nearest is None:
        assert build(word, "pretrained", 3, image_size=33).anatomy.image_size == (33, 33)
        return
    with pytest.raises(BackboneError, match=f"nearest are {nearest}"):
        build(word, "pretrained", 3, image_size=33)


@pytest.mark.parametrize(
    ("word", "size", "part"),
    [
        (NAME, 50, "patches are 4 x 4.*\n.*50\n.*nearest are 48 and 52"),
        (NAME, 3, "4 and more"),
        ("vit_small_r26_s32_224", 112, "patches are 32 x 32"),
        ("eva02_tiny_patch14_224", 224 + 16, "nearest are 238 and 252"),
        # Grids of 24, 12, 6 and 3 patches: 24 are no whole windows of 7.
        ("swin_tiny_patch4_window7_224", 96, "windows 7 patches.*\n.*\n.*nearest are 56 and 112"),
        ("swin_tiny_patch4_window7_224", 226, "only whole ones fit"),
        ("resnet18", 31, "last stage is 32 times smaller.*\n.*31\n.*32 and more"),
        ("convnext_atto", 16, "32 and more"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(word: str, size: int, part: str) -> None:
    with pytest.raises(BackboneError, match=part) as caught:
        require_at_hand(word, "none", size)
    assert word in str(caught.value)
    with pytest.raises(BackboneError, match=part):
        build(word, "none", 3, image_size=size)


@pytest.mark.parametrize("each", [2, 4])
def test_tables_of_positions_may_be_larger_than_the_weights(each: int) -> None:
    """Source: the 86.53 million parameters that timm lists for BEiT, stored in ``each`` bytes; nothing is built.

    For n patches and a class token, its 12 blocks have tables of (n + 1)^2 indices of 8 bytes: 2.6 GB at 1152 pixels,
    7.5 and 15 times the file, and 26 GB at 2048.
    """
    for size in (224, 1024, 1152, 1536):
        require_stored("beit_base_patch16_224", 86_530_000 * each, image_size=size)
    with pytest.raises(WeightsError, match="its weights do not fit\n.*more than [0-9,]+ bytes of buffers"):
        require_stored("beit_base_patch16_224", 86_530_000 * each, image_size=2048)


@pytest.mark.parametrize("size", [56, 112, 448])
def test_windows_that_fit_are_no_hindrance(size: int) -> None:
    """Source: timm's forward on the meta device pads nothing but a last stage that is one window."""
    require_at_hand("swin_tiny_patch4_window7_224", "none", size)
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=size)
        features = model.forward_features(torch.zeros(1, 3, size, size))
    for stage in model.layers:
        for block in stage.blocks:
            assert all(
                side % window == 0 for side, window in zip(block.input_resolution, block.window_size, strict=True)
            )
    assert tuple(features.shape[1:3]) == anatomy_of(model).grid


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_atto_ols", "resnet18", "resnet50d", "seresnet50"])
@pytest.mark.parametrize("size", [32, 50, 75, 95])
def test_convolutions_take_any_size(name: str, size: int) -> None:
    """Source: the shapes of timm's forward on the meta device."""
    require_at_hand(name, "none", size)
    with torch.device("meta"):
        model = timm.create_model(name, pretrained_cfg_overlay={"input_size": (3, size, size)})
        anatomy, shapes = anatomy_of(model), {}
        for block in anatomy.blocks:
            module_at(model, block.block).register_forward_hook(
                lambda m, args, output, path=block.block: shapes.update({path: tuple(output.shape[2:])})
            )
        model.eval()(torch.zeros(1, 3, size, size))
    assert anatomy.image_size == (size, size)
    assert shapes == {block.block: block.grid for block in anatomy.blocks}
