"""Weights divided among several processes (FSDP2, PyTorch's ``fully_shard``).

Block by block: each process keeps its shard of a block's tensors, and has the full ones only while that block runs,
forward or backward. What is small stays replicated: all outside the blocks, what a method inserts, and the vectors it
trains. The backward pass averages the gradients of sharded tensors over processes; all others are left to the loop.
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
from remap.errors import BackboneError
from remap.io.human_size import size
from remap.network import Network
from remap.progress import Progress
from remap.tuning.base import is_inserted


def gather_full(tensor: Tensor) -> Tensor:
    """Return the full tensor on every process; one that is not sharded itself. Every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a full tensor divided as another one of its shape; every process passes the same one."""
    if not isinstance(tensor, DTensor):
        return value
    # No process sends: each cuts its shard out of its own copy.
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


@torch.no_grad()
def copy_full_(tensor: Tensor, value: Tensor) -> None:
    """Copy a full tensor into one that may be sharded; every process passes the same one."""
    tensor.copy_(shard_like(value, tensor))


def is_sharded(network: Network) -> bool:
    """Whether forward passes need all processes."""
    return isinstance(network.model, FSDPModule)


def wants_sharding(network: Network, setting: str, accelerator: Accelerator) -> bool:
    """Whether a teacher is to be sharded: setting "on", "off", or "auto" for one that is large for this GPU.

    Every process has to call it; all get the same answer.

    Raises:
        BackboneError: "on" for a network that cannot be.
    """
    if accelerator.num_processes == 1 or setting == "off":
        return False
    if network.anatomy.in_stages:  # only their outputs are known, not the modules that hold their tensors
        if setting == "on":
            name = type(network.model).__name__
            raise BackboneError(f"weights of {name} cannot be split among processes", do="set teacher.shard to off")
        return False
    if setting == "on":
        return True
    if accelerator.device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    # Half of the free memory stays for activations and the student.
    return any(all_reduce_max(accelerator, 2 * bytes_held(network) > free))


def bytes_held(network: Network) -> int:
    """Return the bytes of the network's parameters on this process between steps."""
    shards = (p.to_local() if isinstance(p, DTensor) else p for p in network.model.parameters())
    return sum(shard.numel() * shard.element_size() for shard in shards)


@dataclass(frozen=True)
class Sharding:
    """What ``shard`` changed.

    Attributes:
        classes: The original class of each module that ``fully_shard`` gave another one.
        added: New attributes of modules, and new keys of those that are dictionaries (hooks).
        parameters: The original parameters, emptied, and where they belong.
    """

    classes: Sequence[tuple[nn.Module, type]]
    added: Sequence[tuple[nn.Module, str, set | None]]
    parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]

    @torch.no_grad()
    def gather(self) -> None:
        """Turn the networks back into plain modules with the current values; every process has to call it."""
        device = torch.device("cpu")
        for module, name, parameter in self.parameters:
            if not parameter.numel():  # else it is shared with another module, and was filled there
                shard = module._parameters[name]
                assert shard is not None
                parameter.data = gather_full(shard.detach())
            module._parameters[name], device = parameter, parameter.device
        for module, key, keys in self.added:
            if keys is None:
                delattr(module, key)
            for one in keys or ():
                vars(module)[key].pop(one, None)
        for module, cls in self.classes:
            module.__class__ = cls
        if device.type != "cpu":
            gc.collect()  # reference cycles keep shards alive, and GPU memory does not trigger Python's collector


@contextmanager
def sharded(networks: Iterable[Network], accelerator: Accelerator, progress: Progress) -> Iterator[None]:
    """``shard`` some networks, of which the first is a student, and ``gather`` them unless the block raises."""
    if accelerator.num_processes == 1:
        progress.say("train.parallel=fsdp2 has no effect with one process")
        yield
        return
    networks = list(networks)
    # Measured before, to report what sharding saves.
    before = bytes_held(networks[0])
    sharding = shard(networks, accelerator.device)
    progress.say(
        f"the student's blocks are divided among {accelerator.num_processes} processes: "
        f"each holds {size(bytes_held(networks[0]))} of {size(before)}"
    )
    yield
    sharding.gather()


