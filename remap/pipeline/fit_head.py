"""Give a teacher a linear head for these classes: read from the cache, or fitted on its features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remap.distributed.launch import accelerator, use_bf16
from remap.io.versions import version_of
from remap.network import Network
from remap.pipeline import probe
from remap.pipeline.computed_once import digest_of_network
from remap.pipeline.data_views import DataViews
from remap.pipeline.nested_runs import require_unlinked
from remap.pipeline.one_pass import OnePass
from remap.pipeline.shared import SharedResources
from remap.pipeline.stored_teacher import PROBE, StoredTeacher
from remap.pipeline.teacher_tuning import title_of
from remap.progress import Progress
from remap.recipe.schema import Recipe, TeacherSpec
from remap.runs.task import save_task, task_tensors


class LabeledFeatures:
    """Features of the labelled training images, computed when the first head is fitted on them.

    Args:
        run_once: Runs the teacher over the training images, where its outputs are cached and one pass serves for both.

    Attributes:
        batch: Images of a pass.
        once: That pass, once features were wanted; None where there was none.
    """

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        views: DataViews,
        progress: Progress,
        run_once: Callable[[], OnePass | None],
    ) -> None:
        self.bf16 = use_bf16(recipe.train.precision, accelerator().device)
        # The pass of a training step in one process, for any number of them.
        images = min(recipe.train.batch_size, len(views.training_source.split))
        self.batch = max(1, images // recipe.train.accumulation)
        self.once: OnePass | None = None
        self._network, self._views, self._progress, self._run_once = network, views, progress, run_once
        self._found: tuple[np.ndarray, NDArray[np.int64]] | None = None

    def of(self, images: NDArray[np.int64] | None) -> tuple[np.ndarray, np.ndarray]:
        """Return features, float64 (N, D), and labels (N,) of all readable images, or of those among ``images``.

        Args:
            images: Numbers in the listing of all labelled training images, ``DataViews.data.train``.
        """
        if self._found is None:
            self.once = self._run_once()
            self._found = self._compute() if self.once is None else self.once.features(self._views)
        features_ND, readable = self._found
        labels_N = self._views.train.split.labels[readable]
        if images is None:
            return features_ND, labels_N
        chosen = np.isin(self._views.readable[readable], images)
        return features_ND[chosen], labels_N[chosen]

    def _compute(self) -> tuple[np.ndarray, NDArray[np.int64]]:
        where = (self._network, self._views.train, self.batch, self._progress, "teacher features")
        return probe.signals_of(*where, pooled=True, bf16=self.bf16, filled=True)


def fit_head(
    network: Network,
    spec: TeacherSpec,
    recipe: Recipe,
    folder: Path,
    views: DataViews,
    progress: Progress,
    shared: SharedResources,
    features: LabeledFeatures,
    fold: int = 0,
    images: NDArray[np.int64] | None = None,
) -> None:
    """Store a teacher with its head as a task, and in the cache for later runs.

    Args:
        folder: Where the task is stored.
        views: The images it is fitted on.
        features: Of these images, and of others where ``images`` chooses among them.
        fold: Which fold of the images it is fitted without; 0 is none.
    """
    require_unlinked(folder)

    # A function, since hashes are computed only where the cache is used (``StoredTeacher.made_by``).
    def key() -> dict[str, Any]:
        return {
            "teacher": network.identity.model,
            "method": PROBE,
            # Without what is fitted, which the seed draws.
            "network": digest_of_network(network, without=probe.fitted_tensors(network)),
            "classes": list(network.classes or ()),
            "images": views.train.contents.fingerprint(progress, "training images"),
            "batch": features.batch,
            "view": views.view.to_dict(),
            "precision": "bf16" if features.bf16 else "fp32",
            "attention": recipe.train.fused_attention,
            "scikit-learn": version_of("scikit-learn"),  # another version of its solver ends at other bits
        }

    stored = StoredTeacher.made_by(key, {"training": views.train.contents}, spec, shared, progress)
    title, classes = title_of(spec, recipe), len(views.data.classes)
    if stored.fetch(folder, title):
        return
    progress.say(
        f"{title} has no head for these {classes} classes: fitting one"
        if not fold
        else f"{title}: fitting a head without fold {fold} of {spec.folds}"
    )
    strength = probe.fit_probe(
        network, views.train, features.batch, progress, bf16=features.bf16, features=features.of(images)
    )
    # In every process: tensors of a sharded network are gathered from all of them.
    tensors = task_tensors(network)
    if accelerator().is_main_process:
        save_task(folder / "task", network, views.view, "linear", {}, tensors)
        stored.store(folder)
    progress.say(f"fitted by logistic regression on the teacher's features (C = {strength})")
