"""What summary.json says of a run."""

from typing import Any

from remap.distributed.device_memory import peak_bytes
from remap.distributed.launch import accelerator
from remap.engine.checkpoint import State
from remap.engine.evaluate import Evaluation
from remap.pipeline.assemble import RunComponents
from remap.progress import Silent
from remap.runs.run_dir import RunDir


def summarize(
    parts: RunComponents, run_dir: RunDir, initial: Evaluation, final: Evaluation, state: State
) -> dict[str, Any]:
    """All that is known once training has ended.

    Args:
        initial, final: Of the student on the evaluation split, before and after training.
    """
    recipe, student, views = parts.recipe, parts.student, parts.views
    summary: dict[str, Any] = {
        "run_dir": str(run_dir.path),
        "recipe": recipe.name,
        "digest": recipe.digest(),
        "seed": recipe.seed,
        "method": recipe.method.name,
        "losses": {loss.name: loss.weight for loss in recipe.losses},
        "learning_rate": recipe.learning_rate(student.anatomy.width),
        "epochs": recipe.train.epochs,
        "processes": accelerator().num_processes,
        "device": str(accelerator().device),
        "precision": "bf16" if parts.bf16 else "fp32",
        "data": {
            "source": views.data.source,
            "classes": len(views.data.classes),
            "train_images": len(parts.lessons.split),
            "labeled_images": round(len(parts.lessons.split) * parts.labeled_share),
            "val_images": len(views.val.split),
            "split": views.data.split_rule,
            "skipped": [list(item) for item in (*views.skipped, *parts.lessons.bad_names())],
            "fingerprint": views.fingerprint(),
            "val_fingerprint": views.contents["val"].fingerprint(Silent(), "evaluation images"),
        },
        "student": {
            "model": student.identity.model,
            "backbone_sha256": student.identity.sha256,
            "accuracy": final.accuracy,
            "correct": final.correct,
            "initial_accuracy": initial.accuracy,
            "trainable_parameters": student.num_trainable,
            "total_parameters": student.num_parameters,
        },
        "train_seconds": round(state.seconds, 2),
        "faults": {
            "skipped_steps": state.skipped,
            "learning_rate_factor": state.lr_factor,
            "accumulation": state.accumulation,
        },
        "peak_memory_bytes": peak_bytes(accelerator().device),
        "final_losses": {k: v for k, v in state.history[-1].items() if k not in ("epoch", "accuracy", "seconds")},
    }
    if parts.inherited is not None:
        summary["student"]["init"] = parts.inherited.to_dict()
    if parts.teachers:
        summary["teacher"] = parts.teachers[0].to_dict()
    if len(parts.teachers) > 1:
        summary["more_teachers"] = [teacher.to_dict() for teacher in parts.teachers[1:]]
    return summary
