"""Coverage-guided fuzzing of everything that reads files from others; runs for hours, not on every commit.

    pip install atheris
    python tools/fuzz_loaders.py yaml -max_total_time=600

Arguments after the target go to libFuzzer. A traceback other than of a RemapError is a finding, which libFuzzer saves
as ``crash-*``; pass that file as an argument to reproduce it.

Targets: yaml (recipes), json, task (task.json), safetensors, tar, image, checkpoint. Each starts from a good file.
"""

import gzip
import io
import json
import lzma
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["remap", "yaml", "tarfile", "json"]):
    import tarfile

    import torch
    from PIL import Image
    from safetensors.torch import save

    from remap.data.images import SUFFIXES, decode
    from remap.data.tar_listing import list_tar
    from remap.engine.checkpoint import load_checkpoint, save_checkpoint, snapshot
    from remap.engine.state import State
    from remap.errors import RemapError
    from remap.io.checked_json import parse_json
    from remap.io.tensor_files import read_safetensors
    from remap.recipe import catalogue, strict_yaml, validate
    from remap.runs.task_file import read_meta

PLACE = Path(tempfile.mkdtemp(prefix="remap-fuzz-"))


def _yaml(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    value = strict_yaml.parse(text, "fuzz")
    if isinstance(value, dict):
        validate(value, "fuzz", check_options=False)


def _json(data: bytes) -> None:
    try:
        parse_json(data)
    except ValueError as error:
        raise RemapError(str(error)) from error


def _written(name: str, data: bytes) -> Path:
    path = PLACE / name
    path.write_bytes(data)
    return path


def _task(data: bytes) -> None:
    read_meta(_written("task.json", data).parent)


def _safetensors(data: bytes) -> None:
    read_safetensors(_written("x.safetensors", data))


def _tar(data: bytes) -> None:
    listing = list_tar(_written("x.tar", data))
    for path in [path for path in listing.paths if path.lower().endswith(SUFFIXES)][:4]:  # of others nothing is held
        try:
            listing.read(path)
        except OSError:  # a member that is too large counts as an unreadable image
            continue


def _image(data: bytes) -> None:
    decode(data)


def _checkpoint(data: bytes) -> None:
    """The first byte chooses the file of a good checkpoint that the rest takes the place of."""
    folder = PLACE / "checkpoint"
    for path, content in GOOD_CHECKPOINT.items():
        path.write_bytes(content)
    if data:
        (sorted(GOOD_CHECKPOINT)[data[0] % len(GOOD_CHECKPOINT)]).write_bytes(data[1:])
    weight = torch.nn.Parameter(torch.zeros(2))
    load_checkpoint(folder, "digest", {"weight": weight}, torch.optim.AdamW([weight]), lambda text: None)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "yaml": _yaml,
    "json": _json,
    "task": _task,
    "safetensors": _safetensors,
    "tar": _tar,
    "image": _image,
    "checkpoint": _checkpoint,
}


# Contents of a good checkpoint's files by path; filled where it is the target.
GOOD_CHECKPOINT: dict[Path, bytes] = {}


def _make_checkpoint() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    save_checkpoint(PLACE / "checkpoint", State("digest"), snapshot({"weight": weight}, torch.optim.AdamW([weight])))
    found = (path for path in (PLACE / "checkpoint").rglob("*") if path.is_file())
    GOOD_CHECKPOINT.update({path: path.read_bytes() for path in found})


def _seeds(name: str) -> Path:
    """A folder with good files to start from."""
    picture, archive = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (5, 4), 7).save(picture, format="PNG")
    with tarfile.open(fileobj=archive, mode="w") as file:
        info = tarfile.TarInfo("a/1.png")
        info.size = len(picture.getvalue())
        file.addfile(info, io.BytesIO(picture.getvalue()))
    view = {"size": 16, "crop_pct": 1.0, "interpolation": "bicubic"}
    backbone = {"model": "vit_tiny_patch16_224", "weights": "none", "sha256": "0" * 64, "preset": "none"}
    task = {
        "format": 1, "backbone": backbone, "method": {"name": "lora", "rank": 2}, "classes": ["a", "b"], "view": view,
        "preprocess": {**view, "mean": [0.5] * 3, "std": [0.5] * 3}, "holds_backbone": True, "sha256": "0" * 64,
    }  # fmt: skip
    seeds = {
        "yaml": [path.read_bytes() for path in sorted(catalogue.folder().rglob("*.yaml"))[:4]],
        "json": [json.dumps(task).encode()],
        "task": [json.dumps(task).encode()],
        "safetensors": [save({"a": torch.ones(2, 3)}, metadata={"k": "v"})],
        "tar": [archive.getvalue()[:2048], gzip.compress(archive.getvalue()), lzma.compress(archive.getvalue())],
        "image": [picture.getvalue(), *(_encoded(kind) for kind in ("JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM"))],
        "checkpoint": [bytes([i]) + data for i, data in enumerate(GOOD_CHECKPOINT[p] for p in sorted(GOOD_CHECKPOINT))],
    }
    folder = PLACE / "seeds"
    folder.mkdir()
    for number, data in enumerate(seeds[name]):
        (folder / str(number)).write_bytes(data)
    return folder


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), 7).save(buffer, format=kind)
    return buffer.getvalue()


def main() -> None:
    names = [word for word in sys.argv[1:] if word in TARGETS]
    if len(names) != 1:
        sys.exit(f"name one of {', '.join(TARGETS)}; given: {json.dumps(sys.argv[1:])}")
    target = TARGETS[names[0]]
    if names[0] == "checkpoint":
        _make_checkpoint()

    def one(data: bytes) -> None:
        try:
            target(data)
        except RemapError:
            return

    try:
        words = [word for word in sys.argv if word not in TARGETS]
        atheris.Setup(
            [*words, *([] if any(Path(word).is_file() for word in words[1:]) else [str(_seeds(names[0]))])], one
        )
        atheris.Fuzz()
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


if __name__ == "__main__":
    main()
