"""Task files give the same logits back, and refuse whatever is not exactly what was saved."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from remap.backbones.families import FAMILIES
from remap.errors import BackboneError, RemapError, RemapWarning, RunError
from remap.io.sealed_json import sealed_text
from remap.network import Network, Runner
from remap.pipeline.run import Result, start
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task, save_task
from remap.runs.task_file import read_meta, read_tensors
from remap.tuning import METHODS

FITTING = [row.name for row in METHODS if row.fits(FAMILIES.row("vit").parts)]
MERGEABLE = [name for name in FITTING if METHODS.row(name).mergeable]
ONE_EACH = list({METHODS.row(name).category: name for name in reversed(FITTING)}.values())
# Defaults above what layers as narrow as the student's can have.
SMALL = {name: ["method.rank=8"] for name in ("fact_tk", "randlora", "psoft")}
SMALL |= {name: ["method.coefficients=100"] for name in ("fourierft", "waveft")}


@pytest.fixture(scope="module")
def run_of(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """A short run of a method, trained once for the whole file."""
    done: dict[tuple, Result] = {}
    folder = tmp_path_factory.mktemp("runs")

    def get(method: str, *settings: str) -> Result:
        key = (method, *settings)
        if key not in done:
            recipe = tiny.recipe("train.epochs=1", *SMALL.get(method, ()), *settings, method=method, losses="ce")
            done[key] = start(recipe, folder / f"{method}{len(done)}")
        return done[key]

    return get


@pytest.fixture
def task(run_of: Callable[..., Result], tmp_path: Path) -> Path:
    """A copy of a task folder that may be damaged."""
    source = RunDir(run_of("vpt_deep").run_dir).task
    for name in ("task.json", "task.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    return tmp_path


# What a run saves does not depend on the method, but on what it trains: one of each category. Every method's file is
# loaded in reliability/test_tasks.py, and its run's in reliability/test_sharding.py, which leaves out the last four.
@pytest.mark.parametrize("weights", ["pretrained", "none"])
@pytest.mark.parametrize("method", [*ONE_EACH, "fourierft", "waveft", "c3a", "psoft"])
def test_a_task_reloads_to_the_same_logits(run_of: Callable[..., Result], method: str, weights: str) -> None:
    """Random frozen weights exist nowhere else, so a task on them must bring them along."""
    result = run_of(method, f"student.weights={weights}")
    torch.manual_seed(99)
    network, view = load_task(result.run_dir)
    assert torch.equal(_logits(network), _logits(result.student))
    assert network.classes == result.student.classes == ("blue", "green", "red")
    assert view.size == 16
    assert network.num_trainable == result.student.num_trainable


def test_a_seed_is_no_size(run_of: Callable[..., Result]) -> None:
    """Options that size tensors are bounded by the tensors beside them; a seed of any height is one."""
    result = run_of("vera", "method.seed=2147483647")
    assert torch.equal(_logits(load_task(result.run_dir)[0]), _logits(result.student))


@pytest.mark.parametrize("method", ["linear", "vpt_shallow", "vpt_deep", "adaptformer", "bitfit"])
def test_a_task_holds_what_was_trained_and_nothing_else(run_of: Callable[..., Result], method: str) -> None:
    """Expected size: four bytes a trained number, plus names (the bound a survey of adapters' users asks for)."""
    result = run_of(method)
    tensors = load_file(RunDir(result.run_dir).task / "task.safetensors")
    assert set(tensors) == set(result.student.trained)
    assert sum(t.numel() for t in tensors.values()) == result.summary["student"]["trainable_parameters"]
    assert result.summary["student"]["task_bytes"] <= 1.1 * 4 * result.student.num_trainable + 64 * 1024


def test_saving_a_loaded_task_gives_the_same_bytes(run_of: Callable[..., Result], tmp_path: Path) -> None:
    result = run_of("adaptformer")
    network, view = load_task(result.run_dir)
    save_task(tmp_path, network, view, "adaptformer", RunDir(result.run_dir).recipe().method.options)
    for name in ("task.json", "task.safetensors"):
        assert (tmp_path / name).read_bytes() == (RunDir(result.run_dir).task / name).read_bytes()


@pytest.mark.guarantee(13)
@pytest.mark.parametrize("place", ["numbers", "header"])
def test_a_flipped_bit_is_refused(task: Path, place: str, figure: Callable[..., None]) -> None:
    data = bytearray((task / "task.safetensors").read_bytes())
    data[-7 if place == "numbers" else 20] ^= 4
    (task / "task.safetensors").write_bytes(data)
    with pytest.raises(RunError, match="is damaged: (its SHA-256 differs|cannot read its header)"):
        load_task(task)
    figure("files that do not belong, refused by name", 1, 1)


@pytest.mark.guarantee(13)
@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(task: Path, kept: int, figure: Callable[..., None]) -> None:
    path = task / "task.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RunError, match="is damaged"):
        load_task(task)
    figure("files that do not belong, refused by name", 1, 1)


def test_a_missing_file_is_named(task: Path) -> None:
    (task / "task.safetensors").unlink()
    with pytest.raises(RunError, match="cannot read .*task.safetensors: No such file"):
        load_task(task)


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type": "LORA", "base_model_name_or_path": null, "r": 8}',  # what PEFT writes beside an adapter
        '{"format": 99}',
        "{",
    ],
)
def test_json_of_another_tool_is_refused(task: Path, text: str) -> None:
    (task / "task.json").write_text(text)
    with pytest.raises(RunError, match=r"task.json"):
        load_task(task)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", {"name": "no_such_method"}),
        ("method", {"name": "vpt_deep", "no_such_option": 1}),
        ("method", {"name": "vpt_deep", "num_prompts": 3}),
        ("method", {"name": "linear"}),
        ("classes", ["one", "two"]),
        ("view", {"size": 16}),
        ("preprocess", {"size": 16}),
        ("backbone", {"model": "vit_tiny_patch16_224"}),
        ("classes", 7),
    ],
)
def test_a_task_that_was_edited_by_hand_is_refused(task: Path, field: str, value: object) -> None:
    meta = json.loads((task / "task.json").read_text())
    (task / "task.json").write_text(json.dumps({**meta, field: value}, indent=2) + "\n")
    with pytest.raises(RunError, match="does not fit its own SHA-256"):
        load_task(task)
    del meta["seal"]
    (task / "task.json").write_text(sealed_text({**meta, field: value}))  # by somebody who knows how
    with pytest.raises(RemapError) as caught:
        load_task(task)
    assert caught.value.exit_code == 2 and "SHA-256" not in str(caught.value)


