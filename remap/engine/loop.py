"""The one training loop."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch.distributed.tensor import DTensor

from remap.distributed.collectives import all_reduce_max, all_reduce_mean_, broadcast_
from remap.distributed.device_memory import peak_bytes
from remap.distributed.interrupts import CALLBACK, defer_signals, watch_signals
from remap.distributed.sharding import sharded
from remap.engine.block_checkpoints import checkpointed_blocks
from remap.engine.callback import newest_and_best, raised_in
from remap.engine.checkpoint_files import has_checkpoint
from remap.engine.compiling import compile_networks
from remap.engine.job import Job
from remap.engine.late import may_read_late, rate_factor, step_if_finite
from remap.engine.non_finite import BrokenWeights, go_back, require_finite_weights, skip_step, weights_are_finite
from remap.engine.optim import clip_gradients, learning_rate, set_learning_rate
from remap.engine.overtaken import compare_with_teachers
from remap.engine.saving import is_due, is_wanted, save, save_if_due, save_or_end
from remap.engine.selection import is_over
from remap.engine.state import State
from remap.engine.statistics import estimate_statistics
from remap.engine.step import forward_backward, gather_result
from remap.engine.training import Training
from remap.errors import Interrupted, RunError, TrainingError, is_at_once
from remap.progress import Pace, Step


def train(job: Job, *, resume: bool = False) -> State:
    """Train until the last epoch, or until patience ends; every process of the run calls it.

    Afterwards the student is the result: the last epoch or the best, and its running average if the recipe takes one.

    Raises:
        TrainingError: Losses or gradients stay non-finite, or memory does not suffice for a single image.
        Interrupted: A signal asked to stop; the state is saved.
    """
    spec, accelerator = job.recipe.train, job.accelerator
    with opened(job, resume=resume) as training:
        pace = Pace()
        while not is_over(training.state, spec):
            training.start_epoch()
            training.reads_late = may_read_late(training)  # after start_epoch, which lists the buffers
            # Looked up once an epoch: going back to a checkpoint puts another state in the place of this one.
            state, optimizer, steps = training.state, training.optimizer, training.plan.steps
            accuracies = newest_and_best(state.history)
            try:
                with job.progress.wait(f"epoch {state.epoch + 1}/{spec.epochs}", steps) as shown:
                    shown.advance(state.step)  # a resumed epoch begins in the middle
                    while state.step < steps:
                        # The schedule, over the updates of the whole run.
                        update = state.epoch * steps + state.step
                        rate = learning_rate(spec, job.peak_lr, update, steps) * rate_factor(training, update)
                        set_learning_rate(optimizer, rate)
                        job.objective.set_progress(update, steps, spec.epochs, state.teacher_shares)

                        # Micro-batches, teachers, losses and backward; then the mean gradient over all processes.
                        broadcast_(accelerator, training.buffers)
                        sums = forward_backward(training, update)
                        all_reduce_mean_(accelerator, training.replicated_gradients())
                        job.student.attached.before_step(partial(all_reduce_mean_, accelerator))
                        norm = clip_gradients(training.parameters.values(), spec.clip_norm)
                        pending = gather_result(training, sums, norm, rate)

                        # The update, unless a number is not finite.
                        if training.reads_late:
                            step_if_finite(training, pending)
                        elif (result := pending.read()).finite:
                            optimizer.step()
                            job.student.attached.after_step(update, spec.epochs * steps)
                            for teacher in job.teachers:
                                teacher.after_step(job.student, update)
                            job.objective.after_step()
                            if training.average is not None:
                                training.average.follow(update)
                            optimizer.zero_grad(set_to_none=True)  # last: hooks after the step read gradients
                        else:
                            skip_step(training, result)
                            # What a method does at a certain step still has to be done.
                            job.student.attached.after_step(update, spec.epochs * steps)
                        state.step += 1
                        training.unread.append(pending)

                        # A checkpoint if it is due, and the end if a signal or a callback asked for it.
                        save_if_due(training, _count_steps(training, pace, shown, accuracies))
                    if state.counted:
                        shown.advance(0, loss=state.loss_sums["loss"] / state.counted)  # as the metrics say it
                _finish_epoch(training)
            except BrokenWeights:
                go_back(training)
        training.deliver()
        return training.state


@contextmanager
def opened(job: Job, *, resume: bool) -> Iterator[Training]:
    """The job at its first step, or where its checkpoint left it; it is put back into a plain state afterwards."""
    resume = resume and _has_checkpoint(job)
    attached = job.student.attached
    with ExitStack() as stack:
        stack.enter_context(watch_signals())
        stack.enter_context(defer_signals())
        if attached.wants_sample and not resume:  # what it decides is in the checkpoint otherwise
            assert job.sample is not None
            with job.progress.wait(f"{job.recipe.method.name} looks at training images"):
                attached.prepare(job.sample)
        if not resume:  # they are in the checkpoint otherwise
            estimate_statistics(job)
        if job.recipe.train.checkpoint_blocks:  # after the statistics, which need no gradient
            stack.enter_context(checkpointed_blocks(job.student))
        if job.recipe.train.parallel != "ddp":
            stack.enter_context(sharded(job.made_of_student(), job.accelerator, job.progress))
        training = Training(job)  # after sharding, which replaces the parameters that the optimiser holds
        try:
            _begin(training, resume=resume)
            yield training
            training.finish_writing()
        except BaseException as error:
            if not is_at_once(error):  # no thread writes once the run's lock is free
                training.writer.finish()
            raise
        finally:
            training.module.runner.tap.close()
            attached.set_sample_keys(None)


def _has_checkpoint(job: Job) -> bool:
    """Whether there is a checkpoint, which all processes have to see."""
    if job.checkpoint is None:
        return False
    here = has_checkpoint(job.checkpoint)
    anywhere, missing = all_reduce_max(job.accelerator, here, not here)
    if anywhere and missing:
        raise RunError(
            f"not every process sees the checkpoints in {job.checkpoint}",
            do="let all machines of the run share the folder of --output",
        )
    return bool(anywhere)


def _begin(training: Training, *, resume: bool) -> None:
    job = training.job
    if resume:
        training.load()
        job.on_resume(training.state, training.plan.steps)
    else:
        # Processes may have drawn different weights; sharded ones are one set already.
        broadcast_(training.accelerator, [t for t in training.tensors().values() if not isinstance(t, DTensor)])
        if not weights_are_finite(training):
            raise TrainingError(
                "the weights to be trained are not finite before the first step",
                do="choose other weights for the student",
            )
        if job.initial_accuracy is not None:
            compare_with_teachers(job, training.state, job.initial_accuracy, 0)
        save(training, must=True)  # finds a full disk before any work, and is something to go back to
    compile_networks(training)
    if job.features is not None:
        job.features.with_images = any(teacher.cached is None for teacher in job.teachers)


def _count_steps(training: Training, pace: Pace, shown: Step, accuracies: Mapping[str, float]) -> Exception | None:
    """Count the steps that are done, show their numbers and call back; return what a callback raised.

    Where the host reads late, the newest step is left for the next call, unless the state is needed complete now.
    """
    raised: Exception | None = None
    job, spec, steps = training.job, training.spec, training.plan.steps
    waits = training.reads_late and training.state.step < steps and not is_wanted(training)
    while len(training.unread) > (waits and not raised):
        result, state = training.unread.pop(0).read(), training.state
        update = state.epoch * steps + result.step
        if result.finite:
            state.count(result.losses)
        elif training.reads_late:  # left out by the device
            skip_step(training, result)
        speed = pace.after_step(spec.batch_size, spec.epochs * steps - update - 1 + job.steps_after)
        memory = {"memory": peak_bytes(training.accelerator.device)}
        figures = {**result.losses, **accuracies, "lr": result.learning_rate, **speed, **memory}
        figures = figures if result.finite else {}
        shown.advance(1, **figures)
        training.count_time()
        raised = raised or raised_in(training.accelerator, job.on_step, update + 1, figures)
        training.leave_out_time()  # a tracker that starts takes seconds
    return raised


def _finish_epoch(training: Training) -> None:
    """Evaluate, record and save after the last step of an epoch."""
    state, job, done = training.state, training.job, training.state.epoch + 1
    training.count_time()
    require_finite_weights(training)
    broadcast_(training.accelerator, training.buffers)  # all evaluate the same student
    record: dict[str, Any] = {"epoch": done}
    record |= {name: value / state.counted for name, value in state.loss_sums.items()}
    # Set again: a run that is resumed here has done no step of its own.
    steps = training.plan.steps
    job.objective.set_progress(done * steps - 1, steps, training.spec.epochs, state.teacher_shares)
    record |= job.objective.scheduled()
    if done % training.spec.eval_every == 0 or done == training.spec.epochs:
        try:
            with training.as_result():
                found = job.evaluate()
        except Interrupted as error:  # the steps of the epoch are done; a resumed run begins with the evaluation
            if not error.at_once:
                save(training, must=True)
                training.accelerator.wait_for_everyone()
                error.add("the state is saved")
            raise
        record |= found
        if "accuracy" in found:
            compare_with_teachers(job, state, found["accuracy"], done)
    record["seconds"] = round(state.seconds, 3)
    state.history.append(record)
    state.epoch, state.step, state.counted, state.loss_sums = done, 0, 0, {}
    training.note_best()
    raised = raised_in(training.accelerator, job.on_epoch, done * steps, state.history)
    # After short epochs not each one is saved: what a kill may cost is bounded by time. The last state always is.
    due = is_due(training) or is_over(state, training.spec)
    stop, any_due = all_reduce_max(training.accelerator, CALLBACK if raised else 0, due)
    if stop or any_due:
        save_or_end(training, stop, raised)
