"""The last evaluations of a run, and what summary.json says of it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from remap.backbones.kernels import compiled
from remap.data import METRIC
from remap.data.views import listed
from remap.distributed.collectives import share_unreadable
from remap.distributed.device_memory import peak_bytes
from remap.distributed.launch import accelerator
from remap.distributed.sharding import is_sharded
from remap.engine.evaluation import Evaluation
from remap.engine.evaluation_pass import evaluate_as
from remap.engine.metrics import metrics
from remap.engine.selection import described, kept_epoch
from remap.engine.state import State
from remap.io.human_size import number_of
from remap.network import Network
from remap.pipeline.components import RunComponents
from remap.pipeline.computed_once import evaluate_once, measured
from remap.pipeline.epoch_recorder import EpochRecorder
from remap.pipeline.judge_features import Judgement, judge
from remap.progress import Progress, Silent
from remap.runs.interval import Measured


@dataclass(frozen=True)
class FinalEvaluations:
    """Of the tuned student on the evaluation images, and on the test images where there are any.

    Attributes:
        judged: What the features of a student without a classifier are worth; val and test are None then.
    """

    val: Evaluation | None
    test: Evaluation | None
    judged: Judgement | None = None


def evaluate_at_end(
    components: RunComponents, recorder: EpochRecorder, progress: Progress, state: State
) -> FinalEvaluations:
    """Evaluate what has not been evaluated yet: a teacher that changed, and the test images, once."""
    final = _final_evaluations(components, recorder, progress, state)
    # Where images are not held in memory, unreadable ones are found on the way.
    for what, source in components.views.used.items():
        share_unreadable(accelerator(), source)  # each process has found those of its own share
        if bad := source.bad_names():
            progress.say(f"skipped {number_of(len(bad), f'{what} image')} that cannot be read: {listed(bad)}")
    return final


def _final_evaluations(
    components: RunComponents, recorder: EpochRecorder, progress: Progress, state: State
) -> FinalEvaluations:
    recipe, views = components.recipe, components.views
    for number, teacher in enumerate(components.teachers):
        if teacher.spec.learns and components.judges:
            after = evaluate_as(recipe, teacher.network, views.val, progress, "the teacher at the end")
            components.teachers[number] = replace(teacher, accuracy=measured(after), evaluation=after)
    for teacher in components.teachers[:1]:
        if teacher.accuracy is not None and teacher.evaluation is None:
            # A resumed run read its accuracy from a file; which images it is right on stands in none.
            what = "the teacher's answers"
            evaluate = partial(evaluate_as, recipe, teacher.network, views.val, progress, what)
            teacher.evaluation = evaluate_once(recipe, teacher.network, views, evaluate)
    if recipe.label_free:
        return FinalEvaluations(None, None, judge(components, "the student", progress))
    if not components.judges:
        return FinalEvaluations(None, None)
    is_last = kept_epoch(state, recipe.train) == state.epoch
    # A resumed run may have had no epoch left to train.
    # A teacher that was tuned by this run is evaluated on the same images by the next one.
    val = recorder.once(known=recorder.last if is_last else None)
    test = None
    if views.test is not None:
        # The test images are looked at once, after everything else is decided.
        test = evaluate_as(recipe, components.student, views.test, progress, "the test split")
    return FinalEvaluations(val, test)


def summarize(
    components: RunComponents,
    recorder: EpochRecorder,
    untrained: Measured | None,
    final: FinalEvaluations,
    state: State,
) -> dict[str, Any]:
    """Return all that is known once training has ended."""
    recipe, student, views = components.recipe, components.student, components.views
    kept = state.history[kept_epoch(state, recipe.train) - 1]
    trained_on = len(components.training_source.split) - len(components.training_source.bad)
    summary: dict[str, Any] = {
        "run_dir": str(recorder.run_dir.path),
        "recipe": recipe.name,
        # Comparisons and repeats find a run by it.
        "digest": recipe.digest(),
        "seed": recipe.seed,
        "method": recipe.method.name,
        # What "accuracy" is everywhere below; not there in the summaries of earlier versions.
        "metric": METRIC[recipe.data.task],
        "losses": {loss.name: loss.weight for loss in recipe.losses},
        "learning_rate": recipe.learning_rate(student.anatomy.width),
        "epochs": recipe.train.epochs,
        "optimizer": recipe.train.optimizer,
        "processes": accelerator().num_processes,
        "device": str(accelerator().device),
        "precision": "bf16" if components.bf16 else "fp32",
        "kernels": _kernels(components),
        "data": {
            "source": views.data.source,
            "classes": len(views.data.classes),
            "train_images": trained_on,
            "labeled_images": round(trained_on * components.labeled_share),
            "val_images": len(views.val.split) - len(views.val.bad) if final.val is None else final.val.count,
            "split": views.data.split_rule,
            **({"value_range": list(ends)} if (ends := views.view.pixels.value_range) else {}),
            "skipped": [list(item) for item in (*views.skipped, *views.unreadable_later)],
            "fingerprint": views.fingerprint(),
            # `remap eval` says by it whether it evaluates the same images.
            "val_fingerprint": views.contents["val"].fingerprint(Silent(), "evaluation images"),
        },
        "student": {
            "model": student.identity.model,
            "backbone_sha256": student.identity.sha256,
            **_accuracy(components, untrained, final, recorder.judged_before),
            "trainable_parameters": 0 if recipe.train.fit == "none" else student.num_trainable,
            "total_parameters": student.num_parameters,
            "flops": forward_flops(student),
        },
        "train_seconds": round(state.seconds, 2),
        "faults": {
            "skipped_steps": state.skipped,
            "learning_rate_factor": state.lr_factor,
            "accumulation": state.accumulation,
        },
        "peak_memory_bytes": peak_bytes(accelerator().device),
        "final_losses": {name: value for name, value in kept.items() if name in ("loss", *components.objective.terms)},
    }
    if views.selection is not None and recipe.train.selects:
        summary["choice"] = described(state, recipe.train, len(views.selection.split))
    if recipe.train.ema is not None:
        summary["ema"] = recipe.train.ema
    if final.test is not None:
        test = measured(final.test)
        summary["student"] |= {"test_accuracy": test.value, "test_interval": list(test[1:])}
    terms: Any = components.objective.terms  # a ModuleDict does not say what its modules are
    taught = {name: [list(pair) for pair in term.blocks] for name, term in terms.items() if term.blocks}
    if taught and components.teachers:
        depths = {"student": student.anatomy.depth, "teacher": components.teachers[0].network.anatomy.depth}
        summary["blocks"] = {"pairs": taught, **depths}
    if components.init is not None:
        summary["student"]["init"] = components.init.to_dict()
    if components.teachers:
        # Of a teacher that the student has overtaken, after which epoch, and how much of its weight is left.
        left = {
            int(number): {"overtaken": state.overtaken[number], "weight_left": share}
            for number, share in state.teacher_shares.items()
        }
        summary["teacher"], *more = (
            teacher.to_dict() | left.get(number, {}) for number, teacher in enumerate(components.teachers)
        )
        if more:
            summary["more_teachers"] = more
    return summary


def _kernels(components: RunComponents) -> dict[str, str]:
    """Return which kernels ran the networks, and why."""
    networks = {"student": components.student}
    networks |= {f"teacher{number or ''}": one.network for number, one in enumerate(components.teachers)}
    found = {f"attention of the {name}": network.attention_kernel for name, network in networks.items()}
    spec, device = components.recipe.train, accelerator().device.type
    on, why = compiled(spec.compile, device, components.steps, checkpointed=spec.checkpoint_blocks)
    return {**found, "blocks": f"{'compiled' if on else 'not compiled'}: {why}"}


def forward_flops(student: Network) -> int | None:
    """Return the floating-point operations of a forward pass of one image; None where they cannot be counted.

    As ``torch.utils.flop_counter`` counts them: two for each multiply-add of products and convolutions.
    """
    modules = student.model.modules()
    if is_sharded(student) or any(getattr(one, "_compiled_call_impl", None) is not None for one in modules):
        return None
    pixels = torch.zeros(1, *student.preprocess.shape, device=next(student.model.parameters()).device)
    try:
        with FlopCounterMode(display=False) as counter:  # which follows gradients, and cannot without
            student.model(pixels)
    except (RuntimeError, AssertionError):  # a figure that cannot be counted must not cost the run
        return None
    return counter.get_total_flops()


def _accuracy(
    components: RunComponents, untrained: Measured | None, final: FinalEvaluations, before: Judgement | None
) -> dict[str, Any]:
    """Return the accuracy before and after: of the classifier, or of a linear probe; None where there are no labels.

    Intervals are those of 95 %.
    """
    if final.val is not None and untrained is not None:
        labels, teachers = components.views.val.split.labels, components.teachers
        teacher = teachers[0].evaluation if teachers else None
        return {
            "accuracy": final.val.merit,
            "interval": list(measured(final.val)[1:]),
            "correct": final.val.correct,
            "initial_accuracy": untrained.value,
            "initial_interval": list(untrained[1:]),
            "metrics": metrics(final.val, labels, teacher),
        }
    if final.judged is None or before is None:
        return {"accuracy": None, "correct": None, "initial_accuracy": None}
    first, last = before["val"], final.judged["val"]
    return {
        "accuracy": last["linear_probe"],
        "correct": round(last["linear_probe"] * last["images"]),
        "initial_accuracy": first["linear_probe"],
        "judged": {"before": before, "after": final.judged},
    }
