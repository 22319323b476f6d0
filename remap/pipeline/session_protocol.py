"""``remap compare --sessions``: ways of learning classes session by session, under one protocol and several seeds."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

from remap.data.augmentation import Augmentation
from remap.errors import RecipeError, RunError
from remap.io import atomic_write
from remap.io.human_size import number_of
from remap.io.names import plain
from remap.pipeline.compare import resumable
from remap.pipeline.comparison_files import percent
from remap.pipeline.comparison_folder import require_folder
from remap.pipeline.extend import extend
from remap.pipeline.labels_only import labels_only
from remap.pipeline.run import Result, resume, start
from remap.pipeline.session_advice import ALONE, AT_ONCE, METHOD_WAYS, WAYS, WITH_MEMORY, closed_to
from remap.pipeline.session_split import FOLDERS, joint_data, name_of, parts_of
from remap.pipeline.shared import SharedResources
from remap.progress import Progress, Within
from remap.recipe import Recipe
from remap.recipe.schema import DataSpec, MethodSpec
from remap.recipe.train_checks import require_no_processes, train_problems
from remap.runs.run_dir import RunDir
from remap.tuning import config_of

RECORD = "sessions.json"
JOINT = "joint"
DEFAULT_WAYS = (*(way for way in WAYS if way not in METHOD_WAYS), JOINT)
SHOWN = ("overall", "average", "forgetting")
FIGURES = (*SHOWN, "last", "backward_transfer", "forward_transfer", "calibration_old", "calibration_new")
COSTS = ("seconds", "bytes")
# How training images are changed before they are seen.
LOOKS = {*Augmentation.model_fields, "augment", "views", "mixup", "cutmix", "mix_probability"}


def compare_sessions(
    recipe: Recipe,
    split: str,
    methods: Sequence[str],
    ways: Sequence[str],
    seeds: int,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Learn the classes of one data set session by session in each way, and tabulate.

    The first session is a run on the first classes, which all ways extend; "joint" is a run on all classes at once.

    Args:
        split: A number of sessions, or the classes of each: "cat,dog/bird"; or "folders", each folder in that of the
            data a session with a look of its own of the same classes.
        methods: How the student of the first session is tuned.
        ways: Of ``WAYS``; "lwf:20" has a memory of 20 images a class, "lwf:20:bias" corrects the bias of the classifier
            by it. Those that are methods have a first session of their own.
        folder: Finished runs in it are not run again.

    Returns:
        The content of sessions.json: for each way its figures (``remap.runs.session_figures``), seconds and bytes of
        the sessions behind the first, each with mean, spread and 95 % interval over seeds (Student's t), and the matrix
        of accuracies of each seed.

    Raises:
        RemapError: Anything a user can mend.
    """
    if recipe.data.multilabel:
        raise RecipeError(["task: multilabel: sessions are learned for one class an image"], recipe.name)
    require_folder(folder)
    require_no_processes(recipe, "remap compare --sessions")
    # Ways bring their own teacher: of lwf it is the run that is extended.
    base, shared = labels_only(recipe), SharedResources()
    parts = parts_of(base.data, split, shared)
    pairs = _pairs(methods, ways, same_classes=split == FOLDERS)
    specs = {method: _method(base.method, method, len(parts)) for method, _ in pairs}
    recipes = {method: base.model_copy(update={"method": spec}) for method, spec in specs.items()}
    # For all methods before the first run: else a mistake is found after hours of training.
    if problems := [problem for one in recipes.values() for problem in train_problems(one)]:
        raise RecipeError(problems, recipe.name)
    closed = {
        why: word
        for method, word in pairs
        if (way := _way(word)[0]) != JOINT
        and (why := closed_to(way, method, specs[method].options, new_classes=split != FOLDERS))
    }
    if closed:
        problems = [f"--methods: {why} (leave it out, or the way {word})" for why, word in closed.items()]
        raise RecipeError(problems, "compare")
    if split == FOLDERS and JOINT in ways:
        data = joint_data(base.data, parts, folder / f"{JOINT}.csv", shared)
        recipes = {method: one.model_copy(update={"data": data}) for method, one in recipes.items()}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    with resumable(folder):
        for seed in range(recipe.seed, recipe.seed + seeds):
            for method, way in pairs:
                of_seed = recipes[method].model_copy(update={"seed": seed})
                # Ways of one method and seed share a folder, and in it the first session that they all extend.
                at, title = folder / method / f"seed-{seed}", Within(progress, f"{method}, seed {seed}")
                found[method, way].append(_sessions(of_seed, way, parts, at, title))
    rows = [{"method": method, "way": way, **_over_seeds(found[method, way])} for method, way in pairs]
    sessions = [name_of(one) for one in parts]
    table = {"data": base.data.source, "sessions": sessions, "seeds": seeds, "rows": rows, "output": str(folder)}
    atomic_write.write_json(folder / RECORD, table)
    atomic_write.write_text(folder / "sessions.md", markdown(table))
    return table


