"""FSDP2 on two processes gives what one process gives, for every method.

One pair of processes does all runs. Networks are in float64: rounding then stays far below the tolerances, also where a
gradient is 0 by nature and AdamW makes a step of its rounding (key biases). Expected values: one process, unsharded.
"""

import json
import runpy
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from tiny_models import tiny_models

from remap.backbones.families import FAMILIES
from remap.errors import Interrupted
from remap.pipeline import epoch_recorder
from remap.pipeline.run import resume, start
from remap.recipe import resolve
from remap.recipe.schema import Recipe
from remap.runs.task import load_task
from remap.tuning import METHODS

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "workers" / "sharding.py"
TOLERANCE = 1e-6
# Three steps, an epoch each, so that the metrics have the loss of every step.
STEPS = 3
# peft computes these in float32, or refuses float64.
IN_FLOAT32 = ("fourierft", "c3a", "waveft", "psoft")
TESTED = [row.name for row in METHODS if row.name not in IN_FLOAT32 and "words" not in row.needs]
BASE = ("train.epochs=3", "train.batch_size=24", "train.warmup_epochs=0", "train.lr=0.01", "data.workers=1")
# New views in every epoch: the whole student runs in every step. Without, its frozen features are kept.
MOVING = ("data.augment=shift",)
SHARDED = "train.parallel=fsdp2"
# Options that fit models 32 wide.
SMALL = {
    "adalora": ("rank=2", "initial_rank=3"),
    "fact_tt": ("rank=4",),
    "fact_tk": ("rank=4",),
    "sidetune": ("side=test_resnet",),
    "lst": ("reduction=4",),
    "gralora": ("rank=4", "alpha=4"),
    "vera": ("rank=4",),
    "randlora": ("rank=4", "alpha=4"),
}
# Each part of a batch has statistics of its own: the same parts in one process are two micro-batches.
BATCH_STATISTICS = {"mlp", "sidetune"}
# What reads weights of a block past the block, or carries more than its output out of it.
OTHER_FAMILIES = (("vpt_shallow", "swin"), ("ssf", "eva"), ("dora", "beit"), ("gps", "resnet"), ("full", "convnext"))
WITH_SEAM = ("linear", "mlp", "partial", "sidetune", "lst", "vqt")
TASK = Path("task") / "task.safetensors"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
CONFTEST = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))


@dataclass(frozen=True)
class Case:
    """One run: as the two processes do it, and as one does."""

    name: str
    words: Mapping[str, Any]
    settings: tuple[str, ...]
    alone: tuple[str, ...] = ()
    stop: bool = False
    resume: bool = False

    def recipe(self, *settings: str) -> Recipe:
        return resolve(words=self.words, settings=[*self.settings, *self.alone, *settings])


