"""Modules of which each session of a run that is extended (``remap extend``) has its own."""

from collections.abc import Callable

from torch import nn


def one_a_session(make: Callable[[], nn.Module], session: int) -> nn.ModuleList:
    """Return a module for each session up to this one. What those before learned are buffers, which steps leave."""
    found = nn.ModuleList(make() for _ in range(session + 1))
    for part in found[:-1].modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return found
