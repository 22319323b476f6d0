"""What networks are worth before training: computed once, and read back where a run is resumed."""

import hashlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from remap.backbones.build import add_tensors
from remap.distributed.launch import accelerator, broadcast_str
from remap.distributed.sharding import gather_full
from remap.engine.evaluation import Evaluation
from remap.engine.evaluation_pass import batch_size_of_evaluation
from remap.engine.multilabel import SetEvaluation
from remap.errors import RunError
from remap.io import atomic_write
from remap.io.checked_read import read_regular
from remap.io.sealed_json import parse_sealed, sealed_text
from remap.network import Network
from remap.pipeline.data_views import DataViews
from remap.recipe.schema import Recipe
from remap.runs.interval import Measured, share_of
from remap.runs.run_records import JUDGED

Figure = TypeVar("Figure")
# Accuracies, those with their intervals, and what ``remap.pipeline.judge_features`` returns.
_FIGURES = TypeAdapter(
    dict[str, float | list[float] | dict[str, dict[str, float]] | None],
    config=ConfigDict(strict=True, allow_inf_nan=False),
)
_MOST_BYTES = 2**20


def digest_of_network(network: Network, without: Collection[Tensor] = ()) -> str:
    """Return a hash that is equal for networks with equal outputs: of weights, structure and input.

    Args:
        without: Tensors that do not count.
    """
    parts = (network.identity.sha256, network.preprocess, network.anatomy, network.model)
    # The repr of a module shows its structure: heads and patch size do not show in the weights.
    digest = hashlib.sha256(" ".join(map(repr, parts)).encode())
    tensors = {name: tensor for name, tensor in network.tensors.items() if all(tensor is not one for one in without)}
    # Gathered, so that a sharded network has the same hash on any number of processes.
    add_tensors(digest, {name: gather_full(tensor) for name, tensor in tensors.items()})
    return digest.hexdigest()


def evaluate_once(recipe: Recipe, network: Network, views: DataViews, evaluate: Callable[[], Evaluation]) -> Evaluation:
    """Return a network's evaluation on the evaluation images; computed where this process has none of it."""
    how = f"{recipe.train.precision} {recipe.train.fused_attention} {batch_size_of_evaluation(recipe)}"
    # Precision, attention kernel and shape of a pass may decide the last bits, so they belong to the key.
    key = f"{digest_of_network(network)} {how}"
    if key not in views.evaluations:
        views.evaluations[key] = evaluate()
    return views.evaluations[key]


def judged_once(folder: Path, what: str, of: str, compute: Callable[[], Figure]) -> Figure:
    """Return a figure of judged.json in a folder; if it is not there, compute it and write it. All processes call it.

    Args:
        what: Which figure, in words.
        of: All that decides it: recipe, images, weights.

    Raises:
        RunError: The file is damaged, or cannot be written.
    """
    path, key = folder / JUDGED, f"{what} {hashlib.sha256(of.encode()).hexdigest()[:16]}"
    main = accelerator().is_main_process
    # One process reads for all: if they saw different files, some would wait in the collective calls of `compute`.
    known = json.loads(broadcast_str(json.dumps(_read(path) if main else {})))
    if key not in known:
        known[key] = compute()
        if main:
            atomic_write.make_folder(folder)
            atomic_write.write_text(path, sealed_text(known))
    return known[key]


def measured(found: Evaluation) -> Measured:
    """Return the figure that networks are compared by with its interval: Wilson's, or of mAP the bootstrap's."""
    if isinstance(found, SetEvaluation):
        return Measured(found.merit, *found.interval())
    return share_of(found.merit, found.count)


def measured_once(folder: Path, what: str, of: str, evaluate: Callable[[], Evaluation]) -> Measured:
    """Return the figure of an evaluation with its interval as ``judged_once`` does."""
    return Measured(*judged_once(folder, f"{what}, with its interval,", of, lambda: list(measured(evaluate()))))


def _read(path: Path) -> dict[str, object]:
    # Not `exists`: a link that leads nowhere is refused below, and not replaced by a file.
    if not os.path.lexists(path):
        return {}
    try:
        values, sealed = parse_sealed(read_regular(path, _MOST_BYTES))
        if not sealed:
            raise ValueError("it has no SHA-256 of its own")
        _FIGURES.validate_python(values)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, ValidationError):
            reason = "it holds something other than shares"
        raise RunError(f"cannot read {path}: {reason}", do="remove it, and what it holds is computed again") from error
    return values
