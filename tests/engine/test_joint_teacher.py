"""A teacher that is trained along with the student, by adapters that share their cores (SLAD)."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from remap.distributed import launch
from remap.engine.joint_teacher import JointTeacher
from remap.engine.statistics import estimate_statistics
from remap.errors import RecipeError
from remap.network import Network, Runner
from remap.pipeline import weak_teachers
from remap.pipeline.components import RunComponents, build_components
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.pipeline.run import resume, start
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import make_teacher
from remap.progress import Silent
from remap.remapping.labels import Labels
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task, open_backbone

RANK = 2
SETTINGS = ("teacher.joint=true", "teacher.allow_weak=true", f"method.rank={RANK}")


def recipe_of(tiny: Any, *settings: str, **words: object) -> Any:
    return tiny.recipe(*SETTINGS, *settings, **{"method": "slad", "losses": "ce,kd", **words})


def built(tiny: Any, folder: Path) -> tuple[RunComponents, Network, Network]:
    recipe = recipe_of(tiny)
    parts = build_components(recipe, RunDir.create(folder, recipe), Silent(), SharedResources())
    return parts, parts.student, parts.teachers[0].network


def core_path(block: int) -> str:
    return f"blocks.{block}.attn.qkv.remap_slad.core"


def test_blocks_share_cores_and_nothing_else(tiny: Any, tmp_path: Path) -> None:
    """Two blocks and three, by ceil((m + 1) * 3 / 2): the teacher's first one is alone."""
    _, student, teacher = built(tiny, tmp_path / "run")
    for block, partner in ((1, 0), (2, 1)):
        assert teacher.model.get_parameter(core_path(block)) is student.model.get_parameter(core_path(partner))
    ours = {id(p) for p in student.model.parameters()}
    shared = {name for name, p in teacher.model.named_parameters() if id(p) in ours}
    assert shared == {core_path(1), core_path(2)}
    trains = {name for name, p in teacher.model.named_parameters() if p.requires_grad}
    assert trains == set(teacher.trained) and {"head.weight", "head.bias"} < trains
    assert not teacher.model.training


def test_statistics_of_its_features_are_taken_on_its_device_without_a_graph(tiny: Any, tmp_path: Path) -> None:
    """Images are decoded on the CPU; "meta" stands for a GPU, where each operation refuses those of another device."""
    recipe = recipe_of(tiny, losses=["ce", "kd", {"name": "feature", "normalize": "standard"}])
    parts = build_components(recipe, RunDir.create(tmp_path / "run", recipe), Silent(), SharedResources())
    joint, seen = make_teacher(parts, 0), list[tuple[str, bool]]()
    usual, joint.device = joint.runner, torch.device("meta")

    def runner(images_BCHW: Tensor) -> Any:
        signals = usual(torch.zeros(images_BCHW.shape, dtype=torch.uint8))
        seen.append((images_BCHW.device.type, signals.logits_BC.requires_grad))
        return signals

    joint.runner = runner
    source = parts.training_source
    job: Any = SimpleNamespace(recipe=recipe, accelerator=launch.accelerator(), source=source, teachers=[joint])
    job.objective, job.progress, job.expected_N = parts.objective, Silent(), None
    estimate_statistics(job)
    assert set(seen) == {("meta", False)}


