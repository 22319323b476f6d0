"""Data sets of torchvision: files in their published formats, compared with what torchvision reads."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from remap.data.images import decode
from remap.data.sources import open_data
from remap.data.torchvision_sets import SETS
from remap.errors import DataError


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Fashion-MNIST in the idx format (LeCun: magic, sizes, then bytes), 20 and 10 images."""
    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for split, count in (("train", 20), ("t10k", 10)):
        pixels = draws.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return tmp_path


def test_arrays_are_the_images_that_torchvision_gives(fashion: Path) -> None:
    data = open_data(f"torchvision:FashionMNIST,root={fashion}", None, 0.2)
    for split, train in ((data.train, True), (data.val, False)):
        theirs = datasets.FashionMNIST(fashion, train=train)
        expected = {(image.tobytes(), theirs.classes[label]) for image, label in theirs}
        ours = {
            (decode(split.read(i)).convert("L").tobytes(), data.classes[split.labels[i]]) for i in range(len(split))
        }
        assert ours == expected and len(split) == len(theirs)
    assert (
        len(data.classes) == 10
        and len(open_data(f"torchvision:FashionMNIST,root={fashion},split=train", None, 0.5).val) == 10
    )


def test_files_are_read_as_those_of_a_folder(tmp_path: Path) -> None:
    """EuroSAT: class folders. The bytes are the file's own, and a broken one is an unreadable image, not an error."""
    for name in ("Forest", "River"):
        (tmp_path / "eurosat/2750" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / f"eurosat/2750/{name}/{name}_{i}.jpg")
    (tmp_path / "eurosat/2750/River/River_0.jpg").write_bytes(b"text")
    data = open_data(f"torchvision:EuroSAT,root={tmp_path}", None, 0.25)
    theirs = datasets.EuroSAT(str(tmp_path), loader=lambda path: Path(path).read_bytes())
    both = data.train.joined(data.val)
    ours = [(both.read(i), data.classes[both.labels[i]]) for i in range(len(both))]
    assert sorted(ours) == sorted((content, theirs.classes[label]) for content, label in theirs)
    assert sorted(both.names)[0] == "eurosat/2750/Forest/Forest_0.jpg"


def test_no_set_that_is_offered_is_known_to_unpickle() -> None:
    """Read from torchvision's own source: the word stands in none of the modules of these classes."""
    import inspect

    assert "pickle" in inspect.getsource(inspect.getmodule(datasets.CIFAR10))
    assert [name for name in SETS if "pickle" in inspect.getsource(inspect.getmodule(getattr(datasets, name)))] == []


def test_what_is_refused(tmp_path: Path, fashion: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps({}))
    for word, expected in (
        (f"CIFAR10,root={tmp_path}", "its files are pickles"),
        (f"FashonMNIST,root={tmp_path}", "did you mean 'FashionMNIST'"),
        ("FashionMNIST", "needs a folder"),
        (f"FashionMNIST,root={fashion},split=val", "no such split\n  given:   val\n  allowed: train, test"),
        (f"MNIST,root={tmp_path}", "cannot open MNIST of torchvision: Dataset not found.*\n.*\n.*download=True"),
        (f"FashionMNIST,root={fashion},download=yes", "has no option 'download'"),
    ):
        with pytest.raises(DataError, match=expected):
            open_data(f"torchvision:{word}", None, 0.2)
