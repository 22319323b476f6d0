"""Task folders, model folders and weights files from strangers: nothing in them runs, each mistake has its message."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

from remap.errors import RemapError, RunError, WeightsError
from remap.io.sealed_json import sealed_text
from remap.io.tensor_files import read_safetensors
from remap.pipeline.run import start
from remap.recipe.schema import ModelSpec
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task, open_backbone


@pytest.fixture(scope="module")
def source(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder of LoRA, trained for the whole file."""
    recipe = tiny.recipe("train.epochs=1", method="lora", losses="ce")
    return RunDir(start(recipe, tmp_path_factory.mktemp("runs") / "run").run_dir).task


@pytest.fixture
def task(source: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(source, tmp_path / "task"))


class _Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def rewrite(task: Path, data: bytes | None = None, **fields: Any) -> None:
    """New weights and fields, with the checksums that belong to them: a stranger can do that too."""
    meta = json.loads((task / "task.json").read_text()) | fields
    meta.pop("seal", None)
    if data is not None:
        (task / "task.safetensors").write_bytes(data)
        meta["sha256"] = hashlib.sha256(data).hexdigest()
    (task / "task.json").write_text(sealed_text(meta))


def refusal(task: Path) -> str:
    started = time.process_time()
    with pytest.raises(RemapError) as caught:
        load_task(task)
    text = str(caught.value)
    assert caught.value.exit_code == 2 and len(text) < 2000 and time.process_time() - started < 5.0
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    return text


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _one(offsets: list[int], shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"head.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


FILES = {
    "a header of 2**60 bytes": safetensors(_one([0, 4], [1]), bytes(4), 2**60),
    "a header of 2**64 - 1 bytes": safetensors(_one([0, 4], [1]), bytes(4), 2**64 - 1),
    "offsets beyond the end": safetensors(_one([0, 2**50], [2**48]), bytes(4)),
    "offsets that go back": safetensors(_one([4, 0], [1]), bytes(4)),
    "a shape that does not fit its bytes": safetensors(_one([0, 4], [2**40]), bytes(4)),
    "a shape that overflows": safetensors(_one([0, 4], [2**32, 2**32, 2**32]), bytes(4)),
    "overlapping tensors": safetensors(
        {"a": _one([0, 4], [1])["head.weight"], "b": _one([2, 6], [1])["head.weight"]}, bytes(6)
    ),
    "an unknown type": safetensors(_one([0, 4], [1], "O"), bytes(4)),
    "no JSON": safetensors(b"os.system('touch x')", bytes(4)),
    "a deep header": safetensors(b'{"a":' * 50_000, bytes(4)),
    "metadata that is no text": safetensors({"__metadata__": {"_target_": {"os.mkdir": 1}}}, b""),
    "empty": b"",
    "eight bytes": bytes(8),
}


@pytest.mark.guarantee(14)
@pytest.mark.parametrize("data", FILES.values(), ids=list(FILES))
def test_headers_that_lie_are_refused(data: bytes, task: Path, figure: Callable[..., None]) -> None:
    rewrite(task, data)
    assert "is damaged: cannot read its header" in refusal(task)
    with pytest.raises(WeightsError, match="cannot read .* as safetensors"):
        read_safetensors(task / "task.safetensors")
    figure("hostile task and weights files executed, of all tried", 0, 1)


@pytest.mark.guarantee(14)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_in_disguise_is_never_unpickled(
    protocol: int, task: Path, tiny: Any, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """As a task, as a weights file, and in a model folder; also as torch.save packs it."""
    mark = tmp_path / "made"
    disguised = pickle.dumps(_Payload(mark), protocol=protocol)
    rewrite(task, disguised)
    assert "is damaged: cannot read its header" in refusal(task)
    torch.save({"head.weight": _Payload(mark)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="as safetensors"):
        open_backbone(ModelSpec(model=tiny.student, weights=str(tmp_path / "w.safetensors")), 3)
    model = Path(shutil.copytree(tiny.student.removeprefix("local-dir:"), tmp_path / "model"))
    (model / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pth", "weights.pt"):
        torch.save({"head.weight": _Payload(mark)}, model / name)
    with pytest.raises(WeightsError, match="holds no weights in safetensors files"):
        open_backbone(ModelSpec(model=f"local-dir:{model}"), 3)
    assert not mark.exists()
    figure("hostile task and weights files executed, of all tried", 0, 3)


def test_metadata_is_not_looked_at(source: Path, task: Path, tmp_path: Path) -> None:
    """A payload in the text beside the tensors (FlexTok and NeMo instantiated theirs) changes nothing."""
    mark = tmp_path / "made"
    payload = {"_target_": "os.mkdir", "config": f"!!python/object/apply:os.mkdir ['{mark}']", "long": "x" * 10**6}
    rewrite(task, save(load_file(task / "task.safetensors"), metadata=payload), _target_="os.mkdir", note="\x1b[2J")
    network, _ = load_task(task)
    expected = load_task(source)[0].tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.tensors.items()) and not mark.exists()


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def _lora(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if not name.startswith("head"))


TENSORS: dict[str, tuple[Callable[[dict], dict], str]] = {
    "not a number in the head": (_changed("head.bias", lambda t: t * torch.nan), "not finite"),
    "infinity in the method": (lambda ts: _changed(_lora(ts), lambda t: t + torch.inf)(ts), "not finite"),
    "float64": (_changed("head.weight", torch.Tensor.double), "is torch.float64, not torch.float32"),
    "integers": (_changed("head.weight", torch.Tensor.int), "is torch.int32, not torch.float32"),
    "booleans": (_changed("head.bias", lambda t: t > 0), "is torch.bool, not torch.float32"),
    "another shape": (_changed("head.weight", lambda t: t[:, :5].contiguous()), "does not fit"),
    "turned": (_changed("head.weight", lambda t: t.T.contiguous()), "does not fit"),
    "one missing": (lambda ts: {name: t for name, t in ts.items() if name != _lora(ts)}, ""),
    "head missing": (lambda ts: {name: t for name, t in ts.items() if not name.startswith("head")}, "does not fit"),
    "one more": (lambda ts: {**ts, "blocks.0.evil": torch.zeros(3)}, "evil"),
    "four bits each": (
        lambda ts: {**ts, "blocks.0.evil": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)},
        "evil",
    ),
    "a strange name": (lambda ts: {**ts, "\x1b[2J": torch.zeros(3)}, ""),
    "65 dimensions": (_changed("head.bias", lambda t: t.reshape(-1, *[1] * 64)), "head.bias has 65 dimensions"),
    "65 dimensions more": (lambda ts: {**ts, "evil": torch.zeros([1] * 65)}, "evil has 65 dimensions"),
    "nothing": (lambda ts: {}, "does not fit"),
}


@pytest.mark.guarantee(13)
@pytest.mark.parametrize(("change", "says"), TENSORS.values(), ids=list(TENSORS))
def test_tensors_that_do_not_belong_are_refused(
    change: Callable, says: str, task: Path, figure: Callable[..., None]
) -> None:
    rewrite(task, save(change(load_file(task / "task.safetensors"))))
    assert says in refusal(task)
    figure("files that do not belong, refused by name", 1, 1)


META: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": 99}, "format"),
    "a million classes": ({"classes": [f"c{i}" for i in range(1_000_000)]}, "larger than"),
    "a thousand classes": ({"classes": [f"c{i}" for i in range(1_000)]}, "does not fit its 1,000 class names"),
    "no class": ({"classes": []}, "the classifier in"),  # a student of no classes has none
    "a class twice": ({"classes": ["a", "a", "b"]}, "names a class twice"),
    "control characters": ({"classes": ["a\x1b[2J", "b", "c"]}, "classes"),
    "line breaks": ({"classes": ["a\n  do: evil", "b", "c"]}, "classes"),
    "half a character": ({"classes": ["a\ud800", "b", "c"]}, "classes"),
    "turned text": ({"classes": ["a\u202eb", "b", "c"]}, "classes"),
    "a long class": ({"classes": ["a" * 10**6, "b", "c"]}, "classes"),
    "a dotted method": ({"method": {"name": "os.mkdir"}}, "unknown method"),
    "a target": ({"method": {"name": "lora", "_target_": "os.mkdir"}}, "options that lora does not take"),
    "a huge rank": ({"method": {"name": "lora", "rank": 10**9}}, "options that the tensors beside it do not fit"),
    "an endless seed": ({"method": {"name": "vera", "seed": 10**400}}, "options that the tensors beside it do not fit"),
    "an endless rank": ({"method": {"name": "lora", "rank": 10**400}}, "options that the tensors beside it do not fit"),
    "a huge number of prompts": ({"method": {"name": "vpt_deep", "num_prompts": 10**9}}, "do not fit"),
    "a negative rank": ({"method": {"name": "lora", "rank": -1}}, "options that lora does not take"),
    "a huge view": ({"view": {"size": 10**9, "crop_pct": 1.0, "interpolation": "bicubic"}}, "view"),
    "a strange view": ({"view": {"size": 16, "crop_pct": 1.0, "interpolation": "os.mkdir"}}, "view"),
    "no share": ({"view": {"size": 16, "crop_pct": 0.0, "interpolation": "bicubic"}}, "view"),
    "a checksum that is none": ({"sha256": "../../etc/passwd"}, "sha256"),
    "a backbone that it does not hold": ({"holds_backbone": True}, "does not hold the backbone"),
}  # fmt: skip


@pytest.mark.guarantee(14)
@pytest.mark.parametrize(("fields", "says"), META.values(), ids=list(META))
def test_descriptions_that_lie_are_refused(
    fields: dict[str, Any], says: str, task: Path, figure: Callable[..., None]
) -> None:
    rewrite(task, **fields)
    assert says in refusal(task)
    figure("hostile task and weights files executed, of all tried", 0, 1)


BACKBONES = {
    "up": ({"model": "local-dir:../../../etc"}, "backbone.model"),
    "up from the root": ({"model": "local-dir:/tmp/../etc"}, "backbone.model"),
    "the home folder": ({"model": "local-dir:~/x"}, "backbone.model"),
    "a device": ({"model": "local-dir:/dev"}, "config.json is missing"),
    "a strange source": ({"model": "s3://bucket/x"}, "no such model"),
    "a relative weights file": ({"weights": "../w.safetensors"}, "backbone.weights"),
    "a device as weights": ({"weights": "/dev/zero"}, "unknown source of weights"),
    "a FIFO as weights": ({"weights": "FIFO"}, "it is a FIFO"),
    "no weights anywhere": ({"weights": "none"}, "neither holds its backbone nor says where the weights are"),
    "a preset that is none": ({"preset": "evil"}, "backbone.preset"),
    "a huge size": ({"image_size": 10**9}, "backbone.image_size"),
    "a NUL": ({"model": "local-dir:/a\0b"}, "backbone.model"),
    "a long path": ({"model": "local-dir:/" + "a" * 10**6}, "backbone.model"),
}


@pytest.mark.guarantee(14)
@pytest.mark.parametrize(("fields", "says"), BACKBONES.values(), ids=list(BACKBONES))
def test_a_task_does_not_lead_to_surprising_places(
    fields: dict[str, Any], says: str, task: Path, figure: Callable[..., None]
) -> None:
    fifo = task / "f.safetensors"
    os.mkfifo(fifo)
    backbone = json.loads((task / "task.json").read_text())["backbone"]
    rewrite(task, backbone={**backbone, **{k: str(fifo) if v == "FIFO" else v for k, v in fields.items()}})
    assert says in refusal(task)
    figure("hostile task and weights files executed, of all tried", 0, 1)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("near", {"model": "unknown model 'near'", "weights": "unknown source of weights"}),
        ("./near", {"model": "backbone.model", "weights": "backbone.weights"}),
        ("../here/near", {"model": "backbone.model", "weights": "backbone.weights"}),
        ("~/near", {"model": "backbone.model", "weights": "backbone.weights"}),
    ],
)
@pytest.mark.parametrize("key", ["model", "weights"])
def test_a_task_does_not_open_the_runs_around_it(
    key: str, word: str, says: dict[str, str], source: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for its words, before the run is read; an absolute path of the same run is followed."""
    work = tmp_path / "here"
    shutil.copytree(source, work / "near" / "task")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work))
    backbone = json.loads((task / "task.json").read_text())["backbone"]
    rewrite(task, backbone={**backbone, key: word})
    assert says[key] in refusal(task)
    rewrite(task, backbone={**backbone, key: str(work / "near")})
    assert "was tuned on other weights" in refusal(task)  # those of the run, with its method folded in


@pytest.mark.parametrize("weights", ["pretrained", "none"])  # elsewhere, and in the task itself
def test_a_task_is_read_alike_wherever_it_is_read_from(
    weights: str, tiny: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that lies in the working directory under the name of the task's model changes nothing."""
    words = {"student": "mini_student", "method": "linear", "losses": "ce"}
    run = start(tiny.recipe("train.epochs=1", f"student.weights={weights}", **words), tmp_path / "run").run_dir
    identity = load_task(run)[0].identity
    shutil.copytree(source, tmp_path / "work" / identity.model)
    monkeypatch.chdir(tmp_path / "work")
    assert load_task(run)[0].identity == identity


def test_a_task_that_is_its_own_backbone_ends(task: Path) -> None:
    backbone = json.loads((task / "task.json").read_text())["backbone"]
    rewrite(task, backbone={**backbone, "weights": str(task)})
    assert "is tuned on an endless chain of tasks" in refusal(task)


TEXTS = {
    "deep": "[" * 200_000,
    "deep and closed": "[" * 900 + "]" * 900,
    "a key twice": '{"format": 1, "format": 1}',
    "NaN": '{"format": NaN}',
    "a huge number": '{"format": 1e999}',
    "thousands of digits": '{"format": ' + "9" * 10_000 + "}",
    "latin-1": b'{"format": "\xe4"}',
    "a NUL": "\0",
    "nothing": "",
    "a list": "[]",
    "null": "null",
}


@pytest.mark.guarantee(14)
@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_json_that_is_none_is_refused(text: str | bytes, task: Path, figure: Callable[..., None]) -> None:
    (task / "task.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "task.json" in refusal(task)
    figure("hostile task and weights files executed, of all tried", 0, 1)


@pytest.mark.parametrize("name", ["task.json", "task.safetensors"])
def test_what_is_no_file_is_refused_at_once(name: str, task: Path) -> None:
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        path = task / name
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        text = refusal(task)
        assert "cannot read" in text or "is not a task" in text


def test_a_description_of_gigabytes_is_not_read(task: Path) -> None:
    with open(task / "task.json", "r+b") as file:
        file.truncate(2**40)
    assert "larger than" in refusal(task)


def test_a_description_of_many_mistakes_is_not_listed(task: Path) -> None:
    """50 MB of numbers where class names belong: larger than its tensors account for, and one mistake is enough."""
    good = (task / "task.json").read_bytes()
    (task / "task.json").write_bytes(b'{"classes": [' + b"0," * 25_000_000 + b"0]}")
    assert "larger than" in refusal(task)
    (task / "task.json").write_bytes(good)
    rewrite(task, classes=[0] * 100_000)
    assert "classes.0)" in refusal(task)


def test_tensors_of_holes_are_not_hashed(task: Path) -> None:
    """16 GiB, as a header that fits says, of which a few kB are on the disk; and with a header of zeros."""
    data = safetensors(_one([0, 2**34], [2**32]))
    rewrite(task, data)
    os.truncate(task / "task.safetensors", len(data) + 2**34)
    assert "it is mostly holes" in refusal(task)
    (task / "task.safetensors").write_bytes(b"")
    os.truncate(task / "task.safetensors", 2**34)
    assert "is damaged: cannot read its header" in refusal(task)


@pytest.mark.parametrize("name", ["task.json", "task.safetensors"])
def test_a_link_to_nothing_is_one_message(name: str, task: Path) -> None:
    (task / name).unlink()
    (task / name).symlink_to("nowhere")
    assert "cannot read" in refusal(task) and "No such file" in refusal(task)


@pytest.mark.guarantee(13)
def test_a_folder_of_peft_is_named_as_such(tmp_path: Path, figure: Callable[..., None]) -> None:
    """What PEFT 0.21 writes beside an adapter of a timm model."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    save_file({"base_model.model.head.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    text = refusal(tmp_path)
    assert "is an adapter of PEFT, not a task of remap" in text and "merge" in text
    figure("files that do not belong, refused by name", 1, 1)


CONFIGS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "cannot read"),
    "a list": ([], "names no model of timm"),
    "a dotted architecture": ({"architecture": "os.mkdir"}, "names no model of timm"),
    "a huge width": ({"model_args": {"embed_dim": 10**9}}, "larger than"),
    "a huge depth": ({"model_args": {"depth": 10**6}}, "larger than"),
    "wide and deep": ({"model_args": {"embed_dim": 65536, "num_heads": 2, "depth": 40}}, "weights do not fit"),
    "an argument that reads": ({"model_args": {"checkpoint_path": "/tmp/x.pth"}}, "is not an argument of a model"),
    "an argument that downloads": (
        {"model_args": {"pretrained_cfg_overlay": {"url": "http://x"}}},
        "is not an argument",
    ),
    "an argument that is none": ({"model_args": {"_target_": "os.mkdir"}}, "timm cannot build"),
    "infinity": ('{"architecture": "vit_tiny_patch16_224", "model_args": {"mlp_ratio": Infinity}}', "cannot read"),
    "deep": ("[" * 100_000, "cannot read"),
}


@pytest.mark.guarantee(14)
@pytest.mark.parametrize(("config", "says"), CONFIGS.values(), ids=list(CONFIGS))
def test_model_folders_that_lie_are_refused(
    config: Any, says: str, tiny: Any, tmp_path: Path, figure: Callable[..., None]
) -> None:
    model = Path(shutil.copytree(tiny.student.removeprefix("local-dir:"), tmp_path / "model"))
    good = json.loads((model / "config.json").read_text())
    if isinstance(config, dict):
        arguments = {**good["model_args"], **config.get("model_args", {})}
        config = {**good, **config, "model_args": arguments}
    (model / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(RemapError) as caught:
        open_backbone(ModelSpec(model=f"local-dir:{model}"), 3)
    assert says in str(caught.value)
    figure("hostile task and weights files executed, of all tried", 0, 1)


def _described(architecture: str, classes: int = 3, **arguments: Any) -> dict[str, Any]:
    pixels = {"input_size": [3, arguments.get("img_size", 224), arguments.get("img_size", 224)]}
    return {"architecture": architecture, "num_classes": classes, "model_args": arguments, "pretrained_cfg": pixels}


LARGE = {
    "windows": _described(
        "swin_tiny_patch4_window7_224", img_size=512, window_size=64, embed_dim=16, depths=[2, 2], num_heads=[1, 2]
    ),
    "positions": _described("beit_base_patch16_224", img_size=512, patch_size=8, embed_dim=16, depth=2, num_heads=2),
    "classes": _described("vit_tiny_patch16_224", 10**7, img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2),
    "weights elsewhere": "vit_large_patch16_224",
    "a task that holds it": "vit_large_patch16_224",
}


@pytest.fixture
def only_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is built with memory of its own fails the test."""
    real = timm.create_model

    def create_model(name: str, **arguments: Any) -> Any:
        assert torch.empty(0).device.type == "meta", f"{name} is built"
        return real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.guarantee(14)
@pytest.mark.parametrize(("where", "model"), LARGE.items(), ids=list(LARGE))
def test_models_far_larger_than_their_files_are_not_built(
    where: str, model: Any, task: Path, tmp_path: Path, only_described: None, figure: Callable[..., None]
) -> None:
    """A few hundred bytes ask for 0.3 to 1.2 GB: of parameters, of tables that are no parameters, of a classifier."""
    file = tmp_path / "model.safetensors"
    save_file({"head.weight": torch.zeros(3, 3)}, file)
    if where == "a task that holds it":
        backbone = json.loads((task / "task.json").read_text())["backbone"]
        rewrite(task, backbone={**backbone, "model": model, "weights": "none"}, holds_backbone=True)
        text = refusal(task)
    else:
        spec = ModelSpec(model=f"local-dir:{tmp_path}")
        if isinstance(model, dict):
            (tmp_path / "config.json").write_text(json.dumps(model))
        else:
            spec = ModelSpec(model=model, weights=str(file))
        with pytest.raises(WeightsError) as caught:
            open_backbone(spec, model["num_classes"] if where == "classes" else 3, keep_head=where == "classes")
        text = str(caught.value)
    assert "describes a model that its weights do not fit" in text
    figure("hostile task and weights files executed, of all tried", 0, 1)


def test_a_model_folder_cannot_say_where_its_weights_are(tiny: Any, tmp_path: Path) -> None:
    """pretrained_cfg of a stranger names a file and an address; the weights come from the folder all the same."""
    model = Path(shutil.copytree(tiny.student.removeprefix("local-dir:"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    strange = {"file": "/etc/passwd", "url": "http://127.0.0.1:9/x.pth", "hf_hub_id": "a/b", "source": "hf-hub"}
    config["pretrained_cfg"] |= {**strange, "custom_load": True, "state_dict": {"head.weight": [1]}}
    (model / "config.json").write_text(json.dumps(config))
    found = open_backbone(ModelSpec(model=f"local-dir:{model}"), 3)
    assert found.identity.sha256 == open_backbone(ModelSpec(model=tiny.student), 3).identity.sha256


def test_truncated_weights_of_a_model_folder(tiny: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny.student.removeprefix("local-dir:"), tmp_path / "model"))
    data = (model / "model.safetensors").read_bytes()
    for kept in (0, 8, 1000, len(data) - 1):
        (model / "model.safetensors").write_bytes(data[:kept])
        with pytest.raises(WeightsError):
            open_backbone(ModelSpec(model=f"local-dir:{model}"), 3)


def test_a_task_folder_is_not_written_to(source: Path) -> None:
    before = {path: path.read_bytes() for path in source.iterdir()}
    load_task(source)
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    with pytest.raises(RunError, match="there is no run directory .*nothing-here"):
        load_task(source.parent / "nothing-here")
