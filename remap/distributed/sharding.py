"""Weights that several processes share out among themselves (FSDP2, PyTorch's ``fully_shard``).

Block by block: each process keeps its part of a block's tensors, and has the whole ones only while that block runs,
forward or backward. Whole on every process stays what is small: all outside the blocks, what a method inserts, and
the vectors it trains. Gradients of sharded tensors come out of the backward pass averaged over processes; those of
all others are left to the loop.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from remap.backbones.anatomy import module_at
from remap.backbones.block_reader import APART
from remap.distributed.collectives import all_reduce_max
from remap.io.atomic_write import size
from remap.network import Network
from remap.progress import Progress
from remap.tuning.base import is_inserted


def gather_full(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; one that is not sharded is itself. Every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, divided as another one of its shape is; every process brings the same one."""
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


@torch.no_grad()
def copy_full_(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; every process brings the same one."""
    tensor.copy_(shard_like(value, tensor))


def is_sharded(network: Network) -> bool:
    """Whether forward passes need all processes."""
    return isinstance(network.model, FSDPModule)


def wants_sharding(network: Network, setting: str, accelerator: Accelerator) -> bool:
    """Whether a teacher is to be sharded, by its recipe's word: "on", "off", or "auto" for one that is large here.

    Every process has to call it; all get the same answer.
    """
    if accelerator.num_processes == 1 or setting != "auto":
        return accelerator.num_processes > 1 and setting == "on"
    if accelerator.device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    return any(all_reduce_max(accelerator, 2 * bytes_held(network) > free))


def bytes_held(network: Network) -> int:
    """What the network's parameters take on this process between steps."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in network.model.parameters())
    return sum(part.numel() * part.element_size() for part in parts)


@dataclass(frozen=True)
class Sharding:
    """What ``shard`` changed.

    Attributes:
        classes: What the modules that run as one were before.
        added: New attributes of modules, and new keys of those that are dictionaries (hooks).
        parameters: The parameters that were there before, emptied, and where they belong.
    """

    classes: Sequence[tuple[nn.Module, type]]
    added: Sequence[tuple[nn.Module, str, set | None]]
    parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]

    @torch.no_grad()
    def gather(self) -> None:
        """Make the networks whole on every process, as they were before: plain modules with their own parameters, and
        the values of now. Every process has to call it."""
        device = torch.device("cpu")
        for module, name, parameter in self.parameters:
            if not parameter.numel():  # else it is shared, and was met already
                parameter.data = gather_full(module._parameters[name].detach())
            module._parameters[name], device = parameter, parameter.device
        for module, key, keys in self.added:
            if keys is None:
                delattr(module, key)
            for one in keys or ():
                vars(module)[key].pop(one, None)
        for module, cls in self.classes:
            module.__class__ = cls
        if device.type != "cpu":
            gc.collect()  # parts of tensors live on in cycles; on a GPU nothing else would notice that they are many


@contextmanager
def sharded(networks: Iterable[Network], accelerator: Accelerator, progress: Progress) -> Iterator[None]:
    """``shard`` some networks, of which the first is a student, and ``gather`` them after all went well."""
    if accelerator.num_processes == 1:
        progress.say("train.parallel=fsdp2: one process has nobody to share out weights with")
        yield
        return
    networks = list(networks)
    before = bytes_held(networks[0])
    sharding = shard(networks, accelerator.device)
    progress.say(
        f"the student's blocks are shared out among {accelerator.num_processes} processes: "
        f"each holds {size(bytes_held(networks[0]))} of {size(before)}"
    )
    yield
    sharding.gather()


