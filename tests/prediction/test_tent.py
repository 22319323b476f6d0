"""A student that adapts while it predicts: norms only, by the entropy of its answers, and back as it was afterwards."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import remap
from remap.errors import RecipeError, RunError
from remap.network import Runner, tuned
from remap.pipeline.student_api import load_student
from remap.prediction.inputs import Inputs
from remap.prediction.predict import predict_to_file
from remap.prediction.predictions import Wanted
from remap.prediction.tent import adapting
from remap.progress import Silent
from remap.recipe.schema import ModelSpec
from remap.runs.task import open_backbone

MakeTask = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(9):
        pixels = draws.integers(0, 256, (18, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index:02d}.png")
    return tmp_path / "photos"


def test_rows_are_those_of_a_model_whose_norms_took_a_step_after_each_batch(make_task: MakeTask, photos: Path) -> None:
    """Expected: Adam's first step by hand on a copy in float64, which is RATE times the sign of the gradient."""
    run = make_task("one", "lora", tuple("abcd"))
    files = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.rglob("*") if path.is_file()}
    rows = list(remap.predict(run, photos, probabilities=True, batch_size=4, adapt="tent", device="cpu"))
    student = load_student(run, "cpu")
    model = copy.deepcopy(student.model).double()
    pixels = Runner(student.network).preprocess(
        torch.from_numpy(np.stack([student.pixels(path) for path in sorted(photos.iterdir())]))
    )
    first, second = pixels[:4].double(), pixels[4:8].double()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    trained = [parameter for norm in norms for parameter in norm.parameters()]
    answers = model.requires_grad_(True)(first).softmax(dim=-1)
    gradients = torch.autograd.grad(-(answers * answers.log()).sum(dim=1).mean(), trained)
    found = torch.tensor([row.probabilities for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found[:4], answers.detach(), rtol=1e-4, atol=1e-5)
    before = model(second).softmax(dim=-1)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter -= 1e-3 * gradient / (gradient.abs() + 1e-8)
        expected = model(second).softmax(dim=-1)
    torch.testing.assert_close(found[4:8], expected, rtol=1e-5, atol=5e-6)
    assert (expected - before).abs().max() > 3e-4
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == files


def test_norms_alone_change_and_come_back(make_task: MakeTask) -> None:
    student = load_student(make_task("one", "lora", tuple("abcd")), "cpu")
    model, state = student.model, {name: t.clone() for name, t in student.model.state_dict().items()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    images = torch.randint(0, 256, (4, *student.view.shape), dtype=torch.uint8)
    runner = Runner(student.network)
    with pytest.raises(KeyError), adapting(student.network, runner) as tent:
        tent(images)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
        assert changed and all("norm" in name for name in changed)
        assert {name for name, p in model.named_parameters() if p.requires_grad} >= changed
        raise KeyError
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert required == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_an_image_that_is_left_over_is_normalised_by_the_running_statistics(model_folder: Callable[..., str]) -> None:
    """The last maps of 32 pixels have one pixel: over one image alone there is no variance."""
    network = tuned(open_backbone(ModelSpec(model=model_folder("resnet10t", {}, 32)), 3), "full", {})
    network.model.eval()
    images, runner = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), Runner(network)
    with adapting(network, runner) as tent:
        of_batch = tent(images[:4]).logits_BC.detach()
        still = copy.deepcopy(network.model).eval()
        expected = still(runner.preprocess(images[4:])).detach()
        torch.testing.assert_close(tent(images[4:]).logits_BC.detach(), expected)
    assert not torch.allclose(of_batch, runner(images[:4]).logits_BC, atol=1e-3), "a batch normalises by itself"


def test_what_cannot_adapt_is_refused(make_task: MakeTask, photos: Path, tmp_path: Path) -> None:
    runs = {name: make_task(name, "lora", tuple("abcd")) for name in ("one", "two")}
    with pytest.raises(RecipeError, match="'tint' is not a way to adapt"):
        list(remap.predict(runs["one"], photos, adapt="tint"))
    with pytest.raises(RunError, match="several tasks"):
        list(remap.predict(runs, photos, adapt="tent", device="cpu"))
    (tmp_path / "rows.csv.parts").mkdir()
    with pytest.raises(RunError, match="nor continued"):
        predict_to_file(runs["one"], Inputs([str(photos)]), tmp_path / "rows.csv", Wanted(adapt="tent"), Silent())
