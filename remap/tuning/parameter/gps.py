"""GPS (Zhang et al. 2024, arXiv 2312.10136): train the weights with the largest gradients of every neuron.

Letters: B images, C classes, F features in front of the classifier, o neurons (output features) of a layer, i its
weights a neuron, K chosen weights a neuron.
"""

from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, module_at
from remap.backbones.families.reading import norm_paths
from remap.backbones.typed import evaluating, inputs_of
from remap.errors import BackboneError, RunError
from remap.tuning.base import Attachment, Edits, Fold, Method, Options, Sample, TrainingHooks, is_inserted
from remap.tuning.parameter.bitfit import bias_parameters
from remap.tuning.weights import recompute, registered


class GPS(Method):
    """K weights of every neuron of every linear and convolutional layer, and the biases that are not of norms.

    Chosen are the weights with the largest |gradient| of a supervised contrastive loss on training images, at the
    pretrained network. Stored are their positions and what is added to them; the weights themselves stay as they are.
    On ViT-B/16 83,712 weights (K = 1) and 83,712 biases.
    """

    class Config(Options):
        num_weights: int = Field(default=1, ge=1, description="Weights to train per neuron (K in the paper).")
        temperature: float = Field(default=0.07, gt=0.0, description="Temperature of the loss that picks the weights.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        layers = {
            f"{path}.remap_gps": module
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and not is_inserted(path)
            and not anatomy.is_head(f"{path}.weight")
        }
        edits = Edits(model)
        inputs = {path: registered(layer, "weight")[0].numel() for path, layer in layers.items()}
        least = min(inputs, key=lambda path: inputs[path])
        if self.config.num_weights > inputs[least]:
            raise BackboneError(
                "gps must choose more weights of a neuron than there are",
                given=f"num_weights={self.config.num_weights}, {inputs[least]} weights in {least.rpartition('.')[0]}",
                allowed=f"1 to {inputs[least]}",
            )
        changes: list[tuple[nn.Module, SparseChange]] = []
        for path, layer in layers.items():
            like = registered(layer, "weight")
            sparse = edits.insert(path, SparseChange(like, self.config.num_weights), like)
            edits.undo_by(recompute(layer, "weight", sparse.add_to, first=True))
            changes.append((layer, sparse))
        norms = norm_paths(model)
        biases = [name for name in bias_parameters(model, anatomy) if name.rpartition(".")[0] not in norms]
        names = [*biases, *(f"{path}.values" for path in layers)]
        return Attachment(
            edits,
            trainable=names,
            no_decay=names,
            fold=Fold(partial(_fold, changes)),
            hooks=ChoiceByGradient(model, anatomy, changes, self.config.temperature),
        )


