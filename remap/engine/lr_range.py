"""The learning-rate range test: a few steps at growing rates (Smith 2017, WACV, arXiv 1506.01186, section 3.3)."""

from dataclasses import dataclass
from functools import partial

from remap.distributed.collectives import all_reduce_mean_, broadcast_
from remap.distributed.interrupts import raise_if_interrupted
from remap.engine.job import Job
from remap.engine.loop import opened
from remap.engine.optim import clip_gradients, set_learning_rate
from remap.engine.step import forward_backward, gather_result
from remap.errors import TrainingError

# The test ends where the smoothed loss is this many times the lowest.
DIVERGED = 4.0
# Share of the running mean of the losses that stays in each step, and of the lowest loss's rate that is suggested.
SMOOTHING, SHARE = 0.9, 0.1


@dataclass(frozen=True)
class LrRange:
    """What a range test found.

    Attributes:
        rates: Learning rate of each step, growing by one factor.
        losses: Running mean of the loss up to each step, before the step's update.
        lowest: The rate at which that mean was lowest.
        suggested: A tenth of it, as a peak rate (``train.lr``).
        diverged: Whether the loss rose so far that the test ended early.
    """

    rates: list[float]
    losses: list[float]
    lowest: float
    suggested: float
    diverged: bool


def lr_range_test(job: Job, first: float, last: float, steps: int) -> LrRange:
    """Train for some steps at rates from ``first`` to ``last``; the student is spoiled afterwards.

    Raises:
        TrainingError: The loss does not fall at any of the rates.
    """
    losses: list[float] = []
    with opened(job, resume=False) as training, job.progress.wait("learning-rate range test", steps) as shown:
        for update in range(steps):
            raise_if_interrupted(training.accelerator, "learning rates were tested")
            # By hand, as nothing is counted here: images and seeds are keyed by both.
            training.state.epoch, training.state.step = divmod(update, training.plan.steps)
            if training.state.step == 0:
                training.start_epoch()
            rate = _rate(first, last, steps, update)
            set_learning_rate(training.optimizer, rate)
            # Schedules stay at their beginning, so that the rate is all that changes.
            job.objective.set_progress(0, training.plan.steps, training.spec.epochs, {})
            broadcast_(training.accelerator, training.buffers)
            # No gradient is averaged over processes: ``find_lr`` allows one only.
            sums = forward_backward(training, update)
            # What methods, teachers and losses do around a step belongs to the loss that is tested.
            job.student.attached.before_step(partial(all_reduce_mean_, training.accelerator))
            norm = clip_gradients(training.parameters.values(), training.spec.clip_norm)
            result = gather_result(training, sums, norm, rate).read()
            # A rate that is too high is what the test looks for, so here it is no error.
            if not result.finite:
                break
            losses.append(result.losses["loss"])
            means = smoothed(losses)
            shown.advance(1, loss=means[-1], lr=rate)
            if means[-1] > DIVERGED * min(means):
                break
            training.optimizer.step()
            job.student.attached.after_step(update, training.plan.steps * training.spec.epochs)
            for teacher in job.teachers:
                teacher.after_step(job.student, update)
            job.objective.after_step()
            training.optimizer.zero_grad(set_to_none=True)
    return suggestion([_rate(first, last, steps, update) for update in range(len(losses))], losses, steps)


def suggestion(rates: list[float], losses: list[float], steps: int) -> LrRange:
    """Return what the losses of a test of so many planned steps say.

    Raises:
        TrainingError: The loss does not fall at any of the rates.
    """
    means = smoothed(losses)
    at = min(range(len(means)), key=means.__getitem__) if means else 0
    if at == 0:
        raise TrainingError(
            "the loss does not fall at any learning rate of the test",
            given=f"{len(losses)} steps" + (f", rates {rates[0]:.3g} to {rates[-1]:.3g}" if rates else ""),
            do="test more steps, and check the data and the losses",
        )
    return LrRange(rates, means, rates[at], SHARE * rates[at], len(losses) < steps or means[-1] > DIVERGED * means[at])


def smoothed(losses: list[float]) -> list[float]:
    """Return the running mean up to each value: sum of 0.9^(n - i) x_i over the sum of these weights."""
    means, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1.0
        means.append(total / weight)  # by the weights so far, or the first means would be too small
    return means


def _rate(first: float, last: float, steps: int, update: int) -> float:
    # ``find_lr`` asks for 10 steps or more.
    return first * (last / first) ** (update / (steps - 1))
