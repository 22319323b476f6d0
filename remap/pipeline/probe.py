"""A linear classifier fitted on features: the quickest way to give a teacher these classes, or to judge a backbone."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, module_at
from remap.backbones.families.watching import Layer
from remap.backbones.typed import input_channels, inputs_of
from remap.cache.passes import run_in_passes
from remap.data.thread_pool import made_ahead
from remap.data.views import ViewSource
from remap.distributed.interrupts import defer_signals, raise_if_interrupted
from remap.distributed.launch import accelerator
from remap.errors import BackboneError, DataError
from remap.network import Network, Runner
from remap.pipeline.logistic import STRENGTHS, EachClass, Probe, fit_each_class, fit_logistic
from remap.progress import Progress
from remap.remapping.signals import Needs


def fit_probe(
    network: Network,
    source: ViewSource,
    batch_size: int,
    progress: Progress,
    *,
    bf16: bool = False,
    features: tuple[np.ndarray, np.ndarray] | None = None,
) -> float:
    """Fit the classifier by logistic regression (scikit-learn, L-BFGS) on standardised pooled features.

    Where an image has any number of classes, by one for each class against the rest.
    Of a classifier with hidden layers (MetaFormer's) the last layer is fitted, on what the others make of the features.
    The penalty is chosen on a held-out fifth of the training images; the evaluation split is never looked at.

    Args:
        batch_size: Images of a pass. All passes are as large, so that the features are those of a training step.
        bf16: Whether that runs the network under bfloat16 autocast.
        features: ``pooled_features`` of these images, where they are known.

    Returns:
        The chosen inverse strength of the penalty.

    Raises:
        DataError: Fewer than two classes have readable images.
    """
    features_ND, labels_N = features or pooled_features(
        network, source, batch_size, progress, "teacher features", bf16=bf16, filled=True
    )
    if len(np.unique(labels_N)) < 2:
        raise DataError("a head needs readable training images of two classes at least", do="repair the images")
    features_ND = _into_last_layer(network, features_ND)
    with progress.wait("fitting the classifier", len(STRENGTHS) + 1) as step:
        fit: Callable[..., Probe | EachClass] = fit_logistic if labels_N.ndim == 1 else fit_each_class
        probe = fit(features_ND, labels_N, step)
    write_head(network, *probe.rows(len(network.classes or ())))
    return probe.strength


def pooled_features(
    network: Network, source: ViewSource, batch_size: int, progress: Progress, what: str, **how: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features that enter the classifier, float64 (N, D), and labels (N,), of all readable images.

    Args:
        what: Which features these are, for messages.
        how: As for ``signals_of``.
    """
    features_ND, readable = signals_of(network, source, batch_size, progress, what, pooled=True, **how)
    return features_ND, source.split.labels[readable]


@torch.no_grad()
def signals_of(
    network: Network,
    source: ViewSource,
    batch_size: int,
    progress: Progress,
    what: str,
    *,
    pooled: bool,
    bf16: bool = False,
    filled: bool = False,
    at_most: int | None = None,
) -> tuple[np.ndarray, NDArray[np.int64]]:
    """Return pooled features or else logits, float64 (N, D or C), of all readable images, and which these are (N,).

    Args:
        bf16: Whether the network runs under bfloat16 autocast.
        filled: Fill the last batch up to ``batch_size``, as ``run_in_passes`` does.
        at_most: Look at so many images, evenly spaced; None looks at all.

    Raises:
        DataError: None of them can be read.
    """
    network.model.eval()
    runner = Runner(network, Needs(pooled=pooled), bf16=bf16)

    def run(images: Tensor) -> dict[str, Tensor]:
        found = runner(images.to(accelerator().device))
        # float32, since NumPy has no bfloat16.
        return {"rows": (found.pooled_BD if pooled else found.logits_BC).float().cpu()}

    rows, readable, count = [], [], len(source.split)
    # Evenly over the listing, which is in order of names: the first images may all be of one kind.
    chosen = np.linspace(0, count - 1, min(count, at_most or count)).astype(np.int64)
    chunks = (chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size))
    # A signal is deferred to the check in the loop, where all processes learn of it and leave together.
    with defer_signals(), progress.wait(what, len(chosen)) as step:
        for indices, (images, good) in made_ahead(source.batch, chunks):
            raise_if_interrupted(accelerator(), f"{what} were being computed")
            if len(good):
                rows.append(run_in_passes(run, images, batch_size if filled else len(images))["rows"].numpy())
                readable.append(good)
            step.advance(len(indices))
    runner.tap.close()
    if not rows:
        raise DataError(f"none of the {len(chosen):,} images can be read", do="repair the images")
    return np.concatenate(rows).astype(np.float64), np.concatenate(readable)


