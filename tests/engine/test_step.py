"""One training step: accumulation, schedule, parameter groups, clipping, and the stop before a bad step."""

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remap.distributed.launch import accelerator
from remap.engine import loop
from remap.engine.job import Job, StudentStep
from remap.engine.optim import learning_rate, make_optimizer
from remap.engine.step import forward_backward
from remap.engine.training import Training
from remap.errors import TrainingError
from remap.pipeline.components import RunComponents, build_components
from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe.schema import TrainSpec
from remap.runs.run_dir import RunDir


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[..., Job]:
    """A job on freshly built parts, without a teacher behind it unless the recipe's losses read one."""

    def make(recipe: Any) -> Job:
        parts: RunComponents = build_components(
            recipe, RunDir.create(tmp_path / "run", recipe), Silent(), SharedResources()
        )
        return Job(
            recipe=recipe,
            student=parts.student,
            objective=parts.objective,
            teachers=[],
            source=parts.views.train,
            accelerator=accelerator(),
            bf16=False,
            progress=Silent(),
            evaluate=lambda: {},
            on_epoch=lambda step, history: None,
        )

    return make


# Not bitfit and full: a key bias has no gradient but rounding, which AdamW scales up to whole steps.
@pytest.mark.parametrize("method", ["vpt_deep", "adaptformer", "linear"])
@pytest.mark.parametrize("micro", [4, 8])
def test_accumulation_gives_the_step_of_the_whole_batch(
    tiny: Any, tmp_path: Path, largest_difference: Callable[..., float], method: str, micro: int
) -> None:
    """Means over equal parts average to the mean over the whole; dropout is keyed by image, so it agrees too."""
    whole = start(tiny.recipe(method=method), tmp_path / "whole")
    parted = start(tiny.recipe(f"train.accumulation={micro}", method=method), tmp_path / "parted")
    assert largest_difference(whole.student.trained, parted.student.trained) < 1e-5
    assert largest_difference(whole.student.trained, _before(tiny, method)) > 1e-3, "nothing was trained"


