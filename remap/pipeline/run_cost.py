"""What a run costs on this machine: time, memory and disk, from the profile of one training step."""

from dataclasses import dataclass, replace

from remap.distributed.launch import accelerator
from remap.engine.job import bytes_of_a_run
from remap.engine.teacher import Teacher
from remap.network import Network
from remap.pipeline.baseline import why_none
from remap.pipeline.components import RunComponents, build_components
from remap.pipeline.one_pass import fits_in_memory, objectives_of_one_pass
from remap.pipeline.preparation_trials import HELD_OUT as HELD_OUT_OF_TEACHER
from remap.pipeline.preparation_trials import judged_parts, ways_to_prepare
from remap.pipeline.profile_step import StepProfile
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import OutputStorage
from remap.pipeline.teacher_tuning import needs_logits, teacher_recipe
from remap.pipeline.trials import EPOCHS, HELD_OUT, objectives
from remap.progress import Progress, Within
from remap.recipe.schema import AUTO

# Bytes of task.json, about.
TASK_RECORD = 4096


@dataclass(frozen=True)
class Estimate:
    """What a run would cost on this machine.

    Attributes:
        cache_bytes, disk_cache_bytes: Cached outputs of the teachers, in memory and on disk.
        features_bytes: Cached frozen features of the student.
        memory_bytes: Weights, gradients, optimiser state and activations of one process at the full batch; on a CPU
            also what is held in memory of images, outputs and features.
        run_bytes: Checkpoints and task: the free space that the run requires before it trains.
        disk_bytes: ``run_bytes`` (also of a baseline and of trials), a prepared teacher and teacher outputs on disk.
        steps: 0 for a student that is fitted at once, or left as it is.
        seconds: Of the whole run: building networks, reading images, preparing the teacher, training, evaluation.
        preparing_seconds: Part of ``seconds``: giving the teacher its head.
        baseline_seconds: Part of ``seconds``: training the student by labels alone, to compare.
        trials_seconds: Part of ``seconds``: trying objectives (losses: auto).
    """

    step_seconds: float
    steps: int
    seconds: float
    preparing_seconds: float
    baseline_seconds: float
    trials_seconds: float
    memory_bytes: int
    activation_bytes: int
    cache_bytes: int
    disk_cache_bytes: int
    features_bytes: int
    task_bytes: int
    run_bytes: int
    disk_bytes: int


def preparation_cost(
    components: RunComponents,
    number: int,
    each: float,
    storage: OutputStorage | None,
    progress: Progress,
    shared: SharedResources,
) -> tuple[float, int]:
    """Return seconds and bytes on disk of giving a teacher a head.

    That is a forward pass over the labelled images for a probe, unless the pass that caches its outputs serves for
    both; else a run, which is estimated by that pass, and one more for each of ``teacher.folds``.

    Args:
        each: Seconds of the teacher's forward pass for one image.
        storage: Where its outputs are cached, which is counted elsewhere.
    """
    recipe, teacher = components.recipe, components.teachers[number]
    spec = teacher.spec
    if not needs_logits(recipe) or teacher.head != "none":
        return 0.0, 0
    if spec.prepare == "probe":
        head = sum(p.nbytes for p in teacher.network.head.values()) + TASK_RECORD
        head *= 1 + (spec.folds or 0)
        networks = [one.network for one in components.teachers]
        if storage is not None and storage.where != "each step":
            fits = fits_in_memory(storage.shapes, components.views, recipe.data)
            if fits and objectives_of_one_pass(recipe, components.student, networks, number) is not None:
                return 0.0, head
        return each * len(components.views.train.split) / accelerator().num_processes, head
    # A tuned teacher costs a whole run by itself.
    named, seconds, nbytes = Within(progress, "tuning the teacher"), 0.0, 0
    trials = 0.0
    if spec.prepare == AUTO:  # a head alone takes next to nothing
        whole = teacher_recipe(recipe, spec)
        parts = judged_parts(whole, shared.index(whole.data))
        if not parts:
            return each * len(components.views.train.split), TASK_RECORD
        trials = (1.0 - HELD_OUT_OF_TEACHER) * parts * (len(ways_to_prepare(whole)) - 1)
    # The teachers of folds have equally many images: the first stands for all.
    for fold, count in ((0, 1), *([(1, spec.folds)] if spec.folds else [])):
        tuning = build_components(
            teacher_recipe(recipe, spec, fold).written_out(), None, named, replace(shared, shapes_only=True)
        )
        # By the forward pass that was measured: gradients of activations cost as much again, as do those of weights.
        share = tuning.student.num_trainable / tuning.student.num_parameters
        profile = StepProfile({}, (2 + share) * each, each, 0.0, 0, 0, {}, {}, 0.0)
        cost = run_cost(tuning, {}, {}, profile)
        # The weights of a trial go when it ends, before those of the next one are written.
        seconds, nbytes = seconds + (count + trials) * cost.seconds, nbytes + count * cost.disk_bytes
    return seconds, nbytes


