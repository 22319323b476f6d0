"""Students without steps: classifiers that are found at once on frozen features, and what methods start from.

Letters: N images, F features, C classes.
"""

import hashlib
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import module_at
from remap.backbones.build import add_tensors
from remap.backbones.families.watching import Layer
from remap.data.stratify import stratified
from remap.data.views import ViewSource
from remap.distributed.launch import accelerator
from remap.engine.evaluation_pass import batch_size_of_evaluation
from remap.engine.job import Job
from remap.engine.state import State
from remap.errors import MissingData, TrainingError
from remap.io.paths import expanded
from remap.network import Network
from remap.pipeline.adjusting import best_factor
from remap.pipeline.components import RunComponents
from remap.pipeline.epoch_recorder import EpochRecorder
from remap.pipeline.probe import fit_probe, last_layers, pooled_features, write_head
from remap.pipeline.sessions import images_of, sessions_of
from remap.pipeline.shared import SharedResources
from remap.progress import Progress
from remap.runs.class_statistics import ClassStatistics
from remap.tuning.finetuning.ranpac import PATH

# Penalties that are tried, as shares of the mean squared length that all images together have along a feature.
PENALTIES = tuple(10.0**power for power in range(-6, 2))


def fit_at_once(
    components: RunComponents, recorder: EpochRecorder, shared: SharedResources, progress: Progress
) -> State:
    """Fit the student's classifier by the recipe's ``train.fit``.

    Class means and ridge regression leave their statistics beside the run. Of a run that is extended, its statistics
    are added; where it has none, they are computed from its images. The penalty, and the scale of the logits, are
    chosen on a fifth of the new training images; then all count.

    Raises:
        MissingData: Statistics of an earlier session are missing, and so are its images.
    """
    if components.recipe.train.fit == "logistic":
        return _by_logistic(components, recorder, progress)
    started = time.perf_counter()
    student, train, classes = components.student, components.recipe.train, len(components.student.classes or ())
    digest = features_digest(student)
    earlier = _earlier(components, digest, shared, progress)

    def statistics(rows: np.ndarray) -> ClassStatistics:
        new = ClassStatistics.of(features_NF[rows], labels_N[rows], classes)
        return new if earlier is None else earlier + new

    features_NF, labels_N = _features(components, components.views.train, "training features", progress)
    weights: Callable[[ClassStatistics, float], np.ndarray] = (
        ClassStatistics.ridge if train.fit == "ridge" else lambda found, _: found.prototypes()
    )
    with progress.wait("fitting the classifier"):
        fit_K, check_K = stratified(labels_N, round(0.8 * len(labels_N)))
        check_K = check_K if len(check_K) else fit_K  # of a single image
        part, check_NF = statistics(fit_K), features_NF[check_K]
        penalty = train.ridge or 0.0
        if train.fit == "ridge" and train.ridge is None:
            penalty = best_penalty(part, check_NF, labels_N[check_K])
        # It changes no answer, only how sure it is; so it is chosen on images that were not fitted, as the penalty is.
        scale = scale_of(check_NF @ weights(part, penalty).T, labels_N[check_K])
        complete = statistics(np.arange(len(labels_N)))
        _write(student, scale * weights(complete, penalty))
    # All processes have seen all images and have the same statistics; one writes them.
    if accelerator().is_main_process:
        complete.save(recorder.run_dir.path, digest)
    how = f"ridge regression, penalty {penalty:.3g}" if train.fit == "ridge" else "class means"
    seconds = time.perf_counter() - started
    progress.say(f"fitted by {how} on {features_NF.shape[1]:,} features in {seconds:.1f} s")
    return _ended(recorder, seconds)


def _by_logistic(components: RunComponents, recorder: EpochRecorder, progress: Progress) -> State:
    """Fit the classifier by logistic regression, as that of a probed teacher."""
    started, student = time.perf_counter(), components.student
    _last_layers(student)  # refuses methods with inputs of their own
    size = batch_size_of_evaluation(components.recipe)
    where = (student, components.views.train, size, progress, "training features")
    features = pooled_features(*where, bf16=components.bf16)
    strength = fit_probe(student, components.views.train, size, progress, features=features)
    seconds = time.perf_counter() - started
    progress.say(
        f"fitted by logistic regression (C = {strength}) on {features[0].shape[1]:,} features in {seconds:.1f} s"
    )
    return _ended(recorder, seconds)


def leave_untrained(job: Job, recorder: EpochRecorder) -> State:
    """Take no step: the words are the classifier, and training images are looked at by methods that begin so."""
    started = time.perf_counter()
    job.student.model.to(job.accelerator.device)
    if job.sample is not None:
        with job.progress.wait(f"{job.recipe.method.name} looks at training images"):
            job.student.attached.prepare(job.sample)
    return _ended(recorder, time.perf_counter() - started)


