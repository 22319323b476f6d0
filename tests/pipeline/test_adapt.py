"""Adapting to another domain: beside labelled images, and from a finished run."""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_images
from torch.nn.modules.batchnorm import _BatchNorm

from remap.data.sources import open_unlabeled
from remap.data.views import View, ViewSource
from remap.errors import DataError, Interrupted, RecipeError, RemapError, RunError
from remap.network import Runner, tuned
from remap.pipeline.adapt import adapt
from remap.pipeline.repeat import repeat
from remap.pipeline.run import resume, start
from remap.pipeline.source_free import by_statistics, pseudo_labels
from remap.progress import Silent
from remap.recipe.schema import ModelSpec
from remap.runs.task import load_task, open_backbone


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other images of the same colours, in folders that mean nothing."""
    folder = tmp_path_factory.mktemp("camera")
    draw_images(folder, 4, seed=7)
    return folder


@pytest.fixture(scope="module")
def source_run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {"method": "lora", "teacher": None}
    return start(tiny.recipe("train.epochs=1", **words), tmp_path_factory.mktemp("source") / "run").run_dir


def files_of(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_files_that_are_left_out_are_listed(source_run: Path, camera: Path, tmp_path: Path, watch: Any) -> None:
    """As in a run: those that cannot be read, and those of other kinds, with the reason."""
    target, progress = tmp_path / "target", watch(lambda step: None)
    shutil.copytree(camera, target)
    (target / "bad.png").write_bytes(b"no image")
    (target / "notes.txt").write_text("of the day")
    found = adapt(source_run, str(target), epochs=1, output=tmp_path / "run", progress=progress)
    skipped = {name: reason for name, reason in found["data"]["skipped"]}
    assert skipped == {"target/notes.txt": ".txt files are not read", "target/bad.png": "not an image"}
    assert any(".txt files are not read" in line for line in progress.said)


def test_losses_between_domains_train_with_and_without_a_teacher(tiny: Any, camera: Path, tmp_path: Path) -> None:
    words = {"method": "lora", "target": str(camera), "losses": "ce,kd,coral,mmd,infomax,mean_teacher"}
    settings = ("train.epochs=1", "data.augment=light", "losses.mean_teacher.threshold=0")
    both = start(tiny.recipe(*settings, **words), tmp_path / "both").summary
    assert both["teacher"]["model"].startswith("local-dir:") and both["more_teachers"][0]["model"].startswith("ema")
    assert all(np.isfinite(value) for value in both["final_losses"].values())
    assert all(both["final_losses"][name] > 0 for name in ("kd", "coral", "mmd", "mean_teacher"))
    assert (both["data"]["train_images"], both["data"]["labeled_images"]) == (36, 24)
    default = tiny.recipe("train.epochs=1", **{**words, "losses": None, "teacher": None})
    assert [loss.name for loss in default.losses] == ["ce", "infomax"] and default.data.augment == "none"
    # Where the average teaches, the student sees what it sees augmented.
    recipe = tiny.recipe("train.epochs=1", **{**words, "losses": "ce,mean_teacher", "teacher": None})
    assert recipe.data.augment == "strong"
    assert not recipe.named_teachers and [spec.model for spec in recipe.teachers] == ["ema"]


def test_a_run_with_a_mean_teacher_resumes_to_the_same_bits(
    tiny: Any, camera: Path, tmp_path: Path, watch: Any, largest_difference: Any
) -> None:
    settings = ("losses.mean_teacher.threshold=0", "data.augment=light")
    recipe = tiny.recipe(*settings, method="lora", target=str(camera), teacher=None, losses="ce,mean_teacher")
    straight = start(recipe, tmp_path / "straight")

    def stop_at(step: int) -> None:
        if step == 5:  # in the second of two epochs
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "stopped", watch(stop_at))
    resumed = resume(tmp_path / "stopped")
    assert resumed.summary["final_losses"] == straight.summary["final_losses"]
    assert largest_difference(straight.student.trained, resumed.student.trained) == 0.0


def test_shot_trains_what_the_method_tuned_and_leaves_the_run_as_it_was(
    source_run: Path, tiny: Any, camera: Path, tmp_path: Path
) -> None:
    before = files_of(source_run)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 6, "lr": 0.01, "val_data": str(camera)}
    summary = adapt(source_run, str(camera), output=tmp_path / "new", **options)
    assert files_of(source_run) == before
    old, new = (load_task(path)[0] for path in (source_run, tmp_path / "new"))
    assert all(torch.equal(old.head[name], new.head[name]) for name in old.head)
    tuned = [name for name in old.trained if name not in old.head]
    assert tuned and any(not torch.equal(old.trained[name], new.trained[name]) for name in tuned)
    assert summary["student"]["accuracy"] is not None and summary["adapted"]["by"] == "shot"
    assert json.loads((tmp_path / "new" / "summary.json").read_text()) == summary
    again = adapt(source_run, str(camera), output=tmp_path / "again", **options)
    assert files_of(tmp_path / "again" / "task") == files_of(tmp_path / "new" / "task")
    assert again["losses"] == {"infomax": 1.0, "ce": 0.3}
    with pytest.raises(RunError, match="was adapted"):
        repeat(tmp_path / "new")


def test_pseudo_labels_are_those_of_the_nearest_centroids() -> None:
    # Source: Liang et al. 2020, Eq. 4 to 6, image by image in numpy; an answer alone would name other classes.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4)) + np.repeat(4 * np.eye(3, 4), 10, axis=0)
    p = rng.dirichlet((1.0, 1.0, 1.0, 1.0), 30)
    p[:10, 0] += 1.0
    p[10:20, 1] += 1.0
    p /= p.sum(axis=1, keepdims=True)

    def nearest(centroids: dict[int, np.ndarray]) -> list[int]:
        def cosine(row: np.ndarray, k: int) -> float:
            return float(row @ centroids[k] / np.linalg.norm(row) / np.linalg.norm(centroids[k]))

        return [max(centroids, key=lambda k: cosine(row, k)) for row in x]

    first = nearest({k: sum(p[n, k] * x[n] for n in range(30)) / sum(p[:, k]) for k in range(4)})
    members = {k: [n for n in range(30) if first[n] == k] for k in set(first)}
    second = nearest({k: x[rows].mean(axis=0) for k, rows in members.items()})
    assert pseudo_labels(torch.from_numpy(x), torch.from_numpy(p)).tolist() == second
    assert second != p.argmax(axis=1).tolist()
    never = torch.from_numpy(np.pad(p, ((0, 0), (0, 1))))  # a class of probability 0 for all images
    assert pseudo_labels(torch.from_numpy(x), never).tolist() == second


def test_statistics_are_means_over_images(camera: Path, model_folder: Callable[..., str], tmp_path: Path) -> None:
    """11 images, 5 at a time: batches of 4, 4 and 3 that are spread over all. A batch counts by its images.

    Source: the mean and unbiased variance of what enters the first batch norm, batch by batch, in numpy.
    """
    network = tuned(open_backbone(ModelSpec(model=model_folder("resnet10t", {}, 32)), 3), "full", {})
    split, _ = open_unlabeled(str(camera))
    source = ViewSource(split.take(np.arange(11)), View(32, 1.0, "bicubic"), memory_bytes=1e9, workers=1)
    norm = next(module for module in network.model.modules() if isinstance(module, _BatchNorm))
    entering: list[np.ndarray] = []
    norm.register_forward_pre_hook(lambda _, args: entering.append(args[0].detach().double().numpy()))
    assert by_statistics(network, source, 5, tmp_path, Silent())["batch_norms"] > 1
    assert [len(batch) for batch in entering] == [4, 4, 3] and not norm.training
    Runner(network)(source.batch(np.arange(0, 11, 3))[0])
    np.testing.assert_allclose(entering[3], entering[0], atol=1e-6)  # the first batch is every third image
    mean = np.concatenate(entering[:3]).mean(axis=(0, 2, 3))
    variances = [batch.var(axis=(0, 2, 3), ddof=1) for batch in entering[:3]]
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), np.average(variances, axis=0, weights=[4, 4, 3]), rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"target": "empty"}, "no images to learn from without labels"),
        ({"target": "source"}, "the run learned from these images"),
        ({"target": "train"}, "the run learned from these images"),
        ({"by": "magic"}, "not a way to adapt"),
        ({"by": "statistics"}, "no batch norm of its own"),
        ({"by": "statistics", "epochs": 3}, "takes no steps"),
        ({"by": "statistics", "seed": 0}, "draws nothing"),
        ({"seed": 2**32}, "seed: should be less than 4294967296"),  # as of a recipe
        ({"epochs": 0}, "epochs"),
        ({"val_data": "empty"}, "no images"),
    ],
)
def test_what_cannot_be_adapted_is_one_error(
    changed: dict[str, Any], says: str, source_run: Path, tiny: Any, camera: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"empty": str(tmp_path / "empty"), "source": tiny.data, "train": f"{tiny.data}/train"}
    given = {"target": str(camera), **{key: places.get(value, value) for key, value in changed.items()}}
    with pytest.raises(RemapError, match=says):
        adapt(source_run, output=tmp_path / "new", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(("method", "says"), [("linear", "nothing to adapt"), ("ease", "answers by what ease saw")])
def test_a_method_that_steps_would_not_adapt_is_refused(
    tiny: Any, camera: Path, tmp_path: Path, method: str, says: str
) -> None:
    """Of linear the classifier alone was trained; ease answers by class means, and its own classifier is zero."""
    run = start(tiny.recipe("train.epochs=1", method=method, teacher=None), tmp_path / "run").run_dir
    with pytest.raises(RunError, match=says):
        adapt(run, str(camera), output=tmp_path / "new")


@pytest.mark.parametrize(
    ("words", "settings", "says"),
    [
        ({"losses": "ce,coral", "target": None}, (), "there are no images of another domain"),
        ({"losses": "ce"}, (), "nothing would be learned from it"),
        ({}, ("data.labels=5",), "data.labels names images without labels of the same domain"),
        ({}, ("data.mixup=0.5",), "are not mixed"),
        ({"losses": "ce,mean_teacher"}, ("data.augment=none",), "needs a view besides the plain image"),
        ({"losses": "ce,coral", "method": "linear"}, (), "coral cannot teach linear"),
        ({"losses": "ce,kd,mean_teacher"}, (), "kd needs a teacher"),
    ],
)
def test_recipes_that_cannot_adapt_say_why(
    tiny: Any, camera: Path, words: dict[str, Any], settings: tuple[str, ...], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        tiny.recipe(*settings, **{"method": "lora", "target": str(camera), "teacher": None, **words})


def test_a_target_that_holds_evaluation_images_is_refused(tiny: Any, tmp_path: Path) -> None:
    for target in (tiny.data, f"{tiny.data}/val"):
        with pytest.raises(DataError, match="images without labels"):
            start(tiny.recipe(method="lora", target=target, teacher=None), tmp_path / "run")
