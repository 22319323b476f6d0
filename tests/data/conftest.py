"""Folders and tars of tiny pictures."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from remap.data.images import decode
from remap.data.splits import Split
from remap.data.views import View, ViewSource


def png(grey: int, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, grey).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Write files below a folder: a number is a PNG of that grey, None an empty folder, bytes are bytes."""

    def write(files: Mapping[str, int | bytes | None], name: str = "images") -> Path:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        for path, content in files.items():
            target = root / path
            if content is None:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(png(content) if isinstance(content, int) else content)
        return root

    return write


@pytest.fixture
def tar(tmp_path: Path) -> Callable[..., Path]:
    """Write a tar with these member names, in this order."""

    def write(files: Mapping[str, int | bytes], name: str = "images.tar", mode: str = "w") -> Path:
        with tarfile.open(tmp_path / name, mode) as archive:
            for path, content in files.items():
                data = png(content) if isinstance(content, int) else content
                member = tarfile.TarInfo(path)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return tmp_path / name

    return write


@pytest.fixture
def seen() -> Callable[..., list[tuple[int, str]]]:
    """Show the images of splits as (grey, class name), in order of the greys."""

    def show(classes: tuple[str, ...], *splits: Split) -> list[tuple[int, str]]:
        return sorted(
            (decode(split.read(i)).getpixel((0, 0))[0], classes[split.labels[i]])
            for split in splits
            for i in range(len(split))
        )

    return show


@pytest.fixture
def noise() -> Callable[..., ViewSource]:
    """A source of random pictures (8 x 8, in colour), three classes; ``bad`` ones are no images."""

    def make(count: int, *, bad: tuple[int, ...] = (), memory: float = 1e9, size: int = 8, seed: int = 0) -> ViewSource:
        pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)

        def read(index: int) -> bytes:
            buffer = io.BytesIO()
            Image.fromarray(pixels[index]).save(buffer, format="PNG")
            return b"no image" if index in bad else buffer.getvalue()

        split = Split(tuple(f"n{i}" for i in range(count)), np.arange(count) % 3, read)
        return ViewSource(split, View(size, 1.0, "bicubic"), memory_bytes=memory, workers=2)

    return make