def _way(word: str) -> tuple[str, int, bool]:
    """Read "lwf:20:bias" as a way, a number of images a class, and whether the bias is corrected by them."""
    way, *more = word.split(":")
    memory, bias = (more[0] if more else "0"), more[1:] == ["bias"]
    # `bias` is 1 where it is corrected: that takes an old image of each class at least.
    known = way in (*WAYS, JOINT) and memory.isdecimal() and int(memory) >= bias
    if not known or len(more) > 1 + bias or (more and way not in WITH_MEMORY):
        allowed = f"{', '.join((*WAYS, JOINT))}, lwf:20, lwf:20:bias"
        raise RecipeError([f"--ways: unknown word '{word}' (allowed: {allowed})"], "compare")
    return way, int(memory), bias


def _pairs(methods: Sequence[str], ways: Sequence[str], *, same_classes: bool) -> list[tuple[str, str]]:
    """Return the rows of the table, each a method and a way; ways that are methods go with themselves.

    Raises:
        RecipeError: A way is unknown, or learns no new classes, or does not go on from a method.
    """
    words = [(word, _way(word)[0]) for word in ways]
    if misfit := {"ease" if same_classes else "domains"} & {way for _, way in words}:
        what = "new classes, and these are the same" if same_classes else "a new look of the same classes"
        raise RecipeError([f"--ways: {misfit.pop()} is for {what} (see --sessions)"], "compare")
    if same_classes and (biased := [word for word in ways if _way(word)[2]]):
        raise RecipeError([f"--ways: {biased[0]} corrects the bias of new classes, and these are the same"], "compare")
    for method in set(methods) & set(ALONE):
        if other := [word for word, way in words if way not in (*METHOD_WAYS, JOINT)]:
            raise RecipeError([f"--methods: {method} is extended by itself alone, not by {other[0]}"], "compare")
    shared = [(method, word) for method in methods for word, way in words if way not in METHOD_WAYS]
    return [*shared, *((way, word) for word, way in words if way in METHOD_WAYS)]


def _method(given: MethodSpec, name: str, sessions: int) -> MethodSpec:
    """Return a method with its options in the recipe, and as many sessions as there are where it divides a pool."""
    spec = given if given.name == name else MethodSpec(name=name)  # options in the recipe are those of its own method
    divides = "sessions" in config_of(name).model_fields and "sessions" not in spec.options
    return MethodSpec.model_validate({"name": name, **spec.options, "sessions": sessions}) if divides else spec


