"""Compiled blocks: what is attached to them later counts."""

from typing import Any

import pytest
import torch
from torch import nn

from remap.backbones.build import build
from remap.engine.compiling import compile_blocks
from remap.network import Runner, tuned
from remap.remapping.signals import Needs


def test_hooks_that_come_later_count(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report reads attention from blocks compiled for training, and a later run of the process other signals.

    Expected: what the same blocks give without compilation. PyTorch's backend "eager" guards as inductor does.
    """
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: compile_module(self, backend="eager"))
    images_BCHW = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    needs = Needs(attention=frozenset({1}), tokens=frozenset({1}))
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        network = tuned(build(tiny.student, "pretrained", 3), "full", {})
        network.model.eval()
        if is_compiled:
            compile_blocks(network)
        with torch.no_grad():
            Runner(network)(images_BCHW)  # compiled here, without hooks
            found.append(Runner(network, needs)(images_BCHW))
    plain, compiled = found
    torch.testing.assert_close(compiled.attention[1].map_BHSS(), plain.attention[1].map_BHSS())
    torch.testing.assert_close(compiled.tokens[1], plain.tokens[1])