@pytest.mark.guarantee(13)
def test_a_flipped_bit_anywhere_is_refused(task: Path, figure: Callable[..., None]) -> None:
    """Bits of both files, before there is a backbone to build; tools/fuzz_folders.py tries thousands."""
    tried = 0
    for name, step in (("task.json", 37), ("task.safetensors", 997)):
        path, data = task / name, (task / name).read_bytes()
        for bit in range(0, 8 * len(data), step):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(RunError, match=r"SHA-256|cannot read|is not a task"):
                read_tensors(task, read_meta(task))
            tried += 1
        path.write_bytes(data)
    assert read_tensors(task, read_meta(task)) and tried > 200
    figure("flipped bits of task folders that were refused", tried, tried)


def test_a_task_of_an_earlier_version_is_said_to_be_unsealed(task: Path) -> None:
    """Version 0.1 wrote the same entries without the last one."""
    meta = json.loads((task / "task.json").read_text())
    del meta["seal"]
    (task / "task.json").write_text(json.dumps(meta, indent=2) + "\n")
    with pytest.warns(RemapWarning, match="is not sealed"):
        load_task(task)


@pytest.mark.guarantee(13)
def test_another_backbone_is_refused(run_of: Callable[..., Result], tiny: Any, figure: Callable[..., None]) -> None:
    """One frozen weight of the model folder changes by one bit after the run."""
    result = run_of("vpt_deep")
    path = Path(tiny.student.removeprefix("local-dir:")) / "model.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    tensors["blocks.1.mlp.fc1.weight"][0, 0] *= 1 + 2**-20
    save_file(tensors, path)
    try:
        with pytest.raises(RunError, match="was tuned on other weights") as caught:
            load_task(result.run_dir)
    finally:
        path.write_bytes(before)
    assert result.summary["student"]["backbone_sha256"][:16] in str(caught.value)
    load_task(result.run_dir)
    figure("files that do not belong, refused by name", 1, 1)


# How each method is folded after its state was loaded: tests/tuning/test_conformance.py.
@pytest.mark.parametrize("method", list({METHODS.row(name).category: name for name in MERGEABLE}.values()))
def test_a_folded_run_is_a_backbone_for_another_student(
    run_of: Callable[..., Result], tiny: Any, tmp_path: Path, method: str
) -> None:
    """Expected: the run's own tokens in front of the head, but for the rounding of folding."""
    source = run_of(method)
    recipe = tiny.recipe("train.epochs=1", method="linear", losses="ce", student=str(source.run_dir))
    student = start(recipe, tmp_path / "run").student
    images = _images()
    with torch.no_grad():
        expected = source.student.model.eval().forward_features(images)
        found = student.model.eval().forward_features(images)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    again, _ = load_task(tmp_path / "run")
    assert torch.equal(_logits(again), _logits(student))