def _sessions(recipe: Recipe, word: str, parts: Sequence[DataSpec], folder: Path, progress: Progress) -> dict[str, Any]:
    """Run what is not there yet of one way and seed, and return its figures."""
    way, memory, bias = _way(word)
    settings = ("train.align=bias",) if bias else ()

    if way == JOINT:
        joint = _finished(folder / JOINT, lambda path: start(recipe, path, progress), progress, recipe)
        # Without sessions nothing is forgotten or transferred: these figures are None.
        figures = {**dict.fromkeys(FIGURES), "overall": joint["student"]["accuracy"], "accuracy": None}
        return {**figures, "seconds": joint["seconds"], "bytes": joint["student"]["task_bytes"]}
    last, recipes = folder / "first", [recipe.model_copy(update={"data": data}) for data in parts]
    _finished(last, lambda path: start(recipes[0], path, progress), progress, recipes[0])
    seconds, found = 0.0, dict[str, Any]()
    for number, session in enumerate(recipes[1:], 2):
        # Bound here, since `last` becomes the folder of this session in the next line.
        make = partial(_extend, recipe.seed, last, session.data, way, memory, settings, progress)
        last = folder / word.replace(":", "-") / str(number)
        found = _finished(last, make, progress, session)
        seconds += found["seconds"]
    of_all = found["sessions"]
    figures = {name: of_all[name] for name in (*FIGURES[:-2], "accuracy")}
    figures |= {f"calibration_{name}": of_all["calibration_error"][name] for name in ("old", "new")}
    # Without the first session, which all ways share.
    return {**figures, "seconds": seconds, "bytes": sum(one["bytes"] for one in of_all["sessions"][1:])}


def _extend(
    seed: int, run: Path, data: DataSpec, way: str, memory: int, settings: Sequence[str], progress: Progress, path: Path
) -> Result:
    # No epoch of an extended run is chosen, and a classifier that is fitted at once sees the images as they are.
    unread = {"selection", *(LOOKS if way in AT_ONCE else ())}
    # What was not set stays unset: extend takes that from the run.
    data = DataSpec(**data.model_dump(exclude_unset=True, exclude=unread))
    return extend(run, data, how=way, memory=memory, settings=settings, output=path, progress=progress, seed=seed)


def _finished(path: Path, make: Callable[[Path], Any], progress: Progress, recipe: Recipe) -> dict[str, Any]:
    """Return the summary of a run; one that was interrupted is resumed.

    Args:
        recipe: That of the run; of one that extends another, its images count, since the other was looked at.

    Raises:
        RunError: The run there was made with another recipe.
    """
    run = RunDir(path)
    if (path / "recipe.yaml").is_file():
        made = run.recipe()
        if made.student.extends is None:
            same = made.digest(places=False) == recipe.digest(places=False)
        else:
            same = name_of(made.data) == name_of(recipe.data)
        if not same:
            raise RunError(
                f"{path} was made with other settings; nothing in it was touched",
                do="name another --output, or remove that folder",
            )
    if run.is_done:
        return run.summary()
    progress.say(str(path))
    return dict((resume(path, progress) if (path / "recipe.yaml").is_file() else make(path)).summary)


def _over_seeds(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures = {name: over_seeds([one[name] for one in found]) for name in (*FIGURES, *COSTS)}
    return {**figures, "accuracy": [one["accuracy"] for one in found]}


def over_seeds(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Return mean, spread (standard deviation) and 95 % interval (Student's t) over seeds; None of what has none."""
    known = [value for value in values if value is not None]
    # A mean over some of the seeds would not compare with one over all.
    if not known or len(known) < len(values):
        return None
    mean, count = statistics.fmean(known), len(known)
    # The spread of one value is undefined.
    if count == 1:
        return {"values": known, "mean": mean, "spread": None, "low": None, "high": None}
    from scipy.stats import t

    spread = statistics.stdev(known)
    half = float(t.ppf(0.975, count - 1)) * spread / sqrt(count)
    return {"values": known, "mean": mean, "spread": spread, "low": mean - half, "high": mean + half}


def markdown(table: dict[str, Any]) -> str:
    """Return the table as Markdown, shares in %."""
    lines = [
        f"Accuracy in % over the images of all {len(table['sessions'])} sessions after the last one, its mean over"
        f" sessions, and forgetting in points; {number_of(table['seeds'], 'seed')}, mean ± standard deviation. Seconds"
        " and KiB are those of the sessions behind the first.",
        "",
        "| method | way | accuracy | average | forgetting | seconds | KiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in table["rows"]:
        shares = ["-" if row[name] is None else percent(row[name]) for name in SHOWN]
        rest = [f"{row['seconds']['mean']:.0f}", f"{row['bytes']['mean'] / 1024:.0f}"]
        lines.append(f"| {' | '.join(map(plain, [row['method'], row['way'], *shares, *rest]))} |")
    return "\n".join(lines) + "\n"
