"""What ``remap distill`` and ``remap tune`` print: the run that begins, and the table of the one that has ended."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remap.io.human_size import part, size
from remap.runs.summary_schema import choice_in_words, measured_of, metric_of
from remap_cli import console

if TYPE_CHECKING:
    from remap.recipe import Recipe


def announce(recipe: "Recipe", progress: console.Reporter) -> None:
    """Say on stderr what is going to be trained."""
    from remap.backbones.names import SHORT_NAMES
    from remap.recipe.in_words import behind, losses_in_words

    several = len(recipe.teachers) > 1
    weights = [f" x {spec.weight:g}" if several else "" for spec in recipe.teachers]
    teachers = [("teacher", spec.model, weight) for spec, weight in zip(recipe.teachers, weights, strict=True)]
    for role, word, weight in [*teachers, ("student", recipe.student.model, "")]:
        progress.say(f"{role:8} {word}{_meaning(word, SHORT_NAMES)}{weight}")
    shipped = [word for _, word, _ in [*teachers, ("", recipe.student.model, "")] if word.startswith("mini_")]
    if shipped and recipe.data.source != "digits":
        larger = "--teacher vit_large --student vit_small" if teachers else "--student vit_small"
        progress.say(
            f"note: {' and '.join(dict.fromkeys(shipped))}: shipped to try things out, trained on images of 32 pixels"
            f" (CIFAR-10); for your own photographs name larger models: {larger}"
        )
    chosen = "chosen by trials (auto)" if recipe.choose_losses else losses_in_words(recipe.losses)
    progress.say(f"method   {behind(recipe.method.name, _changed(recipe))}, losses {chosen}")
    if recipe.baseline:
        progress.say("baseline the same student by labels alone, as many steps (--no-baseline: none)")


def _meaning(word: str, short_names: dict[str, str]) -> str:
    own = {"self": "the student's backbone without its tuning", "ema": "the running average of the student"}
    meaning = short_names.get(word) or own.get(word)
    return f" = {meaning}" if meaning else ""


def _changed(recipe: "Recipe") -> dict[str, Any]:
    """Return the options that differ from the method's own defaults; of a combination as ``method.option``."""
    from remap.tuning import config_of

    options = config_of(recipe.method.name)(**recipe.method.options).model_dump(exclude_defaults=True)
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def show(summary: dict[str, Any]) -> None:
    """Print the table of a run that has ended."""
    student, more = summary["student"], summary.get("more_teachers", [])
    teachers = [summary["teacher"], *more] if "teacher" in summary else []
    label_free = "backbone" in student
    share = part(student["trainable_parameters"], student["total_parameters"])
    rows = []
    for number, teacher in enumerate(teachers, start=1):
        accuracy = "-" if teacher["accuracy"] is None else str(measured_of(summary, teacher))
        name = f"teacher {number}" if more else "teacher"
        rows.append([name, accuracy, console.count(teacher["total_parameters"]), "0", "-"])
    if "baseline" in summary:
        rows.append(["labels only", str(measured_of(summary, summary["baseline"])), "", "", ""])
    rows.append(
        [
            f"student + {summary['method']}",
            "-" if label_free or student["accuracy"] is None else str(measured_of(summary, student)),
            console.count(student["total_parameters"]),
            f"{console.count(student['trainable_parameters'])} ({share})",
            size(student["task_bytes"]),
        ]
    )
    data = summary["data"]
    name = metric_of(summary)
    trained = f"trained on {data['train_images']}" if student["trainable_parameters"] else "nothing trained"
    title = f"{Path(data['source']).name}: {name} on {data['val_images']} images, {trained}"
    if label_free or student["accuracy"] is None:
        title = f"{trained} images without labels" if student["trainable_parameters"] else trained
    elif student["trainable_parameters"] and data["labeled_images"] < data["train_images"]:
        title += f" ({data['labeled_images']} with labels)"
    console.table(title, ["", name, "parameters", "trained", "saved size"], rows, right=(1, 2, 3, 4))
    if label_free:
        _show_backbone(summary)
        return
    if "test_accuracy" in student:
        console.line(f"{name} on the test images, looked at once: {student['test_accuracy']:.1%}")
    if "choice" in summary:
        console.line(choice_in_words(summary))
    from remap.pipeline.rule_of_thumb import losing_case  # imports the recipe's schema, which listings do not need

    advice = losing_case(summary)
    if advice is not None:
        console.line(f"note: {advice}")
    run = shlex.quote(summary["run_dir"])
    console.line(
        f"{console.duration(summary['seconds'])} in all. Run: {summary['run_dir']}\n"
        f"next: remap predict {run} IMAGES...   remap eval {run}{'' if data['val_images'] else ' --data FOLDER'}"
    )


def _show_backbone(summary: dict[str, Any]) -> None:
    """Print what a backbone without a classifier is worth, where there are labels, and how it is opened."""
    student, run = summary["student"], summary["run_dir"]
    judged = student.get("judged")
    if judged is not None:
        words = {"knn": "k-NN", "linear_probe": "linear probe"}
        rows = [
            [f"{words[judge]}, {split}", *(f"{judged[when][split][judge]:.1%}" for when in ("before", "after"))]
            for split in judged["after"]
            for judge in words
        ]
        of = ", ".join(f"{found['images']} {split}" for split, found in judged["after"].items())
        title = f"frozen features judged on {Path(summary['data']['source']).name} ({of} images)"
        console.table(title, ["", "before", "after"], rows, right=(1, 2))
    next_ = f"remap tune --student {shlex.quote(run)} --method linear --data FOLDER"
    if student["backbone"] is not None:
        next_ = f"timm.create_model({'local-dir:' + student['backbone']!r}, pretrained=True)   {next_}"
    console.line(f"{console.duration(summary['seconds'])} in all. Run: {run}\nnext: {next_}")