class Pair:
    """What the two processes left behind."""

    def __init__(self, folder: Path, cases: list[Case]) -> None:
        self.folder, self.cases = folder, {case.name: case for case in cases}
        plan = [{**vars(case), "settings": [*case.settings, SHARDED]} for case in cases]
        (folder / "plan.json").write_text(json.dumps(plan))
        self.process = Forked(folder, [str(WORKER), str(folder)], 1)

    def noted(self, name: str) -> list[dict]:
        """By each process, once both have ended."""
        if not self.process.codes:
            self.process.end(300)
        return [json.loads((self.folder / f"noted-{rank}.json").read_text())[name] for rank in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def cases(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """All runs. The tiny student has dropout, whose masks are drawn process by process; this one has none."""
    folder = tmp_path_factory.mktemp("models")
    CONFTEST["write_model"](folder / "vit", seed=3, embed_dim=32, depth=3)
    for number, (family, row) in enumerate(tiny_models("runs").items()):
        CONFTEST["write_folder"](folder / family, number, str(row.make), row.options, 32)

    def case(name: str, method: str, *settings: str, model: str = "vit", **more: Any) -> Case:
        alone = more.pop("alone", ())
        flags = {flag: more.pop(flag) for flag in ("stop", "resume") if flag in more}
        words = {"data": tiny.data, "student": f"local-dir:{folder / model}", "method": method, "losses": "ce", **more}
        own = tuple(f"method.{option}" for option in SMALL.get(method, ()))
        return Case(name, words, (*BASE, *own, *settings), alone, **flags)

    found = []
    for row in map(METHODS.row, TESTED):
        model = "vit" if row.fits(FAMILIES.row("vit").parts) else "convnext"
        alone = ("train.accumulation=2",) if row.name in BATCH_STATISTICS else ()
        found.append(case(row.name, row.name, *MOVING, model=model, alone=alone))
        if row.name in WITH_SEAM:
            found.append(case(f"{row.name}, features kept", row.name, alone=alone))
    found += [case(f"{method} on {family}", method, *MOVING, model=family) for method, family in OTHER_FAMILIES]
    found += [
        case("combination", "vpt_shallow+adapter_plus+lora", *MOVING),
        case("micro-batches", "full", *MOVING, "train.accumulation=2"),
        case("begun by one", "full", *MOVING, resume=True),
        case("begun by two", "full", *MOVING, stop=True),
    ]
    asked = {"losses": "ce,kd,attention,gram", "teacher": tiny.teacher}
    shared, weak, batches = "teacher.shard=on", "teacher.allow_weak=true", "train.batch_size=8"
    # bf16, which the processes would choose where the processor has it, is written to the disk in 16 bits.
    disk = (batches, "teacher.cache=disk", "train.precision=fp32")
    found += [
        case("teacher", "lora", shared, *MOVING, **asked),
        case("teacher in memory", "lora", shared, alone=("teacher.cache=off",), **asked),
        # Three batches of images for two processes: in the second round one of them has none.
        case("teacher on disk", "lora", shared, *disk, alone=("teacher.cache=off",), **asked),
        case("self", "partial", weak, *MOVING, losses="ce,kd", teacher="self"),
        case("average", "full", weak, *MOVING, losses="ce,kd", teacher="ema"),
    ]
    return found


@pytest.fixture(scope="module")
def pair(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("sharding")
    for case in cases:
        if case.resume:
            stopped_in_second_epoch(case.recipe(SHARDED), folder / case.name)
    found = Pair(folder, cases)
    yield found
    found.process.kill()


def stopped_in_second_epoch(recipe: Recipe, run: Path) -> None:
    evaluate, count = epoch_recorder.evaluate_as, 0

    def stopping(*arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:  # the untrained student, the first epoch, the second
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(epoch_recorder, "evaluate_as", stopping)
        start(recipe, run)


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Case], tuple[Path, list[list[int]]]]:
    """Does a case in this process; gives its run directory, and (correct, count) of each evaluation."""
    evaluate = epoch_recorder.evaluate_as

    def run(case: Case) -> tuple[Path, list[list[int]]]:
        counts: list[list[int]] = []

        def counting(*arguments: Any, **more: Any) -> Any:
            found = evaluate(*arguments, **more)
            counts.append([found.correct, found.count])
            return found

        monkeypatch.setattr(epoch_recorder, "evaluate_as", counting)
        return start(case.recipe(), tmp_path / "one").run_dir, counts

    return run


NAMES = [
    *TESTED,
    *(f"{method}, features kept" for method in WITH_SEAM),
    *(f"{method} on {family}" for method, family in OTHER_FAMILIES),
    *("combination", "micro-batches", "teacher", "teacher in memory", "teacher on disk", "self", "average"),
]


@pytest.mark.guarantee(18)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_that_share_weights_train_the_student_of_one(
    name: str, pair: Pair, one: Any, history: Any, figure: Any
) -> None:
    case = pair.cases[name]
    alone, counts = one(case)
    notes = pair.noted(name)
    steps = [losses(history(run)) for run in (alone, pair.folder / name)]
    assert len(steps[0]) == len(steps[1]) == STEPS
    apart = max(abs(a - b) for ours, theirs in zip(*steps, strict=True) for a, b in zip(ours, theirs, strict=True))
    assert apart <= TOLERANCE
    by_parts = name.partition(",")[0] in BATCH_STATISTICS
    for noted in notes:
        assert [count for _, count in noted["counts"]] == [count for _, count in counts]
        assert by_parts or noted["counts"] == counts
        # Nothing that leaves a run is sharded: one process may use it on its own.
        assert noted["plain"] and not noted["hooked"]
    mine, theirs = load_file(alone / TASK), load_file(pair.folder / name / TASK)
    assert {key: t.shape for key, t in mine.items()} == {key: t.shape for key, t in theirs.items()}
    # Running statistics are those of the first process's images, which no single process reproduces.
    values = [key for key in mine if not (by_parts and key.rpartition(".")[2] in STATISTICS)]
    assert max(float((mine[key] - theirs[key]).abs().max()) for key in values) <= TOLERANCE
    network, _ = load_task(pair.folder / name)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in network.tensors.items())
    of = "methods" if name in METHODS.names else "other runs (families, teachers, cached features)"
    figure(f"{of} equal to one process under FSDP2", 1, 1)
    figure("largest difference of losses under FSDP2", apart)


def losses(records: list[dict]) -> list[list[float]]:
    """Each record's losses of training, by name.

    Evaluation reads running statistics, which are those of the first process's images.
    """
    left_out = ("epoch", "accuracy", "val_ce")
    return [[record[key] for key in sorted(record) if key not in left_out] for record in records]


@pytest.mark.guarantee(18)
@pytest.mark.parametrize("name", ["begun by one", "begun by two"])
def test_a_run_goes_on_on_another_number_of_processes(name: str, pair: Pair, one: Any) -> None:
    """Sharded optimiser states come from whole ones and become whole ones."""
    case = pair.cases[name]
    alone, _ = one(case)
    notes = pair.noted(name)
    if case.stop:
        assert all(noted["interrupted"] for noted in notes)
        resume(pair.folder / name)
    mine, theirs = load_file(alone / TASK), load_file(pair.folder / name / TASK)
    assert max(float((mine[key] - theirs[key]).abs().max()) for key in mine) <= TOLERANCE


def test_a_process_holds_its_share_of_the_blocks(pair: Pair) -> None:
    """Two processes: half of what is frozen, of what is trained of the backbone's matrices, and of their moments."""
    for name in ("lora", "full", "partial"):
        for shares in (noted["shares"] for noted in pair.noted(name)):
            assert shares["frozen_here"] * 2 == shares["frozen"]
            assert shares["tuned_here"] * 2 == shares["tuned"] == shares["moments_here"] * 2
    assert pair.noted("full")[0]["shares"]["tuned"] > 0 < pair.noted("partial")[0]["shares"]["tuned"]


def test_a_process_holds_its_share_of_a_teacher(pair: Pair, tiny: Any) -> None:
    """All blocks of the tiny teacher divide by two."""
    whole = load_file(Path(tiny.teacher.removeprefix("local-dir:")) / "model.safetensors")
    inside = sum(tensor.numel() for name, tensor in whole.items() if name.startswith("blocks."))
    outside = sum(tensor.numel() for name, tensor in whole.items() if not name.startswith(("blocks.", "head.")))
    head = 3 * (whole["head.weight"].shape[1] + 1)
    for noted in pair.noted("teacher"):
        assert noted["teachers"] == [8 * (inside // 2 + outside + head)]
