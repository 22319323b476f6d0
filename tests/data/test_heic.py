"""Photographs of telephones: read with pillow-heif, named without it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from remap.data import image_files
from remap.data.image_files import why_left_out
from remap.data.images import HEIC, decode
from remap.data.sources import open_data
from remap.errors import DataError


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "a/x.heif", "b.Heic"])
def test_without_pillow_heif_they_are_left_out_and_it_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "HEIC", False)
    reason = why_left_out(name)
    assert reason is not None and reason.endswith("files need pillow-heif: pip install 'pillow-heif>=1.0'")
    monkeypatch.setattr(image_files, "HEIC", True)
    assert why_left_out(name) is None


def test_a_class_of_them_is_refused_by_kind(tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "HEIC", False)
    files = {f"ant/IMG_{i}.HEIC": b"" for i in range(12)} | {
        f"{c}/{i}.png": i for c in ("bee", "cat") for i in range(2)
    }
    with pytest.raises(DataError, match=r"given:   ant \(12 \(.HEIC files need pillow-heif"):
        open_data(str(tree(files)), None, 0.2)


@pytest.mark.skipif(not HEIC, reason="pillow-heif, the extra heic, is not installed")
def test_with_pillow_heif_they_are_read(tmp_path: Path) -> None:
    """A grey of 100, which the lossy encoder keeps within 2 of 255."""
    import pillow_heif

    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (100, 100, 100))).save(tmp_path / "x.heic")
    found = decode(tmp_path / "x.heic")
    assert (found.mode, found.size) == ("RGB", (64, 48)) and np.abs(np.asarray(found).astype(int) - 100).max() <= 2
