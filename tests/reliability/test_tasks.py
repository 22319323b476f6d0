"""Task files and many tasks on one backbone: what was trained comes back to the last bit, and nothing else is kept."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from remap.backbones.build import state_hash
from remap.backbones.families import FAMILIES
from remap.data.views import View
from remap.engine.optim import make_optimizer
from remap.errors import RunError
from remap.network import Network, Runner, choose_kernels, tuned
from remap.recipe.schema import ModelSpec
from remap.runs.task import load_task, open_backbone, put_task, save_task
from remap.tuning import METHODS
from remap.tuning.base import Sample

pytestmark = pytest.mark.slow

CLASSES = ("blue", "green", "red")
SIZE = 32
SMALL = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
# Default ranks above the tiny models' width.
OPTIONS = {name: {"rank": 4, "alpha": 4} for name in ("randlora", "gralora")} | {"fact_tk": {"rank": 4}}
OPTIONS |= {"sidetune": {"side": "test_resnet"}, "lst": {"reduction": 4}}
OPTIONS |= {"waveft": {"coefficients": 40}, "psoft": {"rank": 4}}  # of layers as narrow as 8 channels


@dataclass(frozen=True)
class Kind:
    """A backbone with what a careless save loses: its own head, running statistics, a tensor that all blocks use."""

    family: str
    architecture: str
    arguments: dict[str, object]


KINDS = {
    "head": Kind("vit", "vit_tiny_patch16_224", SMALL),
    "batch norm": Kind("resnet", "resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
    "tied": Kind("beit", "beit_base_patch16_224", SMALL | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
}
# Their frozen random bases or places stay in the file, so that a task does not depend on a generator's version.
KEEP_BASES = ("vera", "randlora", "waveft", "ranpac")  # ranpac: its random projection
CELLS = [
    pytest.param(row.name, kind, id=f"{row.name}-{kind}")
    for row, kind in itertools.product(METHODS, KINDS)
    if row.fits(FAMILIES.row(KINDS[kind].family).parts)
]


@pytest.fixture
def folder_of(model_folder: Callable[..., str]) -> Callable[[str], str]:
    """The word of a model folder of this kind."""

    def make(name: str) -> str:
        return model_folder(KINDS[name].architecture, KINDS[name].arguments, SIZE)

    return make


@pytest.mark.guarantee(10)
@pytest.mark.parametrize(("method", "kind"), CELLS)
def test_what_was_saved_comes_back_to_the_last_bit(
    folder_of: Callable[[str], str], figure: Callable[..., None], tmp_path: Path, method: str, kind: str
) -> None:
    """Expected logits: the network that was trained. Bound on bytes: what is trained, a tenth more, and names."""
    network = _build(folder_of(kind), method)
    _train(network, seed=1)
    size = save_task(tmp_path, network, _view(), method, OPTIONS.get(method, {}))
    torch.manual_seed(99)
    loaded, _ = load_task(tmp_path)
    difference = float((_logits(loaded) - _logits(network)).abs().max())
    held = network.tensors if method in KEEP_BASES else network.trained
    trained = sum(tensor.nbytes for tensor in held.values())
    assert difference == 0.0
    assert loaded.identity.sha256 == network.identity.sha256 and loaded.classes == CLASSES
    assert size <= 1.1 * trained + 64 * 1024
    figure("tasks that reload to the same logits", 1, 1)
    figure("largest difference of logits", difference)
    figure("largest file over what is trained, bytes", max(0, size - trained))


def test_the_three_kinds_have_what_they_are_named_for(folder_of: Callable[[str], str]) -> None:
    """A shared table read by one block only, or a network without running statistics, would test nothing."""
    models = {kind: _build(folder_of(kind), "full").model for kind in KINDS}
    assert any(isinstance(module, _BatchNorm) for module in models["batch norm"].modules())
    tables = [name for name, _ in models["tied"].named_parameters() if "relative_position_bias_table" in name]
    assert tables == ["rel_pos_bias.relative_position_bias_table"] and len(models["tied"].blocks) == 2
    assert models["head"].head.weight.shape == (len(CLASSES), SMALL["embed_dim"])


def test_running_statistics_are_part_of_a_task(folder_of: Callable[[str], str]) -> None:
    """Under full fine-tuning they move, so a task that left them out would give other logits."""
    network = _build(folder_of("batch norm"), "full")
    before = {name: tensor.clone() for name, tensor in network.model.named_buffers()}
    _train(network, seed=1)
    moved = {name for name, tensor in network.model.named_buffers() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("running_mean") for name in moved) and moved <= set(network.tensors)


def _one_of_each(count: int) -> list[str]:
    """Methods over and over, so that neighbours are tuned by different ones."""
    names = ("lora", "bitfit", "vpt_deep", "adaptformer", "ssf")
    return [names[number % len(names)] for number in range(count)]


@pytest.mark.guarantee(12)
def test_twenty_tasks_share_one_backbone(
    folder_of: Callable[[str], str], figure: Callable[..., None], tmp_path: Path
) -> None:
    """Loaded one after another into one process, forwards and backwards; expected: each network when it was trained."""
    word = folder_of("head")
    before, alone = _hash_of_folder(word), list[Tensor]()
    for number, method in enumerate(_one_of_each(20)):
        network = _build(word, method)
        _train(network, seed=number)
        save_task(tmp_path / f"task{number}", network, _view(), method, {})
        alone.append(_logits(network))
    assert len({tensor.numpy().tobytes() for tensor in alone}) == 20, "twenty different tasks"
    order = [*range(20), *reversed(range(20))]
    differences, untouched = [], 0
    plain = dict(open_backbone(ModelSpec(model=word), len(CLASSES)).model.named_parameters())
    for number in order:
        network, _ = load_task(tmp_path / f"task{number}")
        differences.append(float((_logits(network) - alone[number]).abs().max()))
        parameters = dict(network.model.named_parameters())
        untouched += all(torch.equal(parameters[n], t) for n, t in plain.items() if n not in network.trained)
    assert max(differences) == 0.0 and untouched == len(order)
    assert _hash_of_folder(word) == before
    figure("loads of twenty tasks, in both orders, equal to each alone", differences.count(0.0), len(order))
    figure("largest difference of logits", max(differences))


@pytest.mark.guarantee(12)
@pytest.mark.parametrize("method", ["lora", "vpt_deep", "adaptformer", "ssf"])
def test_twenty_tasks_switch_in_one_network(
    folder_of: Callable[[str], str], figure: Callable[..., None], tmp_path: Path, method: str
) -> None:
    """One network in memory takes the numbers of task after task; its frozen weights are never written."""
    word = folder_of("head")
    alone: list[Tensor] = []
    for number in range(20):
        network = _build(word, method)
        _train(network, seed=number, steps=1)
        save_task(tmp_path / f"task{number}", network, _view(), method, {})
        alone.append(_logits(network))
    resident = _build(word, method)
    frozen = {name: p.clone() for name, p in resident.model.named_parameters() if name not in resident.trained}
    visits = [(7 * step + 3) % 20 for step in range(40)]  # every task twice, never neighbours
    differences = []
    for number in visits:
        put_task(resident, tmp_path / f"task{number}")
        differences.append(float((_logits(resident) - alone[number]).abs().max()))
    assert set(visits) == set(range(20)) and max(differences) == 0.0
    after = dict(resident.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    resident.attached.detach()
    assert state_hash(resident.model, resident.anatomy) == resident.identity.sha256
    figure("switches equal to each task alone", differences.count(0.0), len(visits))
    figure("largest difference of logits", max(differences))


def test_a_task_of_another_backbone_is_not_put_into_this_one(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    network = _build(folder_of("tied"), "bitfit")
    save_task(tmp_path, network, _view(), "bitfit", {})
    resident = _build(folder_of("head"), "bitfit")
    before = _logits(resident)
    with pytest.raises(RunError, match="belongs to another backbone"):
        put_task(resident, tmp_path)
    assert torch.equal(_logits(resident), before)


def _build(word: str, method: str) -> Network:
    torch.manual_seed(0)
    network = tuned(open_backbone(ModelSpec(model=word), len(CLASSES)), method, OPTIONS.get(method, {}))
    choose_kernels(network, "auto", torch.device("cpu"))  # as a run does, and as a task is loaded
    network.classes = CLASSES
    if network.attached.wants_sample:
        images = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
        network.attached.prepare(Sample(lambda: iter([(images, torch.arange(6) % 3)]), 3))
    return network


def _train(network: Network, seed: int, steps: int = 3) -> None:
    """A few real steps on random labels: every trained tensor and running statistic leaves its initial value."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(network, [], lr=0.01, weight_decay=0.0)
    runner = Runner(network)
    for step in range(steps):
        network.attached.train()
        network.attached.set_sample_keys(torch.arange(6) + step)
        images = torch.randint(0, 256, (6, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        loss = nn.functional.cross_entropy(runner(images).logits_BC, torch.arange(6) % 3)
        penalty = network.attached.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        network.attached.after_step(step, steps)
        optimizer.zero_grad()


@torch.no_grad()
def _logits(network: Network) -> Tensor:
    images = torch.randint(0, 256, (5, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    network.model.eval()
    return Runner(network)(images).logits_BC


def _hash_of_folder(word: str) -> str:
    return open_backbone(ModelSpec(model=word), len(CLASSES)).identity.sha256


def _view() -> View:
    return View(SIZE, 1.0, "bicubic")
