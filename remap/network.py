"""A backbone, the method attached to it and its preprocessing: what a run trains, saves, loads and predicts with."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from remap.backbones.anatomy import Anatomy, classifier_parameters, set_fused_attention
from remap.backbones.build import Backbone, Identity
from remap.backbones.kernels import channels_last, fused_attention, train_depthwise_in_float32, with_channels_last
from remap.backbones.preprocess import Preprocess, PreprocessSpec
from remap.data import CLASSES, MULTILABEL
from remap.errors import RunError
from remap.remapping.signals import Needs, Signals
from remap.remapping.tap import Tap
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method
from remap.tuning.dropout import drawn_rate


@dataclass
class Network:
    """A model ready to be run on raw pixels.

    Attributes:
        classes: Class names its head was trained for; None while the head is not.
        attention_kernel: Which one runs it, and why; empty where none was chosen.
        task: What it answers: one class an image, or with MULTILABEL any number of them.
    """

    model: nn.Module
    anatomy: Anatomy
    preprocess: PreprocessSpec
    identity: Identity
    attached: Attached
    classes: tuple[str, ...] | None = None
    attention_kernel: str = ""
    task: str = CLASSES

    @property
    def head(self) -> dict[str, nn.Parameter]:
        return classifier_parameters(self.model, self.anatomy)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Everything a run trains: the method's parameters, and the head unless the method writes it, by full name."""
        parameters = dict(self.model.named_parameters())
        head = self.head if self.attached.trains_head else {}
        return {name: parameters[name] for name in self.attached.trainable} | head

    @property
    def tensors(self) -> dict[str, Tensor]:
        """``trained``, the head, and the buffers that training changes: what a checkpoint has to hold."""
        buffers = dict(self.model.named_buffers())
        names = (*self.attached.buffers, *(name for name in buffers if self.anatomy.is_head(name)))
        return self.trained | self.head | {name: buffers[name] for name in names}

    @property
    def in_task(self) -> dict[str, Tensor]:
        """What a task holds: ``tensors``, and the frozen weights where they are random, which no other file holds."""
        frozen = dict(self.model.named_parameters()) if self.identity.weights == "none" else {}
        return frozen | self.tensors

    @property
    def learns_batch_statistics(self) -> bool:
        """Whether training depends on which images are in a batch together."""
        return any(isinstance(module, _BatchNorm) for module in self._in_training())

    @property
    def draws_masks(self) -> bool:
        """Whether the backbone's own dropout or drop-path is active, which draws for all rows of a pass at once."""
        return any(drawn_rate(module) > 0 for module in self._in_training())

    def _in_training(self) -> Iterator[nn.Module]:
        for path in (*self.attached.tuned_modules, *self.attached.added):
            yield from self.model.get_submodule(path).modules()

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.trained.values())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def require_one_class(self, what: str) -> None:
        """Refuse a network that answers with any number of classes.

        Raises:
            RunError: ``what`` is for one class an image.
        """
        if self.task == MULTILABEL:
            raise RunError(f"{what} is for students of one class an image", given=f"a student of task {MULTILABEL}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each class: of one class an image they sum to 1, else each is of a yes or no."""
        return logits.sigmoid() if self.task == MULTILABEL else logits.softmax(dim=-1)

    def tap(self, needs: Needs = Needs()) -> Tap:
        attached = self.attached
        return Tap(self.model, self.anatomy, needs, attached.extra_tokens, attached.seam, attached.tokens_from)


def tuned(backbone: Backbone, method: str, options: dict[str, object]) -> Network:
    """Attach a method to a backbone and make its head trainable, unless the method writes it."""
    attached = attach_method(backbone.model, backbone.anatomy, method, options)
    attached.forget_original()
    network = Network(backbone.model, backbone.anatomy, backbone.preprocess, backbone.identity, attached)
    for parameter in network.head.values():
        parameter.requires_grad_(attached.trains_head)
    return network


class Runner(nn.Module):
    """Raw pixels to signals: the network's own size, interpolation and normalisation, then the tapped forward.

    Args:
        bf16: Run the network under bfloat16 autocast; signals are still compared in float32.
    """

    def __init__(self, network: Network, needs: Needs = Needs(), *, bf16: bool = False) -> None:
        super().__init__()
        self.model = network.model
        device = next(network.model.parameters()).device
        self.preprocess = Preprocess(network.preprocess).to(device)
        self.tap = network.tap(needs)
        self.bf16 = bf16
        self.channels_last = channels_last(network.model, device.type, bf16=bf16)

    def forward(self, images_BCHW: Tensor, kept: Mapping[str, Tensor] | None = None) -> Signals:
        """Return the signals of uint8 images (B, 3, V, V).

        Args:
            kept: What ``stem`` gave for these images: the frozen part is then not run again. Images of no pixels
                stand for images that the rest does not read.
        """
        pixels = self._pixels(images_BCHW) if images_BCHW.numel() else None
        if kept is not None and self.channels_last:  # what was cached of maps has its channels first
            kept = {name: with_channels_last(x) if x.ndim == 4 else x for name, x in kept.items()}
        with self._precision(images_BCHW):
            return self.tap(pixels, kept)

    def stem(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Run the frozen beginning alone, for networks that have a seam."""
        assert self.tap.seam is not None
        with self._precision(images_BCHW):
            return self.tap.seam.stem(self._pixels(images_BCHW))

    def _pixels(self, images_BCHW: Tensor) -> Tensor:
        pixels = self.preprocess(images_BCHW)
        # What a convolution gives has the layout of what it was given, so this holds to the end of the network.
        return with_channels_last(pixels) if self.channels_last else pixels

    def _precision(self, images_BCHW: Tensor) -> AbstractContextManager:
        return torch.autocast(images_BCHW.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def frozen(network: Network) -> Network:
    """Freeze a network: no gradients, eval mode, and ``train()`` has no effect on it."""
    network.model.requires_grad_(False)
    network.model.eval()
    network.model.__dict__["train"] = lambda *_args, **_kwargs: network.model  # a later train() changes nothing
    return network


def choose_kernels(
    network: Network, setting: str, device: torch.device, *, bf16: bool = False, trains: bool = True
) -> None:
    """Choose kernels by ``remap.backbones.kernels``, and note that of attention in ``network.attention_kernel``.

    Args:
        trains: Whether it is, or was, trained with gradients through its blocks: a student keeps its kernel.
    """
    anatomy = network.anatomy
    fused, why = fused_attention(setting, device.type, bf16=bf16, trains=trains, tokens=anatomy.sequence)
    set_fused_attention(network.model, anatomy, fused)
    network.attention_kernel = f"{'fused' if fused else 'explicit'}: {why}"
    if bf16 and trains and device.type == "cpu":
        train_depthwise_in_float32(network.model)
