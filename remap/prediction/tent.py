"""Test-time adaptation by entropy minimisation (TENT). B images of a batch, C classes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from remap.errors import RunError
from remap.network import Network, Runner
from remap.remapping.signals import Signals

# Adam's, as in the paper's experiments on CIFAR-10 (without decay of weights).
RATE = 1e-3


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Return the normalisation layers that have a scale, of any class whose name says so (timm and PyTorch alike)."""
    named = (module for module in model.modules() if "norm" in type(module).__name__.lower())
    return [module for module in named if isinstance(getattr(module, "weight", None), nn.Parameter)]


class Tent:
    """Wang et al. 2021, arXiv 2006.10726: after each batch, one step down the mean entropy of its answers.

    Scales and shifts of the normalisation layers are trained and nothing else; batch norms normalise by the batch, but
    a single image, such as may be left over at the end, by the running statistics: it has no variance. The answers are
    those before the step, as in the paper's algorithm: of the batches so far, not of the later ones.

    Args:
        network: In eval mode; ``adapting`` puts it back as it was.
    """

    def __init__(self, network: Network, runner: Runner) -> None:
        self.runner, self.norms = runner, norms_of(network.model)
        self.parameters = [parameter for norm in self.norms for parameter in norm.parameters(recurse=False)]
        if not self.parameters:
            raise RunError(
                f"{network.identity.model} has no normalisation layer with a scale, which is all that tent trains",
                do="leave --adapt out",
            )
        self.optimizer = torch.optim.Adam(self.parameters, lr=RATE)

    @torch.enable_grad()
    def __call__(self, images_BCHW: Tensor) -> Signals:
        """Return the signals of a batch, and learn from it."""
        for norm in self.norms:
            norm.train(isinstance(norm, _BatchNorm) and len(images_BCHW) > 1)
        signals = self.runner(images_BCHW)
        log_BC = signals.logits_BC.float().log_softmax(dim=-1)
        entropy = -(log_BC.exp() * log_BC).sum(dim=-1).mean()
        gradients = torch.autograd.grad(entropy, self.parameters, allow_unused=True)
        if bool(torch.isfinite(entropy)):
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
        return signals


@contextmanager
def adapting(network: Network, runner: Runner) -> Iterator[Tent]:
    """Let a network adapt while the block runs; afterwards its tensors and modes are those of before.

    Raises:
        RunError: It has nothing that could adapt.
    """
    network.require_one_class("tent")
    tent = Tent(network, runner)
    tensors = [*tent.parameters, *(buffer for norm in tent.norms for buffer in norm.buffers(recurse=False))]
    before = [tensor.detach().clone() for tensor in tensors]
    required = {parameter: parameter.requires_grad for parameter in network.model.parameters()}
    modes = {norm: norm.training for norm in tent.norms}
    try:
        network.model.requires_grad_(False)
        for parameter in tent.parameters:
            parameter.requires_grad_(True)
        yield tent
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        for parameter, wanted in required.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None
        for norm, mode in modes.items():
            norm.train(mode)