def shard(networks: Iterable[Network], device: torch.device) -> Sharding:
    """Divide the blocks' tensors of some networks among all processes, in place. Every process has to call it.

    Networks that have tensors in common (a student, and teachers made of it) go into one call. What was a parameter
    is another one afterwards: make optimisers later. Weights may be on the CPU; they come to ``device``.
    """
    # What a block returns may be a view. Backbones add to it out of place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    networks = list({id(network.model): network for network in networks}.values())
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    modules = list(dict.fromkeys(module for network in networks for module in network.model.modules()))
    before = {module: (type(module), _attributes(module)) for module in modules}
    originals = _Originals(modules)
    for network in networks:
        _shard(network, partial(fully_shard, mesh=mesh), originals)
        network.model.to(device)
    return Sharding(
        [(module, cls) for module, (cls, _) in before.items() if type(module) is not cls],
        [change for module, (_, attributes) in before.items() for change in _added(module, attributes)],
        originals.replaced,
    )


class _Originals:
    """The parameters that were there before. As soon as no module has one any more, its memory is given back."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.places = Counter(parameter for _, _, parameter in _parameters(modules))
        self.replaced: list[tuple[nn.Module, str, nn.Parameter]] = []

    def settle(self, there: Iterable[tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Take note of what was replaced in a block, whose parameters were ``there``."""
        for module, name, parameter in there:
            if module._parameters[name] is not parameter:
                self.replaced.append((module, name, parameter))
                self.places[parameter] -= 1
                if not self.places[parameter]:
                    parameter.data = parameter.new_empty(0)


def _parameters(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every place of a parameter."""
    return [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]


def _shard(network: Network, fully: Callable[..., FSDPModule], originals: _Originals) -> None:
    model = network.model
    stay = {p for name, p in model.named_parameters() if _stays_whole(name, p, network)}
    for path in dict.fromkeys(paths.block for paths in network.anatomy.blocks):
        block = module_at(model, path)
        kept = _AttributesOfInput()
        block.register_forward_pre_hook(kept.put_back, prepend=True)
        _named_as_before(block)
        there = _parameters(block.modules())
        fully(block, reshard_after_forward=True, ignored_params=stay)
        originals.settle(there)
        block.register_forward_pre_hook(kept.take, prepend=True)
        _apart(block)
    # Without tensors of its own: through it blocks share their communication, and fetch ahead.
    _named_as_before(model)
    fully(model, ignored_params={p for p in model.parameters() if not isinstance(p, DTensor)})
    for name in ("forward_features", "forward_head"):
        register_fsdp_forward_method(model, name)
    _apart(model)
    getattr(model, APART)(lambda: None)  # the root has to be the first to run


def _stays_whole(name: str, parameter: nn.Parameter, network: Network) -> bool:
    """Whether a parameter inside a block is left whole: small ones that train, and scalars, which have no parts."""
    if is_inserted(name) or not parameter.ndim:
        return True
    return parameter.ndim == 1 and name in network.attached.trainable


class _AttributesOfInput:
    """Hooks around FSDP's own, which makes new tensors of a block's inputs: what a tensor carries goes along."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def take(self, module: nn.Module, args: tuple) -> None:
        self.attributes = dict(vars(args[0])) if args and isinstance(args[0], Tensor) else {}

    def put_back(self, module: nn.Module, args: tuple) -> None:
        if self.attributes:
            vars(args[0]).update(self.attributes)
            self.attributes = {}


def _apart(module: nn.Module) -> None:
    """Let readers of a module's weights run as a forward pass of it (``BlockReader.apart``)."""
    setattr(module, APART, MethodType(_call, module))
    register_fsdp_forward_method(module, APART)


def _call(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _named_as_before(module: nn.Module) -> None:
    """``repr`` is part of what a teacher's kept outputs are found by: it says the same of a sharded one."""
    name = module._get_name()
    module._get_name = lambda: name


def _attributes(module: nn.Module) -> dict[str, set | None]:
    """Names of a module's attributes; of dictionaries their keys."""
    return {key: set(value) if isinstance(value, dict) else None for key, value in vars(module).items()}


def _added(module: nn.Module, before: dict[str, set | None]) -> list[tuple[nn.Module, str, set | None]]:
    now = _attributes(module)
    new = [(module, key, None) for key in now if key not in before]
    grown = [(module, key, now[key] - keys) for key, keys in before.items() if keys is not None]
    return new + [change for change in grown if change[2]]
