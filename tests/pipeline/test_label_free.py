"""Distillation without labels into a backbone: what comes out, how it is judged, and what is refused."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

from remap.errors import Interrupted, RecipeError, RunError
from remap.pipeline.build_cache import build_cache
from remap.pipeline.dry_run import estimate
from remap.pipeline.judge_features import TEMPERATURE, nearest
from remap.pipeline.repeat import repeat
from remap.pipeline.run import resume, start
from remap.pipeline.student_api import load_student
from remap.progress import Silent
from remap.recipe import Recipe, resolve_distill
from remap.runs.run_dir import RunDir
from remap_cli import run_summary

# Of the third of six updates, on the cosine of 0 to pi.
COS = math.cos(math.pi * 2 / 5)


def recipe(tiny: Any, *settings: str, **words: object) -> Recipe:
    """Two epochs on the training images, whose folders' names mean nothing; without --data."""
    words = {"student": tiny.student, "teacher": tiny.teacher, "unlabeled": f"{tiny.data}/train", **words}
    return resolve_distill(None, words, [*tiny.SETTINGS, *settings])


def test_without_labels_the_result_is_a_backbone_for_timm(tiny: Any, tmp_path: Path) -> None:
    result = start(recipe(tiny), tmp_path / "run")
    student, data = result.summary["student"], result.summary["data"]
    assert (student["accuracy"], data["classes"], data["val_images"], data["labeled_images"]) == (None, 0, 0, 0)
    assert {"feature", "tokens"} <= result.summary["final_losses"].keys()
    again = timm.create_model(f"local-dir:{student['backbone']}", pretrained=True)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, dict(result.student.model.state_dict())[name].cpu()), name
    before = load_file(Path(tiny.student.removeprefix("local-dir:")) / "model.safetensors")
    assert not torch.equal(again.state_dict()["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("method", ["lora", "vpt_deep", "partial"])
def test_any_method_learns_and_labels_judge_it(
    method: str, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = start(recipe(tiny, data=tiny.data, method=method, losses="tokens,feature"), tmp_path / "run")
    student = result.summary["student"]
    judged = student["judged"]
    assert judged["after"]["val"]["images"] == 9 and result.summary["data"]["labeled_images"] == 0
    assert student["accuracy"] == judged["after"]["val"]["linear_probe"]
    assert (student["backbone"] is None) == (method == "vpt_deep")
    assert not any("head" in name for name in result.summary["trainables"]), "there is no classifier"
    run_summary.show(dict(result.summary))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"linear probe, val {judged['before']['val']['linear_probe']:.1%} {student['accuracy']:.1%}" in shown
    assert ("timm.create_model" in shown) == (method != "vpt_deep")


def test_it_is_estimated_repeated_and_cached_as_any_run(tiny: Any, tmp_path: Path) -> None:
    assert estimate(recipe(tiny), Silent())["data"]["train_images"] == 24
    start(recipe(tiny, "teacher.cache=disk"), tmp_path / "run")
    assert repeat(tmp_path / "run")["equal"]
    (stored,) = build_cache(recipe(tiny))
    assert stored["computed"] == 0, "the run has stored these outputs"


def test_an_interrupted_run_gives_the_same_backbone(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    def stop(done: int) -> None:
        if done == 4:
            signal.raise_signal(signal.SIGTERM)

    # With all that is remembered: statistics of two teachers, a queue, scheduled numbers.
    settings = [
        "losses.tokens.normalize=phi_s",
        "losses.feature.normalize=standard",
        "losses.feature.projector=mlp",
        "losses.queue.temperature_schedule={decay: cosine, end: 0.5}",
        "losses.queue.weight_schedule={warmup_epochs: 1}",
    ]
    words = {"losses": "tokens,feature,queue", "teacher": f"{tiny.teacher},{tiny.student}"}
    complete = start(recipe(tiny, *settings, **words), tmp_path / "complete")
    with pytest.raises(Interrupted):
        start(recipe(tiny, *settings, **words), tmp_path / "run", watch(stop))
    resume(tmp_path / "run")
    first, second = (load_file(tmp_path / run / "backbone" / "model.safetensors") for run in ("complete", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (epoch, _) = RunDir(tmp_path / "run").metrics()
    assert (epoch["queue@1.weight"], epoch["queue@1.temperature"]) == pytest.approx(
        (0.5, 0.2 * (0.5 + 0.5 * 0.5 * (1 + COS)))
    )
    # A run without labels is a start for another one, as any run is.
    assert start(recipe(tiny, student=str(complete.run_dir)), tmp_path / "further").summary["student"]["backbone"]


@pytest.mark.parametrize("losses", ["ce", "kd,feature", "dkd"])
def test_losses_on_classes_are_refused_without_labels(losses: str, tiny: Any) -> None:
    with pytest.raises(RecipeError, match="labels or logits of classes, and there are no labelled images"):
        recipe(tiny, losses=losses)


def test_a_backbone_predicts_no_classes(tiny: Any, tmp_path: Path) -> None:
    start(recipe(tiny), tmp_path / "run")
    with pytest.raises(RunError, match="has no classifier: it was trained without labels"):
        load_student(tmp_path / "run")


def test_nearest_neighbours_are_those_of_scikit_learn() -> None:
    """Its brute-force search with votes exp(cosine / temperature), in float64."""
    draws = np.random.default_rng(0)
    train, labels, x = draws.normal(size=(60, 5)), draws.integers(0, 4, 60), draws.normal(size=(30, 5))
    model = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1.0 - distance) / TEMPERATURE)
    )
    assert (nearest(train, labels, x) == model.fit(train, labels).predict(x)).all()