def test_prompts_cannot_be_folded_into_a_student(run_of: Callable[..., Result], tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(losses="ce", student=str(run_of("vpt_deep").run_dir))
    with pytest.raises(BackboneError, match="cannot be folded"):
        start(recipe, tmp_path / "run")


@pytest.mark.parametrize("method", ["full", "vpt_deep"])
def test_a_run_teaches_with_its_own_head(run_of: Callable[..., Result], tiny: Any, tmp_path: Path, method: str) -> None:
    """No head is fitted anew: the teacher's count is the one the run itself ended with."""
    source = run_of(method, "train.lr=0.02", "train.epochs=4")
    recipe = tiny.recipe("teacher.allow_weak=true", teacher=str(source.run_dir))
    summary = start(recipe, tmp_path / "run").summary
    assert summary["teacher"]["head"] == "its own"
    assert summary["teacher"]["accuracy"] == source.summary["student"]["accuracy"]
    assert [path.name for path in (tmp_path / "run" / "teacher").iterdir()] == ["judged.json"]


@pytest.mark.parametrize("weights", ["pretrained", "none"])
def test_a_task_at_another_size_reloads_to_the_same_logits(run_of: Callable[..., Result], weights: str) -> None:
    """Expected: a grid of 3 x 3 patches of 8 pixels, where the folder's own is 2 x 2."""
    result = run_of("vpt_deep", f"student.weights={weights}", "student.image_size=24")
    network, view = load_task(result.run_dir)
    assert network.anatomy.grid == (3, 3) and network.model.pos_embed.shape == (1, 1 + 9, 16)
    assert network.identity == result.student.identity and network.identity.image_size == 24
    assert network.preprocess.size == view.size == 24
    assert torch.equal(_logits(network), _logits(result.student))


def test_tasks_from_before_sizes_could_be_chosen_still_load(task: Path) -> None:
    before = load_task(task)[0]
    meta = json.loads((task / "task.json").read_text())
    assert meta["backbone"].pop("image_size") is None and meta.pop("seal")
    (task / "task.json").write_text(json.dumps(meta))
    with pytest.warns(RemapWarning, match="is not sealed"):
        network, _ = load_task(task)
    assert network.identity.image_size is None
    assert torch.equal(_logits(network), _logits(before))


def test_a_task_whose_size_was_edited_is_refused(task: Path) -> None:
    """Position embeddings of another grid are another backbone."""
    meta = json.loads((task / "task.json").read_text())
    meta["backbone"]["image_size"] = 24
    del meta["seal"]
    (task / "task.json").write_text(sealed_text(meta))
    with pytest.raises(RunError, match="was tuned on other weights"):
        load_task(task)


def test_a_run_keeps_its_size_as_a_student(run_of: Callable[..., Result], tiny: Any, tmp_path: Path) -> None:
    source = run_of("bitfit", "student.image_size=24")
    recipe = tiny.recipe(
        "train.epochs=1", "student.image_size=24", method="linear", losses="ce", student=str(source.run_dir)
    )
    student = start(recipe, tmp_path / "same").student
    assert student.anatomy.grid == (3, 3) and student.identity.image_size == 24
    again, _ = load_task(tmp_path / "same")
    assert torch.equal(_logits(again), _logits(student))
    for settings in (
        {"student": str(source.run_dir)},
        {"settings": (f"student.weights={source.run_dir}",)},
        {"settings": ("student.image_size=null", "teacher.image_size=16"), "teacher": str(source.run_dir)},
    ):
        asked = ("student.image_size=16", *settings.pop("settings", ()))
        with pytest.raises(BackboneError, match=r"24 x 24 pixels\n.*image_size: 16\n.*24, or null"):
            start(tiny.recipe(*asked, **settings), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_a_run_has_its_weights(run_of: Callable[..., Result], tiny: Any, tmp_path: Path, of: str) -> None:
    run = str(run_of("bitfit").run_dir)
    recipe = tiny.recipe(f"{of}.weights=none", **{of: run})
    with pytest.raises(BackboneError, match=r"already has weights\n.*weights: none\n.*leave weights out"):
        start(recipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("prepare", ["probe", "full"])
def test_a_teacher_at_its_own_size(tiny: Any, tmp_path: Path, prepare: str) -> None:
    """Expected grids: 32 / 8 = 4 for the teacher, 16 / 8 = 2 for the student; images are read at the larger size."""
    settings = ("train.epochs=1", f"teacher.prepare={prepare}", "teacher.allow_weak=true")
    recipe = tiny.recipe(*settings, "teacher.image_size=32")
    assert recipe.digest() != tiny.recipe(*settings).digest()
    result = start(recipe, tmp_path / "run")
    teacher, view = load_task(RunDir(result.run_dir).teacher)
    assert (teacher.anatomy.grid, teacher.preprocess.size) == ((4, 4), 32)
    assert (result.student.anatomy.grid, result.student.preprocess.size) == ((2, 2), 16)
    assert view.size == 32 and load_task(result.run_dir)[1].size == 32


def test_the_file_is_plain_safetensors(run_of: Callable[..., Result]) -> None:
    """Eight bytes of header length, a JSON header, numbers: nothing in it can run."""
    data = (RunDir(run_of("bitfit").run_dir).task / "task.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "remap task 1"}
    assert max(end for _, end in (one["data_offsets"] for one in header.values())) == len(data) - 8 - length


def _images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(network: Network) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (5, 3, 16, 16), generator=generator, dtype=torch.uint8)
    network.model.eval()
    return Runner(network)(images).logits_BC