def test_unequal_micro_batches_count_by_their_images(tiny: Any, job_of: Callable[..., Job]) -> None:
    """24 images in 5 micro-batches of 5, 5, 5, 5 and 4; expected: torch's own mean over all 24 at once."""
    recipe = tiny.recipe("train.batch_size=30", "train.accumulation=5", "train.epochs=1", losses="ce")
    job = job_of(recipe)
    job.student.model.eval()
    module = StudentStep(job.student, job.objective, bf16=False)
    losses = forward_backward(Training(job), update=0).losses
    found = {name: p.grad.clone() for name, p in job.parameters().items()}
    job.student.model.zero_grad()
    images, labels = _everything(job)
    loss = torch.nn.functional.cross_entropy(module.runner(images).logits_BC, labels)
    loss.backward()
    assert float(losses["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in job.parameters().items():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


@pytest.mark.parametrize("accumulation", [1, 4, 24])
def test_images_that_cannot_be_read_count_nothing(
    tiny: Any, job_of: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """Some micro-batches have fewer images then, of 24 four have none; expected: torch's own mean over the others."""
    recipe = tiny.recipe("train.batch_size=24", f"train.accumulation={accumulation}", "train.epochs=1", losses="ce")
    job, unreadable = job_of(recipe), np.asarray([0, 5, 6, 23])
    job.student.model.eval()
    read, (images, labels) = job.source.batch, _everything(job)
    monkeypatch.setattr(job.source, "batch", lambda indices: read(np.setdiff1d(indices, unreadable)))
    losses = forward_backward(Training(job), update=0).losses
    found = {name: p.grad.clone() for name, p in job.parameters().items()}
    job.student.model.zero_grad()
    others = np.setdiff1d(np.arange(24), unreadable)
    logits = StudentStep(job.student, job.objective, bf16=False).runner(images[others]).logits_BC
    loss = torch.nn.functional.cross_entropy(logits, labels[others])
    loss.backward()
    assert float(losses["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in job.parameters().items():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


@pytest.mark.parametrize("losses", ["ce,kd", "ce,rkd"])
def test_the_parts_of_a_batch_do_not_matter_to_images_that_cannot_be_read(
    tiny: Any, tmp_path: Path, largest_difference: Callable[..., float], losses: str
) -> None:
    """Six steps of 8 images, of which two cannot be read, at once and as 2, 2, 2 and 2."""
    shutil.copytree(tiny.data, tmp_path / "data")
    for name in ("blue/00.png", "red/03.png"):
        (tmp_path / "data" / "train" / name).write_bytes(b"no image")
    words = {"data": str(tmp_path / "data"), "losses": losses, "method": "vpt_deep"}
    recipes = [tiny.recipe("data.memory_gib=0", f"train.accumulation={n}", **words) for n in (1, 4)]
    whole, parted = (start(recipe, tmp_path / f"{n}") for n, recipe in enumerate(recipes))
    assert len(whole.summary["data"]["skipped"]) == 2
    assert largest_difference(whole.student.trained, parted.student.trained) < 2e-5
    for name, value in whole.summary["final_losses"].items():
        assert parted.summary["final_losses"][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("losses", ["rkd,mlkd,logit_std", "crd,feature", "queue,tokens,dist"])
def test_losses_over_a_batch_compare_all_micro_batches(
    tiny: Any, tmp_path: Path, largest_difference: Callable[..., float], losses: str
) -> None:
    """Six steps of 8 images at once are those of 2, 2, 2 and 2; projectors, which learn as well, carry it on."""
    settings = ("losses.logit_std.of=dist",) if "logit_std" in losses else ()
    recipes = [tiny.recipe(*settings, f"train.accumulation={n}", losses=f"ce,{losses}") for n in (1, 4)]
    whole, parted = (start(recipe, tmp_path / f"{n}") for n, recipe in enumerate(recipes))
    assert largest_difference(whole.student.trained, parted.student.trained) < 2e-5
    for name, value in whole.summary["final_losses"].items():
        assert parted.summary["final_losses"][name] == pytest.approx(value, rel=1e-4), name


def test_a_step_that_cannot_be_divided_is_refused(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe("train.batch_size=32", "train.accumulation=32")
    with pytest.raises(TrainingError, match="a step of 24 image"):
        start(recipe, tmp_path / "run")


@pytest.mark.parametrize("losses", ["ce", "ce,rkd"])  # in one pass, and compared over the batch
def test_a_lone_image_has_no_variance_of_a_channel(tiny: Any, tmp_path: Path, losses: str) -> None:
    """The last map of a ResNet is a thirty-second of the image; PyTorch raises a ValueError."""
    student = {"model": "resnet18", "weights": "none", "image_size": 32}
    settings = ("train.batch_size=2", "train.accumulation=2")
    recipe = tiny.recipe(*settings, student=student, method="full", losses=losses)
    with pytest.raises(TrainingError, match="no variance: one image in a pass, on a map of one pixel") as caught:
        start(recipe, tmp_path / "run")
    assert caught.value.given == "batch size 2, accumulation 2, 1 process"


@pytest.mark.parametrize(
    ("method", "accumulation", "said"), [("partial", 2, True), ("partial", 1, False), ("adapter_plus", 2, False)]
)
def test_what_is_drawn_within_a_part_of_a_batch_is_reported(
    tiny: Any, tmp_path: Path, watch: Any, method: str, accumulation: int, said: bool
) -> None:
    """The tiny student was built with dropout and drop-path, which draw for all rows; a method's own goes by image."""
    progress = watch(lambda _step: None)
    settings = ("train.epochs=1", f"train.accumulation={accumulation}")
    start(tiny.recipe(*settings, method=method, teacher=None), tmp_path / "run", progress)
    assert any("own dropout is drawn within each part" in line for line in progress.said) is said


def test_the_learning_rate_follows_the_closed_form() -> None:
    """Warm-up k/w of the peak, then min + (peak - min) * (1 + cos(pi * t)) / 2 (Loshchilov & Hutter, 1608.03983)."""
    spec = TrainSpec(epochs=5, warmup_epochs=1.5, min_lr=1e-4)
    steps, peak = 10, 2e-3
    for step in range(15):
        assert learning_rate(spec, peak, step, steps) == pytest.approx(peak * (step + 1) / 15)
    for step in range(15, 50):
        t = (step - 15) / 35
        expected = 1e-4 + (peak - 1e-4) * (1 + math.cos(math.pi * t)) / 2
        assert learning_rate(spec, peak, step, steps) == pytest.approx(expected, rel=1e-12)
    halfway = learning_rate(TrainSpec(epochs=2, warmup_epochs=0.0), 1.0, 5, 5)
    assert halfway == pytest.approx(0.5)


def test_the_schedule_counts_updates_and_not_micro_batches(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    keep = loop.set_learning_rate

    def spy(optimizer: torch.optim.Optimizer, lr: float) -> None:
        seen.append(lr)
        keep(optimizer, lr)

    monkeypatch.setattr(loop, "set_learning_rate", spy)
    recipe = tiny.recipe("train.accumulation=4", "train.warmup_epochs=1", "train.epochs=2")
    start(recipe, tmp_path / "run")
    cosine = [0.01 * (1 + math.cos(math.pi * t / 3)) / 2 for t in range(3)]
    assert seen == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, *cosine])


@pytest.mark.parametrize("method", ["full", "linear", "vpt_shallow", "vpt_deep", "adaptformer", "bitfit"])
def test_prompts_biases_and_norms_are_not_decayed(tiny: Any, job_of: Callable[..., Job], method: str) -> None:
    job = job_of(tiny.recipe(method=method, losses="ce" if method == "linear" else "ce,feature"))
    extra = [(name, p) for name, p in job.parameters().items() if name.startswith("objective.")]
    optimizer = make_optimizer(job.student, extra, 1e-3, 0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(job.parameters()) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in job.parameters().items():
        matrix = name.endswith("weight") and parameter.ndim >= 2
        assert decay[id(parameter)] == (0.3 if matrix else 0.0), name
    trained = {id(p) for p in job.parameters().values()}
    assert all(p.requires_grad == (id(p) in trained) for p in job.student.model.parameters())


@pytest.mark.parametrize("method", ["linear", "vpt_deep", "adaptformer", "bitfit"])
def test_frozen_parameters_hold_nothing(tiny: Any, job_of: Callable[..., Job], method: str) -> None:
    job = job_of(tiny.recipe(method=method, losses="ce"))
    before = copy.deepcopy(job.student.model.state_dict())
    loop.train(job)
    trained = set(job.student.trained)
    for name, parameter in job.student.model.named_parameters():
        assert parameter.requires_grad == (name in trained), name
        if name not in trained:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("limit", [None, 0.01])
def test_the_gradient_is_clipped_to_the_limit(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    """Expected: the Euclidean norm over all trained parameters, summed here by hand."""
    norms: list[float] = []
    keep = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))
        return keep(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    start(tiny.recipe(f"train.clip_norm={'null' if limit is None else limit}"), tmp_path / "run")
    assert len(norms) == 6
    if limit is None:
        assert min(norms) > 0.05
    else:
        assert norms == pytest.approx([limit] * 6, rel=1e-3)


def _before(tiny: Any, method: str) -> dict[str, Tensor]:
    student = build_components(tiny.recipe(method=method, losses="ce"), None, Silent(), SharedResources()).student
    return student.trained


def _everything(job: Job) -> tuple[Tensor, Tensor]:
    images, good = job.source.batch(range(len(job.source.split)))
    return images, torch.from_numpy(job.source.split.labels[good])
