"""What is frozen stays so, and a run says it. The second formula of the hash is written out here."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from remap.errors import TrainingError
from remap.pipeline.run import start
from remap.runs.run_dir import RunDir


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.guarantee(22)
@pytest.mark.parametrize("method", ["linear", "vpt_deep", "adaptformer", "lora", "bitfit"])
def test_the_hash_is_that_of_the_weights_that_came(
    tiny: Any, tmp_path: Path, figure: Callable[..., None], method: str
) -> None:
    """Source: the model's own file, less what the run says it trains."""
    result = start(tiny.recipe(method=method, losses="ce,kd"), tmp_path / "run")
    told = result.summary["frozen"]
    weights = load_file(Path(tiny.student.removeprefix("local-dir:")) / "model.safetensors")
    kept = {name: t for name, t in weights.items() if name not in result.summary["trainables"]}
    assert told["unchanged"] and told["sha256"] == _hash(kept)
    assert (told["tensors"], told["parameters"]) == (len(kept), sum(tensor.numel() for tensor in kept.values()))
    listed = json.loads(RunDir(tmp_path / "run").trainables.read_text())
    assert [row["name"] for row in listed] == result.summary["trainables"]
    assert sum(row["parameters"] for row in listed) == result.summary["student"]["trainable_parameters"]
    figure("frozen parts whose hash is that of the loaded weights", 1, 1)


def test_what_losses_train_is_listed_too(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    """Source: the names of the optimiser's moments in a checkpoint of the run."""
    progress = watch(lambda done: None)
    result = start(tiny.recipe(method="lora", losses="ce,mgd"), tmp_path / "run", progress)
    run = RunDir(tmp_path / "run")
    prefix = "optimizer/exp_avg/"
    stepped = {
        name.removeprefix(prefix): tensor.numel()
        for name, tensor in load_file(max(run.checkpoint.glob("*.safetensors"))).items()
        if name.startswith(prefix)
    }
    listed = {row["name"]: row["parameters"] for row in json.loads(run.trainables.read_text())}
    assert listed == stepped and list(listed) == result.summary["trainables"]
    own = sum(count for name, count in listed.items() if name.startswith("objective."))
    assert own == sum(listed.values()) - result.summary["student"]["trainable_parameters"] > 0
    count, total = sum(listed.values()), result.summary["student"]["total_parameters"] + own
    line = f"training {count:,} of {total:,} parameters ({count / total:.1%}), {own:,} of them in the losses"
    assert line in progress.said


def test_a_run_that_trains_all_says_so(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    progress = watch(lambda done: None)
    result = start(tiny.recipe(method="full", losses="ce"), tmp_path / "run", progress)
    total = result.summary["student"]["total_parameters"]
    assert f"training {total:,} of {total:,} parameters (100.0%)" in progress.said and total > 0


def test_frozen_batch_statistics_count(model_folder: Callable[..., str], tiny: Any, tmp_path: Path) -> None:
    """A network with batch norms under ``linear``: running means are frozen too."""
    student = model_folder("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 32)
    told = start(tiny.recipe(student=student, method="linear", losses="ce"), tmp_path / "run").summary["frozen"]
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=7)
    assert told["unchanged"] and told["tensors"] == len(model.state_dict()) - 2


@pytest.mark.guarantee(22)
@pytest.mark.parametrize("what", ["weight", "statistics"])
def test_a_change_of_what_is_frozen_is_caught(
    tiny: Any,
    model_folder: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
    what: str,
) -> None:
    student = model_folder("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 32)
    step = torch.optim.AdamW.step

    def spoil(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        found = step(optimizer, *arguments)
        with torch.no_grad():
            victim[0].view(-1)[0] += 1
        return found

    victim: list[Tensor] = []
    from remap.pipeline import run

    train = run.train

    def spoiled(job: Any, **words: Any) -> Any:
        model = job.student.model
        victim.append(model.conv1.weight if what == "weight" else model.bn1.running_mean)
        return train(job, **words)

    monkeypatch.setattr(run, "train", spoiled)
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(TrainingError, match="changed weights that are frozen"):
        start(tiny.recipe(student=student, method="linear", losses="ce"), tmp_path / "run")
    assert not (tmp_path / "run" / "task").exists()
    figure("changes of one frozen number, caught, nothing saved", 1, 1)