class SparseChange(nn.Module):
    """What is added to K weights of every neuron of a layer.

    Attributes:
        values: (o, K), zero at first.
        places: (o, K) int32, different ones within a row. Until others are chosen, neuron n has the centres of the
            kernels that read channels n, n + 1 and so on.
    """

    places: Tensor

    def __init__(self, weight: Tensor, num_weights: int) -> None:
        super().__init__()
        neurons = len(weight)
        self.values = nn.Parameter(torch.zeros(neurons, num_weights))
        channels, area = weight.shape[1], weight[0, 0].numel()
        number = torch.arange(num_weights)
        channel_oK = (torch.arange(neurons)[:, None] + number) % channels
        places_oK = channel_oK * area + (area // 2 + number // channels) % area
        self.register_buffer("places", places_oK.to(torch.int32))

    def add_to(self, weight: Tensor) -> Tensor:
        """Return ``weight`` (o, ...) with the values at their places."""
        flat_oi = weight.flatten(1)
        # Places differ, so that scattering sums of two numbers is exact and the same on every device.
        at_oK = self.places.long()
        return flat_oi.scatter(1, at_oK, flat_oi.gather(1, at_oK) + self.values).view_as(weight)

    def choose(self, gradient: Tensor) -> None:
        """Take the places with the largest |gradient| of every neuron."""
        largest_oK = gradient.flatten(1).abs().topk(self.values.shape[1], dim=1).indices
        self.places.copy_(largest_oK.sort(dim=1).values)


class ChoiceByGradient(TrainingHooks):
    """Chooses the weights before the first step."""

    wants_sample = True

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, changes: list[tuple[nn.Module, SparseChange]], temperature: float
    ) -> None:
        self.model, self.anatomy, self.changes, self.temperature = model, anatomy, changes, temperature

    def prepare(self, sample: Sample) -> None:
        """Choose the weights by the gradient of the contrastive loss over all images of the sample at once.

        The features are the inputs of the classifier, with the network in eval and in full precision. A first pass
        gives the gradient with respect to the features, a second one takes it through the network batch by batch.
        """
        weights = [registered(layer, "weight") for layer, _ in self.changes]
        gradients = [torch.zeros_like(weight) for weight in weights]
        required = {p: p.requires_grad for p in self.model.parameters()}
        try:
            self.model.requires_grad_(False)
            with evaluating(self.model):
                features_BF, labels_B = self._all_features(sample)
                with torch.enable_grad():
                    features_BF.requires_grad_(True)
                    loss = contrastive_loss(features_BF, labels_B, self.temperature)
                (slope_BF,) = torch.autograd.grad(loss, features_BF)
                for weight in weights:
                    weight.requires_grad_(True)
                start = 0
                for pixels_BCHW, _ in sample.batches():
                    slope = slope_BF[start : start + len(pixels_BCHW)]
                    start += len(pixels_BCHW)
                    with torch.enable_grad():
                        features = self._features(pixels_BCHW)
                    of_batch = torch.autograd.grad(features, weights, slope)
                    for total, gradient in zip(gradients, of_batch, strict=True):
                        total += gradient
        finally:
            for parameter, requires_grad in required.items():
                parameter.requires_grad_(requires_grad)
        for (_, sparse), gradient in zip(self.changes, gradients, strict=True):
            sparse.choose(gradient)

    @torch.no_grad()
    def _all_features(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return features (B, F) and labels (B,) of all images of the sample."""
        batches = [(self._features(pixels_BCHW), labels_B) for pixels_BCHW, labels_B in sample.labeled("gps")]
        features_BF, labels_B = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if len(labels_B.unique()) == len(labels_B):
            raise RunError(
                "gps chooses weights by pairs of training images of one class, and there are none",
                given=f"{len(labels_B)} images",
                do="take another method, or more images a class",
            )
        return features_BF, labels_B

    def _features(self, pixels_BCHW: Tensor) -> Tensor:
        """Return (B, F): what the classifier's linear layers take, side by side where a model has two."""
        heads = [module_at(self.model, path) for path in self.anatomy.classifier_heads]
        with inputs_of(*heads) as kept, torch.autocast(pixels_BCHW.device.type, enabled=False):
            self.model(pixels_BCHW)
        return torch.cat([features.flatten(1) for features in kept], dim=1)


def _fold(changes: list[tuple[nn.Module, SparseChange]]) -> None:
    for layer, sparse in changes:
        weight = registered(layer, "weight")
        weight.copy_(sparse.add_to(weight))


def contrastive_loss(features_BF: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, equation 2).

    The mean over images with others of their class of -1/|P| sum_P log softmax(z z_p / temperature), z the
    normalised features; the softmax runs over all other images.
    """
    z_BF = F.normalize(features_BF, dim=1)
    itself_BB = torch.eye(len(z_BF), dtype=torch.bool, device=z_BF.device)
    logits_BB = (z_BF @ z_BF.T / temperature).masked_fill(itself_BB, float("-inf"))
    log_softmax_BB = logits_BB.log_softmax(dim=1).masked_fill(itself_BB, 0.0)
    positive_BB = (labels_B[:, None] == labels_B) & ~itself_BB
    counts_B = positive_BB.sum(dim=1)
    losses_B = -(log_softmax_BB * positive_BB).sum(dim=1) / counts_B.clamp(min=1)
    return losses_B.sum() / (counts_B > 0).sum().clamp(min=1)