def test_the_shared_core_gets_the_gradients_of_both(tiny: Any, tmp_path: Path) -> None:
    """Source: autograd in float64 through the plain backbones with W + B M A written into their weights."""
    parts, student, teacher = built(tiny, tmp_path / "run")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in (*student.trained.values(), *teacher.trained.values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    images, labels = torch.randint(0, 255, (6, 3, 16, 16), generator=generator, dtype=torch.uint8), torch.arange(6) % 3
    joint = make_teacher(parts, 0)
    assert isinstance(joint, JointTeacher)
    items = joint.targets(images, np.arange(6), 0)
    assert not any(value.requires_grad for value in items.values()), "the student's losses reach the student alone"
    joint.learn(Labels(labels), 1.0)
    student.model.eval()
    parts.objective(Runner(student)(images), [items], Labels(labels))[0].backward()

    cores = [student.model.get_parameter(core_path(block)).detach().double().requires_grad_() for block in range(2)]
    pixels = (images.double() / 255 - 0.5) / 0.5
    alone = teacher.model.get_parameter(core_path(0)).detach().double()
    theirs = written(open_backbone(parts.recipe.teacher, 3).model, teacher, [alone, *cores], pixels)
    ours = written(open_backbone(parts.recipe.student, 3).model, student, cores, pixels)
    soft = (F.log_softmax(ours / 4, 1), F.log_softmax(theirs.detach() / 4, 1))
    kd = 16 * F.kl_div(*soft, reduction="batchmean", log_target=True)
    weights = parts.objective.weights
    loss = F.cross_entropy(theirs, labels) + weights["ce"] * F.cross_entropy(ours, labels) + weights["kd"] * kd
    of_teacher = torch.autograd.grad(F.cross_entropy(theirs, labels), cores, retain_graph=True)
    for block, expected in enumerate(torch.autograd.grad(loss, cores)):
        found = student.model.get_parameter(core_path(block)).grad
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
        assert of_teacher[block].abs().max() > 1e-4 and (expected - of_teacher[block]).abs().max() > 1e-4


def written(model: nn.Module, tuned: Network, cores: list[Tensor], pixels: Tensor) -> Tensor:
    """Logits of a plain backbone in float64 with the changes of queries and values in its weights."""
    model = model.double().eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights |= {name: p.detach().double() for name, p in tuned.head.items()}
    for block, core in enumerate(cores):
        layer = f"blocks.{block}.attn.qkv"
        down, up = (tuned.model.get_parameter(f"{layer}.remap_slad.{n}").detach().double() for n in ("down", "up"))
        q, v = (up[i] @ core[i] @ down[i * RANK : (i + 1) * RANK] for i in range(2))
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + torch.cat([q, torch.zeros_like(q), v])
    return functional_call(model, weights, (pixels,))


def test_both_learn_and_what_is_frozen_stays(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Network, dict[str, Tensor]]] = []

    def note(teacher: PreparedTeacher, *_rest: Any) -> None:
        seen.append((teacher.network, copy.deepcopy(teacher.network.model.state_dict())))

    monkeypatch.setattr(weak_teachers, "require_useful", note)
    result = start(recipe_of(tiny), tmp_path / "run")
    (teacher, before), after = seen[0], seen[0][0].model.state_dict()
    trained = set(teacher.trained)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in trained)
    assert not [name for name in trained if torch.equal(after[name], before[name])]
    plain = open_backbone(result_spec(tiny), 3).model.state_dict()
    off = teacher.attached.detach().state_dict()
    assert all(torch.equal(off[name], tensor) for name, tensor in plain.items() if not name.startswith("head"))
    assert result.summary["teacher"]["outputs"] == "each step" and 0 <= result.summary["teacher"]["accuracy"] <= 1
    again, _ = load_task(tmp_path / "run")
    again.model.eval()
    images = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        ours, theirs = (Runner(one)(images).logits_BC for one in (result.student, again))
    assert torch.equal(ours, theirs), "a student's file holds the cores too"


def result_spec(tiny: Any) -> Any:
    return recipe_of(tiny).teacher


def test_an_interrupted_run_ends_with_the_same_bits(
    tiny: Any, tmp_path: Path, largest_difference: Callable[..., float], watch: Callable[..., Any]
) -> None:
    """Source: the run that was not interrupted. The teacher's adapters and head are in the checkpoint."""

    def crash(done: int) -> None:
        if done == 5:
            raise RuntimeError("power cut")

    recipe = recipe_of(tiny, "train.checkpoint_seconds=0", "data.augment=shift")
    complete = start(recipe, tmp_path / "complete")
    with pytest.raises(RuntimeError, match="power cut"):
        start(recipe, tmp_path / "broken", watch(crash))
    again = resume(tmp_path / "broken")
    assert largest_difference(complete.student.trained, again.student.trained) == 0.0
    assert again.summary["teacher"]["accuracy"] == complete.summary["teacher"]["accuracy"]


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ((), {"method": "lora"}, "only the adapters of slad"),
        ((), {"losses": "ce,feature"}, "it needs a classifier"),
        ((), {"teacher": "ema"}, "is made of the student"),
        (("teacher.cache=memory",), {}, "a joint teacher learns in every step"),
        (("train.parallel=fsdp2",), {}, "shared cores cannot be sharded"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Any, settings: tuple, words: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tiny, *settings, **words)
