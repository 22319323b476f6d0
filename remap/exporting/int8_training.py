"""Quantisation-aware distillation: the student learns from its float version to answer alike when it is rounded.

The forward pass rounds what the int8 file will round, by torch's fake quantisation: weights per output channel,
inputs of layers per tensor, over running ranges. Gradients pass the rounding unchanged where nothing was clipped
(Jacob et al. 2018, arXiv 1712.05877). The weights themselves stay as they are, up to rounding.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.nn.utils import parametrize

from remap.backbones.preprocess import Preprocess
from remap.errors import RunError
from remap.exporting.task_source import TaskSource
from remap.progress import Progress

# Training images that are learnt from at most, images a step, and the peak learning rate of AdamW.
IMAGES, BATCH, PEAK_LR = 4096, 32, 5e-4
# Share of the largest magnitudes of an input that its range leaves out; of a batch it is taken from so many values.
CLIPPED, _VALUES = 1e-4, 2**17
# Share of a new batch in the running range of an input.
_NEW = 0.1
_LAYERS = (nn.Linear, nn.Conv2d)


def int8_student(source: TaskSource, epochs: int, progress: Progress) -> nn.Module:
    """Return the student's model (merged where that can be) with weights that lose little when they are rounded.

    Trained are the method's own parameters (where it is not merged), norms, biases and the classifier, on the
    Kullback-Leibler divergence from the float student's answers to training images of the run.

    Raises:
        DataError: The training images are not at hand.
        RunError: A loss is not finite.
    """
    teacher, student = source.plain_model(), source.plain_model()
    views_NCHW, prepare = source.training_images(IMAGES), Preprocess(source.meta.preprocess)
    own = source.tuned.trained
    trained = [p.requires_grad_(True) for name, p in student.named_parameters() if p.dim() < 2 or name in own]
    layers = inner_layers(student, prepare(views_NCHW[:1]))
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", RoundedWeight(), unsafe=True)
    hooks = [layer.register_forward_pre_hook(RoundedInput()) for layer in layers.values()]
    steps = epochs * -(-len(views_NCHW) // BATCH)
    optimizer = torch.optim.AdamW(trained, PEAK_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():  # once: the views are fixed
        wanted_NK = torch.cat([teacher(prepare(batch)).log_softmax(dim=-1) for batch in views_NCHW.split(BATCH)])
    with progress.wait("training with rounded weights and activations", steps) as step:
        for _ in range(epochs):
            for chosen in torch.randperm(len(views_NCHW), generator=draws).split(BATCH):
                answers = student(prepare(views_NCHW[chosen])).log_softmax(dim=-1)
                loss = kl_div(answers, wanted_NK[chosen], reduction="batchmean", log_target=True)
                if not torch.isfinite(loss):
                    raise RunError("the loss of the rounded student is not finite", do="export with --int8 static")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step.advance(1, loss=loss.item())
    for hook in hooks:
        hook.remove()
    for layer in layers.values():
        parametrize.remove_parametrizations(layer, "weight")
    return student.requires_grad_(False)


@torch.no_grad()
def inner_layers(model: nn.Module, pixels: Tensor) -> Mapping[str, nn.Module]:
    """Return the linear and convolutional layers by path that run between the first and the last such layer.

    The first reads pixels and the last gives the answers: both stay in float32, where rounding costs most.
    """
    called: dict[str, nn.Module] = {}
    hooks = [
        module.register_forward_hook(lambda module, *_, path=path: called.update({path: module}))
        for path, module in model.named_modules()
        if isinstance(module, _LAYERS)
    ]
    model(pixels)
    for hook in hooks:
        hook.remove()
    return dict(list(called.items())[1:-1])


class RoundedWeight(nn.Module):
    """A weight (outputs, ...) rounded to 255 steps for each output, symmetric around 0."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


class RoundedInput:
    """A hook that rounds a layer's input to 256 steps over a running range of nearly all values and 0."""

    low = high = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = inputs[0]
        flat = values.detach().flatten()
        some = flat[:: -(-len(flat) // _VALUES)].abs()
        most = some.topk(1 + int(CLIPPED * len(some))).values[-1]
        low, high = flat.min().clamp(max=0).maximum(-most), flat.max().clamp(min=0).minimum(most)
        if self.low is not None:
            low, high = torch.lerp(self.low, low, _NEW), torch.lerp(self.high, high, _NEW)
        self.low, self.high = low, high
        scale = float((high - low).clamp(min=1e-12)) / 255
        zero = max(-128, min(127, round(-128 - float(low) / scale)))
        return (torch.fake_quantize_per_tensor_affine(values, scale, zero, -128, 127), *inputs[1:])
