"""Whole runs with models of other channels and shapes: the data follow the model, or one sentence says why not."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from remap.errors import BackboneError
from remap.network import Runner
from remap.pipeline.evaluate_run import evaluate_run
from remap.pipeline.run import start
from remap.pipeline.student_api import load_student
from remap.progress import Silent
from remap.runs.task import load_task


def model(folder: Path, channels: int = 3, size: tuple[int, int] = (16, 16), **config: Any) -> str:
    """A plain vision transformer of other channels; ``mean`` and ``std`` as given."""
    shape = {"img_size": size, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": channels}
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", num_classes=3, **shape)
    made.pretrained_cfg.update(
        {"input_size": (channels, *size), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0} | config
    )
    save_for_hf(made, str(folder), model_args=shape, safe_serialization=True)
    written = json.loads((folder / "config.json").read_text())
    written["pretrained_cfg"] |= config  # timm makes one of a mean that does not fit
    (folder / "config.json").write_text(json.dumps(written))
    return f"local-dir:{folder}"


def arrays(folder: Path, channels: int, dtype: Any = np.uint16) -> str:
    """One channel of each class is raised. Reflectance, 0 to 10,000."""
    draws = np.random.default_rng(0)
    for split, each in (("train", 8), ("val", 3)):
        for label, name in enumerate(("a", "b", "c")):
            (folder / split / name).mkdir(parents=True)
            for index in range(each):
                values = draws.integers(0, 5000, (12, 14, channels))
                values[:, :, label % channels] += 5000
                np.save(folder / split / name / f"{index}.npy", values.astype(dtype))
    return str(folder)


def logits_again(run: Path, student: Any, shape: tuple[int, ...]) -> bool:
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    network, _ = load_task(run)
    ours, theirs = (Runner(one)(images).logits_BC for one in (_in_eval(network), _in_eval(student)))
    return torch.equal(ours, theirs)


def _in_eval(network: Any) -> Any:
    network.model.eval()
    return network


@pytest.mark.parametrize(
    ("teacher", "student", "seen"),
    [(1, 3, 3), (3, 1, 3), (1, 1, 1)],
)
def test_greys_and_colours_teach_each_other(tiny: Any, tmp_path: Path, teacher: int, student: int, seen: int) -> None:
    words = {"teacher": model(tmp_path / "t", teacher), "student": model(tmp_path / "s", student)}
    recipe = tiny.recipe("train.epochs=1", "teacher.allow_weak=true", method="lora", losses="ce,kd", **words)
    result = start(recipe, tmp_path / "run")
    assert load_task(result.run_dir)[1].shape == (seen, 16, 16)
    assert logits_again(result.run_dir, result.student, (seen, 16, 16))
    assert len(load_student(result.run_dir).predict([Image.new("L", (5, 5))])) == 1


@pytest.mark.parametrize("method", ["vp", "vpt_deep"])
def test_a_model_of_four_channels_learns_from_arrays(tiny: Any, tmp_path: Path, method: str) -> None:
    """The range of the training images is in the task and the summary, and evaluation uses it again."""
    words = {"data": arrays(tmp_path / "data", 4), "student": model(tmp_path / "s", 4), "teacher": None}
    settings = ("data.augment=light", "data.flip=0.5", "data.cutmix=1.0", "train.epochs=1")
    result = start(tiny.recipe(*settings, method=method, losses="ce", **words), tmp_path / "run")
    low, high = result.summary["data"]["value_range"]
    assert 0 <= low < 50 and 9950 < high < 10_000
    view = load_task(result.run_dir)[1]
    assert view.shape == (4, 16, 16) and view.pixels.value_range == (low, high)
    assert evaluate_run(result.run_dir, None, False, Silent())["correct"] == result.summary["student"]["correct"]
    buffer = io.BytesIO()
    np.save(buffer, np.full((3, 3, 4), high, np.uint16))
    assert (load_student(result.run_dir).pixels(buffer.getvalue()) == 255).all()


def test_an_oblong_student_sees_oblong_views(tiny: Any, tmp_path: Path) -> None:
    """24 x 8 beside a square teacher of 16: a view of 48 x 16 is as large as both and has the student's shape."""
    recipe = tiny.recipe(
        "data.augment=shift", "data.views=2", "train.epochs=1", "teacher.allow_weak=true", losses="ce,kd,tokens",
        student=model(tmp_path / "s", size=(24, 8)), method="lora",
    )  # fmt: skip
    result = start(recipe, tmp_path / "run")
    assert load_task(result.run_dir)[1].shape == (3, 48, 16)
    assert logits_again(result.run_dir, result.student, (3, 48, 16))


@pytest.mark.parametrize(
    ("teacher", "student", "mean", "message"),
    [
        (3, 4, (0.5,), "takes images of 3 channels, other networks of this run 4"),
        (3, 13, (0.1, 0.2, 0.3), "the model takes 13 channels, and its 'mean' is that of 3"),
    ],
)
def test_channels_that_do_not_fit_are_refused(
    tiny: Any, tmp_path: Path, teacher: int, student: int, mean: tuple[float, ...], message: str
) -> None:
    words = {"teacher": model(tmp_path / "t", teacher), "student": model(tmp_path / "s", student, mean=mean)}
    with pytest.raises(BackboneError, match=message):
        start(tiny.recipe(data=arrays(tmp_path / "data", student), **words), tmp_path / "run")