@torch.no_grad()
def _into_last_layer(network: Network, features_ND: np.ndarray) -> np.ndarray:
    """Return what the classifier's last layer is given: hidden layers in front of it stay as they were drawn."""
    head = module_at(network.model, network.anatomy.classifier_heads[0])
    if isinstance(head, Layer):
        return features_ND
    last = last_layer(head)
    # Caught on the way in: classifiers differ in what stands in front of their last layer.
    with inputs_of(last) as seen:
        head(torch.from_numpy(features_ND).to(last.weight))
    return seen[0].cpu().double().numpy()


def fitted_tensors(network: Network) -> list[Tensor]:
    """Return the parameters that ``fit_probe`` writes."""
    return [parameter for layer in last_layers(network) for parameter in layer.parameters()]


def last_layer(head: nn.Module) -> Layer:
    """Return a classifier itself, or the last layer of one with hidden layers."""
    return [module for module in head.modules() if isinstance(module, Layer)][-1]


def last_layers(network: Network) -> list[Layer]:
    """Return the ``last_layer`` of each classifier."""
    return [last_layer(module_at(network.model, path)) for path in network.anatomy.classifier_heads]


@torch.no_grad()
def write_head(network: Network, weight_CD: np.ndarray, bias_C: np.ndarray) -> None:
    """Write a linear map of the pooled features; of joined features each classifier gets its own columns."""
    model, anatomy, weight, bias = network.model, network.anatomy, torch.from_numpy(weight_CD), torch.from_numpy(bias_C)
    heads = last_layers(network)
    if any(head.bias is None for head in heads):
        do = "train it by steps: that of a teacher by teacher.prepare=full, a student by train.fit=gradient"
        raise BackboneError("a head cannot be fitted: the classifier has no bias", do=do)
    # The mean of classifiers that all have the whole map is that map.
    parts = [(weight, bias)] * len(heads)
    if not anatomy.averaged_heads:
        ends = list(accumulate(head.weight[0].numel() for head in heads))
        columns = [weight[:, start:end] for start, end in zip([0, *ends], ends, strict=False)]
        # Measured before anything is written, since `_share` overwrites all classifiers.
        shares = [_share(model, anatomy, heads, head) for head in heads]
        parts = [(part / share, bias * 0) for part, share in zip(columns, shares, strict=True)]
        # Logits are added up, so that one of the classifiers has the constant.
        parts[0] = (parts[0][0], bias / shares[0])
    for head, (rows, constant) in zip(heads, parts, strict=True):
        assert head.bias is not None
        # No columns are left for a classifier of tokens beside that of the pooled features (VOLO): it says nothing.
        head.weight.copy_(rows.view_as(head.weight) if rows.numel() else torch.zeros_like(head.weight))
        head.bias.copy_(constant)


def _share(model: nn.Module, anatomy: Anatomy, heads: Sequence[Layer], head: Layer) -> float:
    """Return what each logit of a network grows by with that of one of its classifiers, which it adds up."""
    for other in heads:
        assert other.bias is not None
        # Weights of 0 and one bias of 1: for any image, what comes out is the factor.
        other.weight.zero_()
        other.bias.fill_(float(other is head))
    images = head.weight.new_zeros(1, input_channels(model), *anatomy.image_size)
    return float(model(images).mean())