def _ended(recorder: EpochRecorder, seconds: float) -> State:
    """Evaluate, and return the state at the end of a run without steps."""
    record = {"epoch": 1, **recorder.after_epoch(), "seconds": seconds}
    # No digest: a run that was stopped takes up no state, it is fitted again.
    return State(digest="", epoch=1, seconds=seconds, history=[record])


def features_digest(network: Network) -> str:
    """Return a hash of all that makes the features that the classifier reads."""
    digest = hashlib.sha256(f"{network.identity.sha256} {network.preprocess}".encode())
    # Without the classifier, which is fitted on these features and does not change them.
    add_tensors(digest, {name: t for name, t in network.tensors.items() if not network.anatomy.is_head(name)})
    return digest.hexdigest()


def _earlier(
    components: RunComponents, digest: str, shared: SharedResources, progress: Progress
) -> ClassStatistics | None:
    """Return the statistics of the sessions before this one; None for a first one."""
    if (run := components.recipe.student.extends) is None:
        return None
    sessions = sessions_of(expanded(run))
    # Each session saves its statistics added to those before: the last ones are of all.
    known = ClassStatistics.load(sessions[-1].run.path, digest, len(sessions[-1].classes))
    if known is not None:
        return known
    classes = components.student.classes or ()
    for session in sessions:
        try:
            views = images_of(session, classes, components, shared, progress)
        except MissingData as error:
            raise MissingData(
                f"the images of {session.run.path} are not at hand, and it has no statistics of these features",
                given=error.given,
                do="bring them back, or extend it without them: --how lwf",
            ) from error
        what = f"the features of {len(views.train.split)} earlier images"
        found = ClassStatistics.of(*_features(components, views.train, what, progress), len(classes))
        known = found if known is None else known + found
    return known


def _features(
    components: RunComponents, source: ViewSource, what: str, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the last layer of the classifier reads, float64 (N, F), and labels (N,).

    Of averaged classifiers it is the mean; of those that add up what they make of other features, all of these.
    """
    student, batch_size = components.student, batch_size_of_evaluation(components.recipe)
    layers = _last_layers(student)
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    handles = [layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0])) for layer in layers]
    try:
        pooled_ND, labels_N = pooled_features(student, source, batch_size, progress, what)
    finally:
        for handle in handles:
            handle.remove()
    if not student.anatomy.averaged_heads:
        return pooled_ND, labels_N
    # In the order of the passes, which is that of labels_N.
    inputs = [torch.cat([rows.flatten(1).float().cpu() for rows in found]) for found in seen.values()]
    return torch.stack(inputs).mean(0).double().numpy(), labels_N


def _last_layers(network: Network) -> list[Layer]:
    heads = [module_at(network.model, path) for path in network.anatomy.classifier_heads]
    for head in heads:
        more = [name for name, _ in head.named_children() if name != PATH]
        if isinstance(head, Layer) and more:
            raise TrainingError(
                "the method adds inputs of its own to the classifier, which cannot be fitted at once",
                given=", ".join(more),
                do="train by steps (--how lwf), or take another method",
            )
    return last_layers(network)


@torch.no_grad()
def _write(network: Network, weights_CF: np.ndarray) -> None:
    """Write the classifier, without a bias."""
    if not network.anatomy.averaged_heads:
        write_head(network, weights_CF, np.zeros(len(weights_CF)))
        return
    for path, layer in zip(network.anatomy.classifier_heads, _last_layers(network), strict=True):
        head = module_at(network.model, path)
        if isinstance(head, Layer):  # beside random features its own weight is zero
            for parameter in head.parameters():
                parameter.zero_()
        layer.weight.copy_(torch.from_numpy(weights_CF).view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.zero_()


def best_penalty(found: ClassStatistics, features_NF: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the penalty of the least squared error on other images (RanPAC's code, ``optimise_ridge_parameter``)."""
    wanted_NC = np.equal(labels_N[:, None], np.arange(len(found.counts_C)))

    def error(penalty: float) -> float:
        return float(np.square(features_NF @ found.ridge(penalty).T - wanted_NC).mean())

    return min((share * found.scale for share in PENALTIES), key=error)


def scale_of(logits_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Return what logits are multiplied by for the least cross-entropy, looked for near a deviation of 1."""
    # ``best_factor`` looks between fixed bounds: logits of any size are first brought to a deviation of 1.
    unit = 1.0 / max(float(logits_NC.std(axis=1).mean()), 1e-12)
    return unit * best_factor(torch.from_numpy(unit * logits_NC), torch.from_numpy(labels_N))