def run_cost(
    components: RunComponents,
    teachers: dict[int, Teacher],
    storages: dict[int, OutputStorage],
    profile: StepProfile,
    building: float = 0.0,
    preparing: float = 0.0,
    prepared_bytes: int = 0,
) -> Estimate:
    """Return the cost of a run from the profile of one step; ``building`` and ``preparing`` are seconds."""
    recipe, training_source, val = components.recipe, components.training_source, components.views.val
    spec, processes = recipe.train, accelerator().num_processes
    # Activations of one pass are held at a time, whatever the batch.
    micro = max(1, spec.batch_size // (spec.accumulation * processes))
    trained = [*components.student.trained.values(), *(p for p in components.objective.parameters() if p.requires_grad)]
    # Times three below: gradients and the two moments of AdamW; an average and the best epoch are copies.
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    weights = _weight_bytes([components.student, *(teacher.network for teacher in components.teachers)])
    cached = {number for number, storage in storages.items() if storage.where != "each step"}
    # What does not fill a batch is left out of the epoch, as in training.
    steps = max(1, len(training_source.split) // spec.batch_size) * spec.epochs if spec.by_steps else 0
    online = sum(seconds for number, seconds in profile.teacher_seconds.items() if number not in cached)
    step_seconds = (profile.student_seconds + online) * spec.batch_size / processes if spec.by_steps else 0.0
    fits = spec.fit in ("prototypes", "ridge", "logistic")
    once = sum(profile.teacher_seconds[number] for number in cached) * len(training_source.split) * recipe.finite_views
    once += profile.forward_seconds * len(training_source.split) / processes if fits else 0.0
    once += profile.stem_seconds * (len(training_source.split) + len(val.split))
    # The untrained student is evaluated too.
    passes = 1 + -(-spec.epochs // spec.eval_every)  # before the first epoch, and always after the last
    test = components.views.test
    evaluated = passes * len(val.split) + (0 if test is None else len(test.split))
    if (selection := components.views.selection) is not None and spec.selects:
        evaluated += (passes - 1) * len(selection.split)
    # Evaluation divides images among processes, too.
    checks = profile.forward_seconds * evaluated / processes
    if needs_logits(recipe):  # the teachers are evaluated once
        checks += sum(profile.teacher_seconds.values()) * len(val.split) / processes
    sources = (training_source, val, test, components.views.selection)
    once += profile.reading_seconds * sum(len(source.split) for source in sources if source is not None)
    # The same student once more, for as many steps, evaluated before and after.
    alone = profile.student_seconds * spec.batch_size * steps + 2 * profile.forward_seconds * len(val.split)
    has_baseline = recipe.baseline and why_none(components) is None
    alone = alone / processes if has_baseline else 0.0
    trials = len(objectives(recipe)) if recipe.choose_losses else 0
    trying = trials * EPOCHS * (1 - HELD_OUT) * step_seconds * steps
    task = sum(tensor.nbytes for tensor in components.student.in_task.values()) + TASK_RECORD
    of_run = bytes_of_a_run(components.student, components.objective, list(teachers.values()), spec)
    width = max((p[0].numel() for p in components.student.head.values() if p.ndim > 1), default=0)
    # Gradients and activations of steps, or features of all images and their products, both float64.
    working = (3 + spec.copies) * trained_bytes + profile.activation_bytes * micro
    if not spec.by_steps:
        working = trained_bytes + (8 * width * (len(training_source.split) + width) if fits else 0)
    # Several teachers may be cached in different ways.
    in_memory = sum(storage.bytes for storage in storages.values() if storage.where == "memory")
    on_disk = sum(storage.bytes for storage in storages.values() if storage.where == "disk")
    return Estimate(
        step_seconds=step_seconds,
        steps=steps,
        seconds=building + preparing + step_seconds * steps + once + checks + alone + trying,
        preparing_seconds=preparing,
        baseline_seconds=alone,
        trials_seconds=trying,
        memory_bytes=weights
        + working
        + (
            # On a GPU these are in the memory of the machine.
            in_memory + profile.features_bytes + training_source.cached_bytes
            if accelerator().device.type == "cpu"
            else 0
        ),
        activation_bytes=profile.activation_bytes * micro if spec.by_steps else 0,
        cache_bytes=in_memory,
        disk_cache_bytes=on_disk,
        features_bytes=profile.features_bytes,
        task_bytes=task,
        run_bytes=of_run,
        disk_bytes=of_run * (1 + has_baseline + trials) + prepared_bytes + on_disk,
    )


def _weight_bytes(networks: list[Network]) -> int:
    """Return the bytes of all parameters; those that networks share count once."""
    # A teacher may be made of the student's tensors.
    parameters = {id(p): p for network in networks for p in network.model.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())