def shard(networks: Iterable[Network], device: torch.device) -> Sharding:
    """Divide the blocks' tensors of some networks among all processes, in place. Every process has to call it.

    Networks that share tensors (a student, and teachers made of it) go into one call. Parameters are replaced: make
    optimisers afterwards. Weights may be on the CPU; they are moved to ``device``.
    """
    # The warning is about outputs of a block that are views: backbones never change these in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    networks = list({id(network.model): network for network in networks}.values())
    # One dimension: all processes share one copy of the weights.
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
    """The parameters before sharding. As soon as no module holds one any more, its memory is released."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.holders = Counter(parameter for _, _, parameter in _parameters(modules))
        self.replaced: list[tuple[nn.Module, str, nn.Parameter]] = []

    def release(self, before: Iterable[tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Record what was replaced in a block that had the parameters ``before``."""
        for module, name, parameter in before:
            if module._parameters[name] is not parameter:
                self.replaced.append((module, name, parameter))
                self.holders[parameter] -= 1
                if not self.holders[parameter]:
                    parameter.data = parameter.new_empty(0)


def _parameters(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return each parameter with every module and name that holds it."""
    return [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]


def _shard(network: Network, fully: Callable[..., FSDPModule], originals: _Originals) -> None:
    model = network.model
    replicated = {p for name, p in model.named_parameters() if _is_replicated(name, p, network)}
    for path in dict.fromkeys(paths.block for paths in network.anatomy.blocks):
        block = module_at(model, path)
        attributes = _AttributesOfInput()
        # Around FSDP's own hook: "prepend" makes the one that is registered last the first to run.
        block.register_forward_pre_hook(attributes.put_back, prepend=True)
        _keep_name(block)
        before = _parameters(block.modules())
        fully(block, reshard_after_forward=True, ignored_params=replicated)
        originals.release(before)
        block.register_forward_pre_hook(attributes.take, prepend=True)
        _allow_reading_apart(block)
    # The root shards no tensors itself: through it blocks share their communication, and fetch ahead.
    _keep_name(model)
    fully(model, ignored_params={p for p in model.parameters() if not isinstance(p, DTensor)})
    for name in ("forward_features", "forward_head"):
        register_fsdp_forward_method(model, name)
    _allow_reading_apart(model)
    getattr(model, APART)(lambda: None)  # the root has to be the first to run


def _is_replicated(name: str, parameter: nn.Parameter, network: Network) -> bool:
    """Whether a parameter inside a block is not sharded: small ones that train, and scalars, which have no shards."""
    if is_inserted(name) or not parameter.ndim:
        return True
    return parameter.ndim == 1 and name in network.attached.trainable


class _AttributesOfInput:
    """Hooks that carry attributes of a block's input over FSDP's own hook, which makes a new tensor of it."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def take(self, _module: nn.Module, args: tuple) -> None:
        self.attributes = dict(vars(args[0])) if args and isinstance(args[0], Tensor) else {}

    def put_back(self, _module: nn.Module, args: tuple) -> None:
        if self.attributes:
            vars(args[0]).update(self.attributes)
            self.attributes = {}


def _allow_reading_apart(module: nn.Module) -> None:
    """Let readers of a module's weights run as a forward pass of it, which gathers them (``BlockReader.apart``)."""
    setattr(module, APART, MethodType(_call, module))
    register_fsdp_forward_method(module, APART)


def _call(_module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _keep_name(module: nn.Module) -> None:
    """Keep a module's ``repr``, which is part of the key of a teacher's cached outputs, when FSDP changes its class."""
    name = module._get_name()
    vars(module)["_get_name"] = lambda: name


def _attributes(module: nn.Module) -> dict[str, set | None]:
    """Return the names of a module's attributes and, where these are dictionaries, their keys."""
    return {key: set(value) if isinstance(value, dict) else None for key, value in vars(module).items()}


def _added(module: nn.Module, before: dict[str, set | None]) -> list[tuple[nn.Module, str, set | None]]:
    now = _attributes(module)
    added: list[tuple[nn.Module, str, set | None]] = [(module, key, None) for key in now if key not in before]
    for key, keys in before.items():
        if keys is not None and (more := (now[key] or set()) - keys):
            added.append((module, key, more))
    return added
