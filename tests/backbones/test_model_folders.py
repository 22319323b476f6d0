"""Which file of a model folder is read, and how large a model may be: folders that strangers bring."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from remap.backbones.build import build
from remap.backbones.size_bound import bounded
from remap.errors import WeightsError
from remap.io.tensor_files import read_safetensors


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.student.removeprefix("local-dir:"), tmp_path / "model"))


def _open(folder: Path) -> Any:
    return build(f"local-dir:{folder}", "pretrained", 3)


def test_a_pickle_beside_a_decoy_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm itself would prefer the pickle to safetensors of another name."""
    expected = _open(folder).identity.sha256
    torch.save({"head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "zz.safetensors")
    monkeypatch.setattr(torch, "load", lambda *_args, **_more: pytest.fail("a pickle in a folder was read"))
    assert _open(folder).identity.sha256 == expected
    save_file({"a": torch.zeros(1)}, folder / "aa.safetensors")
    with pytest.raises(WeightsError, match="several files of weights"):
        _open(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(WeightsError, match="holds no weights in safetensors files"):
        _open(folder)


def _sparse(path: Path, size: int) -> None:
    """A file of this length with a complete header and next to nothing on the disk."""
    entries = {"head.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size // 4 * 4]}}
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size // 4 * 4)


def test_holes_are_not_weights(folder: Path) -> None:
    _sparse(folder / "model.safetensors", 2**33)
    with pytest.raises(WeightsError, match="mostly holes"):
        _open(folder)
    with pytest.raises(WeightsError, match="mostly holes"):
        read_safetensors(folder / "model.safetensors")


def _config(folder: Path, **arguments: Any) -> None:
    whole = json.loads((folder / "config.json").read_text())
    whole["model_args"] |= arguments
    (folder / "config.json").write_text(json.dumps(whole))


def test_a_decoy_of_the_right_length_does_not_vouch_for_a_model(folder: Path) -> None:
    _config(folder, embed_dim=8192, num_heads=8, depth=4)
    _sparse(folder / "zz.safetensors", 4 * 2**30)
    with pytest.raises(WeightsError, match="weights do not fit"):
        _open(folder)


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [("resnet18", {"layers": [30_000, 1, 1, 1]}), ("cait_xxs24_224", {"depth_token_only": 30_000})],
)
def test_blocks_are_counted_whatever_their_number_is_called(
    architecture: str, arguments: dict[str, Any], folder: Path
) -> None:
    (folder / "config.json").write_text(
        json.dumps({"architecture": architecture, "model_args": arguments, "pretrained_cfg": {}})
    )
    with pytest.raises(WeightsError, match="weights do not fit"):
        _open(folder)


def test_an_image_size_of_thousands_for_a_shipped_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """800 MB of position embeddings for 3 MB of weights; nothing is built but on the meta device."""
    real = timm.create_model

    def create_model(name: str, **arguments: Any) -> Any:
        assert torch.empty(0).device.type == "meta"
        return real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(WeightsError, match="weights do not fit.*|where image_size was chosen"):
        build("mini_teacher", "pretrained", 3, image_size=4096)


def test_a_link_that_leads_nowhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.symlink("nothing", folder / "model.safetensors")
    with pytest.raises(WeightsError, match="a link that leads nowhere"):
        _open(folder)


def test_a_tensor_of_more_dimensions_than_torch_has(folder: Path) -> None:
    header = json.dumps({"head.weight": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(WeightsError, match="more than 64 dimensions"):
        _open(folder)


def test_modules_without_parameters_are_counted() -> None:
    """The largest model of timm has some 5,000."""
    with pytest.raises(WeightsError, match="more than 20,000 modules"), bounded("deep", None):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(20_001)))
    with bounded("wide", None):
        assert torch.nn.Linear(2**20, 2**20).weight.device.type == "meta"
    with pytest.raises(WeightsError, match="bytes of parameters"), bounded("wide", 2**20):
        torch.nn.Linear(2**20, 2**20)
