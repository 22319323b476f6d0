"""What ``remap distill`` and ``remap tune`` do once their words are read."""

import shlex
from pathlib import Path
from typing import Any

from remap.errors import RecipeError
from remap.io.human_size import size
from remap.io.paths import expanded
from remap.pipeline.objective import without_idle_losses
from remap.recipe import Recipe, resolve, resolve_distill
from remap.runs.run_dir import RunDir
from remap_cli import estimates, launch, view


def from_words(
    words: dict[str, Any],
    recipe_word: str | None,
    settings: list[str],
    output: Path | None,
    dry_run: bool,
    json: bool,
    *,
    with_teacher: bool,
) -> None:
    """Resolve the recipe, then run it or estimate it."""
    with view.Reporter(quiet=not launch.is_first()) as progress:
        recipe = read_recipe(words, recipe_word, settings, with_teacher=with_teacher)
        if output is not None and not dry_run and launch.is_first():
            RunDir(output).require_free()
        recipe = without_idle_losses(recipe, progress)
        _say_what(recipe, progress)
        with progress.wait("loading PyTorch"):
            from remap.pipeline.dry_run import estimate
            from remap.pipeline.run import start
        if dry_run:
            found = estimate(recipe, progress)
        else:
            result = start(recipe, output, progress)
    if not launch.is_first():
        return
    if dry_run:
        view.emit(found) if json else estimates.show(found)
    else:
        _show(dict(result.summary), json)


def go_on(path: Path, asked: list[str], json: bool, devices: int | None = None) -> None:
    """Resume a run; its recipe is its own, but the number of processes may be another one."""
    if asked:
        RunDir.open(expanded(path))
        kept = {"output": "a resumed run stays in its own folder"}
        raise RecipeError(
            [f"--{word.replace('_', '-')}: {kept.get(word, 'a resumed run keeps its own recipe')}" for word in asked],
            f"--resume {path}",
            do="go on without these words; or start a new run with the words that you want to change, in another"
            f" folder: remap {_again(path)} WORDS --output FOLDER",
        )
    from remap.pipeline.run import resume

    with view.Reporter(quiet=not launch.is_first()) as progress:
        result = resume(expanded(path), progress, devices or launch.recorded(path))
    if launch.is_first():
        _show(dict(result.summary), json)


def _again(run: Path) -> str:
    """The words for a new run by the recipe of another one."""
    command = "distill" if RunDir(run).recipe().teacher else "tune"
    return f"{command} --recipe {shlex.quote(str(run / 'recipe.yaml'))}"


def read_recipe(words: dict[str, Any], recipe_word: str | None, settings: list[str], *, with_teacher: bool) -> Recipe:
    """The recipe of a training command: ``distill`` starts from the embedded default, ``tune`` has no teacher."""
    recipe = (resolve_distill if with_teacher else resolve)(recipe_word, words, settings)
    if with_teacher and recipe.teacher is None:
        raise RecipeError(["teacher: missing; `remap tune` trains without one"], recipe_word or "command line")
    if not with_teacher and recipe.teacher is not None:
        raise RecipeError(["teacher: `remap tune` has none; use `remap distill`"], recipe_word or "command line")
    return recipe


def _say_what(recipe: Recipe, progress: view.Reporter) -> None:
    from remap.backbones.names import SHORT_NAMES

    several = len(recipe.teachers) > 1
    weights = [f" x {spec.weight:g}" if several else "" for spec in recipe.teachers]
    teachers = [("teacher", spec.model, weight) for spec, weight in zip(recipe.teachers, weights, strict=True)]
    for role, word, weight in [*teachers, ("student", recipe.student.model, "")]:
        progress.say(f"{role:8} {word}{_meaning(word, SHORT_NAMES)}{weight}")
    losses = ", ".join(f"{loss.name} x {loss.weight:g}" for loss in recipe.losses)
    progress.say(f"method   {recipe.method.name}{_changed(recipe)}, losses {losses}")


def _meaning(word: str, short_names: dict[str, str]) -> str:
    own = {"self": "the student's backbone without its tuning", "ema": "the running average of the student"}
    meaning = short_names.get(word) or own.get(word)
    return f" = {meaning}" if meaning else ""


def _changed(recipe: Recipe) -> str:
    """The options that differ from the method's own defaults, which a recipe may have set."""
    from remap.tuning import config_of

    config = config_of(recipe.method.name)
    defaults, own = _flat(config().model_dump()), _flat(config(**recipe.method.options).model_dump())
    pairs = [f"{name} {_plain(value)}" for name, value in own.items() if value != defaults[name]]
    return f" ({', '.join(pairs)})" if pairs else ""


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a combination's parts as ``part.option``."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        found |= inner
    return found


def _plain(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _show(summary: dict[str, Any], json: bool) -> None:
    if json:
        view.emit(summary)
        return
    student, more = summary["student"], summary.get("more_teachers", [])
    teachers = [summary["teacher"], *more] if "teacher" in summary else []
    share = student["trainable_parameters"] / student["total_parameters"]
    rows = []
    for number, teacher in enumerate(teachers, start=1):
        accuracy = "-" if teacher["accuracy"] is None else f"{teacher['accuracy']:.1%}"
        name = f"teacher {number}" if more else "teacher"
        rows.append([name, accuracy, view.count(teacher["total_parameters"]), "0", "-"])
    rows.append(
        [
            f"student + {summary['method']}",
            f"{student['accuracy']:.1%}",
            view.count(student["total_parameters"]),
            f"{view.count(student['trainable_parameters'])} ({share:.1%})",
            size(student["task_bytes"]),
        ]
    )
    data = summary["data"]
    title = f"{Path(data['source']).name}: accuracy on {data['val_images']} images, trained on {data['train_images']}"
    if data["labeled_images"] < data["train_images"]:
        title += f" ({data['labeled_images']} with labels)"
    view.table(title, ["", "accuracy", "parameters", "trained", "to keep"], rows, right=(1, 2, 3, 4))
    if "test_accuracy" in student:
        view.line(f"accuracy on the test folder, looked at once: {student['test_accuracy']:.1%}")
    run = shlex.quote(summary["run_dir"])
    view.line(
        f"{view.duration(summary['seconds'])} in all. Run: {summary['run_dir']}\n"
        f"next: remap predict {run} IMAGES...   remap eval {run}"
    )
