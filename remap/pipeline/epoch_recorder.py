"""Metrics while a run lasts: evaluated and recorded after each epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

from remap.cache.frozen_features import FrozenFeatures
from remap.data import metric_in
from remap.data.views import ViewSource
from remap.distributed.collectives import share_unreadable
from remap.distributed.launch import accelerator
from remap.engine.callback import Callback
from remap.engine.evaluation import Evaluation
from remap.engine.evaluation_pass import evaluate_as
from remap.engine.selection import SELECTION, selection_metric
from remap.engine.state import State, digest_of
from remap.errors import RunError
from remap.pipeline.components import RunComponents
from remap.pipeline.computed_once import evaluate_once, judged_once, measured_once
from remap.pipeline.judge_features import Judgement, judge
from remap.pipeline.run_status import RunClock
from remap.progress import Progress
from remap.remapping.schedule import is_scheduled
from remap.runs.hardware import machine
from remap.runs.interval import Measured
from remap.runs.run_dir import RunDir


class EpochRecorder:
    """Evaluates the student after each epoch, and writes the metrics that a run directory shows while the run lasts.

    Attributes:
        last: The student's evaluation after the newest epoch that was trained here; None before, and of a student
            without a classifier.
        judged_before: What the features of such a student were worth before training.
    """

    def __init__(
        self,
        components: RunComponents,
        features: Mapping[str, FrozenFeatures],
        run_dir: RunDir,
        clock: RunClock,
        progress: Progress,
        callbacks: Callback,
    ) -> None:
        self.components, self.run_dir = components, run_dir
        self.features, self.selection_features = features.get("val"), features.get("selection")
        self.clock, self.progress, self.callbacks = clock, progress, callbacks
        self.last: Evaluation | None = None
        self.judged_before: Judgement | None = None
        # Now: while it trains, a run may have half of the threads, and its baseline the others.
        self._machine = machine()

    def before(self) -> Measured | None:
        """Return the untrained student's accuracy, computed once in a run.

        One without a classifier is judged by its features, where there are labels.
        """
        parts, what = self.components, "the network before training"
        # All that decides the figure, so that one of other images or weights is not read back.
        of = digest_of(parts.recipe, parts.views.digest(self.progress), parts.weights_digest())
        if parts.judges:
            return measured_once(self.run_dir.path, what, of, lambda: self.once(what))
        if parts.recipe.label_free:
            self.judged_before = judged_once(self.run_dir.path, what, of, lambda: judge(parts, what, self.progress))
        return None

    def evaluate(
        self, title: str = "the student", source: ViewSource | None = None, features: FrozenFeatures | None = None
    ) -> Evaluation:
        """Evaluate the student on images; by default on the evaluation images."""
        parts = self.components
        if source is None:
            source, features = parts.views.val, self.features
        return evaluate_as(parts.recipe, parts.student, source, self.progress, title, features)

    def once(self, title: str = "the student", known: Evaluation | None = None) -> Evaluation:
        """Evaluate the student as it is on the evaluation images, unless that is known."""
        parts = self.components
        return evaluate_once(parts.recipe, parts.student, parts.views, lambda: known or self.evaluate(title))

    def after_epoch(self) -> dict[str, float]:
        """Refuse too many unreadable training images, then return the metrics of a student that has a classifier."""
        views = self.components.views
        for source in (views.train, views.unlabeled):
            if source is not None:  # each process has found those of its own share
                share_unreadable(accelerator(), source)
        views.require_few_bad(self.components.recipe.data.max_bad)
        if not self.components.judges:
            return {}
        self.last = self.evaluate()
        loss = "val_bce" if self.components.recipe.data.multilabel else "val_ce"
        found = {self.last.metric: self.last.merit, loss: self.last.loss}
        if (chosen_by := views.selection) is not None and self.components.recipe.train.selects:
            what = "the student on selection images"
            answers = self.evaluate(what, chosen_by, self.selection_features)
            found[SELECTION] = selection_metric(self.components.recipe.train.metric, answers, chosen_by.split.labels)
        return found

    def evaluate_last(self, state: State) -> None:
        """Put the figures of a classifier that was changed after the last step in the place of those before it."""
        found = self.after_epoch()
        state.history[-1] |= found
        if name := metric_in(found):
            self.progress.say(f"{name} with the classifier that is saved: {found[name]:.1%}")

    def record_epoch(self, step: int, history: Sequence[dict[str, Any]]) -> None:
        """Write the metrics so far, and say the last. A full disk does not end a run: they are written again later.

        Args:
            step: The number of the last step.
        """
        self.progress.say(epoch_line(history, self.components.recipe.train.epochs))
        try:
            self.run_dir.write_metrics(list(history))
            # Status carries the time so far: a run that is killed later resumes from it.
            self.run_dir.set_status("running", seconds=self.clock.seconds)
        except RunError as error:
            self.progress.say(f"the metrics of this epoch are not written yet: {error.what}")
        # Last: a callback may end the run, and the files are written by then.
        self.callbacks.on_epoch(step, history[-1])

    def record_resume(self, state: State, steps: int) -> None:
        """Record on which machine the run resumes, and say where."""
        self.record_machine()
        epochs = self.components.recipe.train.epochs
        self.progress.say(
            f"resuming after step {state.epoch * steps + state.step} of {epochs * steps}"
            f" ({state.epoch} of {epochs} epochs are done)"
        )

    def record_machine(self) -> None:
        """Add this machine to the environment of a resumed run."""
        if accelerator().is_main_process:
            self.run_dir.note_machine(self._machine, resuming=True)


def epoch_line(history: Sequence[dict[str, Any]], epochs: int) -> str:
    """Return the newest epoch in one line: losses, accuracy and the best so far, and its seconds of training."""
    # Records have the seconds since the start of training; the line has those of the epoch.
    last, earlier = history[-1], history[-2]["seconds"] if len(history) > 1 else 0.0
    name = metric_in(last)
    others = ("epoch", "loss", name, "val_ce", "val_bce", SELECTION, "seconds")
    terms = {term: value for term, value in last.items() if term not in others and not is_scheduled(term)}
    parts = [f"loss {last['loss']:.4g}"] if "loss" in last else []
    if parts and len(terms) > 1:
        parts[0] += f" ({', '.join(f'{term} {value:.3g}' for term, value in terms.items())})"
    if name is not None:
        best = max((one for one in history if name in one), key=lambda one: one[name])
        where = "" if best is last else f" (epoch {best['epoch']})"
        parts += [f"{name} {last[name]:.1%}", f"best {best[name]:.1%}{where}"]
    if SELECTION in last:
        parts.append(f"selection {last[SELECTION]:.4g}")
    parts.append(f"{last['seconds'] - earlier:.1f} s")
    return f"epoch {last['epoch']}/{epochs}: {', '.join(parts)}"
