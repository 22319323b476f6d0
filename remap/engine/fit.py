"""The one training loop: from (student, teacher, objective, images) to history."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from remap.data import keyed
from remap.data.batches import Batch, Plan, batches
from remap.data.views import ViewSource
from remap.engine.checkpoint import State, load_checkpoint, save_checkpoint
from remap.engine.features import FrozenFeatures
from remap.engine.interrupt import StopFlag, stop_flag
from remap.engine.optim import adamw, learning_rate, set_learning_rate
from remap.engine.teacher import Teacher
from remap.errors import DataError, Interrupted, TrainingError
from remap.network import Network, Runner
from remap.progress import Progress
from remap.recipe.schema import Recipe
from remap.remapping.labels import Labels
from remap.remapping.objective import Objective
from remap.tuning.base import Sample


class StudentStep(nn.Module):
    """Student and objective in one module, so that a wrapper (DDP, compile) sees the whole differentiable step."""

    def __init__(self, network: Network, objective: Objective, *, bf16: bool) -> None:
        super().__init__()
        self.runner = Runner(network, objective.student_needs(), bf16=bf16)
        self.objective, self.attached = objective, network.attached

    def forward(
        self,
        images_BCHW: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        labels: Labels,
        kept: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = self.objective(self.runner(images_BCHW, kept), targets, labels)
        penalty = self.attached.penalty()
        if penalty is None:
            return total, parts
        return total + penalty, {**parts, "penalty": penalty.detach()}


@dataclass
class Job:
    """What one training run works on.

    Attributes:
        data_digest: Which images and labels these are; a checkpoint goes on with the same ones only.
        checkpoint: Where to keep the latest state; None keeps none.
        evaluate: Called after each epoch, gives the metrics to record.
        on_epoch: Called on the main process with the history so far.
        labeled: Share of the training images that have a label.
        features: The student's frozen features of ``source``, where they are kept.
        sample: Training images for methods that look at them before the first step.
    """

    recipe: Recipe
    student: Network
    objective: Objective
    teachers: Sequence[Teacher]
    source: ViewSource
    accelerator: Accelerator
    bf16: bool
    progress: Progress
    evaluate: Callable[[], dict[str, float]]
    on_epoch: Callable[[list[dict[str, Any]]], None]
    data_digest: str = ""
    checkpoint: Path | None = None
    labeled: float = 1.0
    features: FrozenFeatures | None = None
    sample: Sample | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name: tuned parameters, head, and the objective's projectors."""
        extra = {f"objective.{name}": p for name, p in self.objective.named_parameters() if p.requires_grad}
        return self.student.trained | extra

    @property
    def peak_lr(self) -> float:
        return self.recipe.learning_rate(self.student.anatomy.width)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the optimiser: ``parameters``, and all else that training changes."""
        changing = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict(keep_vars=True).items()}
        for teacher in self.teachers:
            changing |= teacher.tensors()
        return self.student.tensors | changing | self.parameters()


def fit(job: Job, *, resume: bool = False) -> State:
    """Train until the last epoch.

    Raises:
        TrainingError: A loss or gradient is not finite; nothing was stepped with it.
        Interrupted: A signal came; the state is saved.
    """
    spec, accelerator = job.recipe.train, job.accelerator
    _require_divisible(plan_of(job))
    step_module = StudentStep(job.student, job.objective, bf16=job.bf16).to(accelerator.device)
    parameters = job.parameters()
    extra = [(name, p) for name, p in parameters.items() if name.startswith("objective.")]
    optimizer = adamw(job.student, extra, job.peak_lr, spec.weight_decay)
    state = State(f"{job.recipe.digest()}+{job.data_digest}")
    if resume and job.checkpoint is not None and job.checkpoint.exists():
        state = _load(job, state.digest, optimizer)
    elif job.student.attached.wants_sample:
        assert job.sample is not None
        with job.progress.wait(f"{job.recipe.method.name} looks at training images"):
            job.student.attached.prepare(job.sample)
    if spec.compile:
        _compile_blocks(job.student)
    if job.features is not None:
        job.features.with_images = any(teacher.kept is None for teacher in job.teachers)
    callable_step = _distributed(step_module, accelerator)
    try:
        with stop_flag() as flag:
            while state.epoch < spec.epochs:
                _epoch(job, state, callable_step, optimizer, list(parameters.values()), flag)
    finally:
        step_module.runner.tap.close()
        job.student.attached.set_sample_keys(None)
    return state


def _require_divisible(plan: Plan) -> None:
    if plan.step_images < plan.processes * plan.accumulation:
        raise TrainingError(
            f"a step of {plan.step_images} image(s) cannot be divided",
            given=f"{plan.processes} process(es), each with train.accumulation={plan.accumulation}",
            do="use a larger --batch-size, fewer processes, or less accumulation",
        )


def _distributed(step_module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Average gradients over processes. Every trained parameter is used, so no search for unused ones is paid for."""
    if accelerator.num_processes == 1:
        return step_module
    device = accelerator.device
    return DistributedDataParallel(step_module, device_ids=[device.index] if device.type == "cuda" else None)


def _compile_blocks(network: Network) -> None:
    """Compile block by block: most methods' blocks share one graph, so start-up is short, and hooks outside stay."""
    # Methods that replace a layer's forward have one graph a block; PyTorch would give up at the ninth.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * network.anatomy.depth)
    for block in network.anatomy.blocks:
        network.model.get_submodule(block.block).compile()


def _epoch(
    job: Job,
    state: State,
    step_module: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    flag: StopFlag,
) -> None:
    """The rest of epoch ``state.epoch``, its evaluation and its record."""
    spec, accelerator, plan = job.recipe.train, job.accelerator, plan_of(job)
    job.student.attached.train()
    stream = batches(job.features or job.source, plan, state.epoch, state.step)
    started, saved = time.perf_counter(), time.perf_counter()
    with job.progress.wait(f"epoch {state.epoch + 1}/{spec.epochs}", plan.steps) as shown:
        shown.advance(state.step)
        while state.step < plan.steps:
            update = state.epoch * plan.steps + state.step
            set_learning_rate(optimizer, learning_rate(spec, job.peak_lr, update, plan.steps))
            torch.manual_seed(keyed.step_seed(job.recipe.seed, state.epoch, update) + accelerator.process_index)
            sums = _accumulate(job, step_module, stream)
            total = spec.epochs * plan.steps
            shown.advance(loss=_step(job, state, optimizer, parameters, sums, update, total))
            state.step += 1
            stop = flag.agreed(accelerator)
            now = time.perf_counter()
            if stop or now - saved > spec.checkpoint_seconds:
                state.seconds, started, saved = state.seconds + now - started, now, now
                _save(job, state, optimizer)
            if stop:
                accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has left
                raise Interrupted("stopped by a signal; the state is saved", exit_code=128 + stop)
    state.seconds += time.perf_counter() - started
    _finish_epoch(job, state, plan)
    _save(job, state, optimizer)


def _accumulate(job: Job, step_module: nn.Module, stream: Iterator[Batch]) -> dict[str, Tensor]:
    """Forward and backward over this process's micro-batches of one step, each by its share of the global batch.

    Returns:
        This process's part of each loss; over all processes they add up to the mean over the global batch.
    """
    micro, processes = job.recipe.train.accumulation, job.accelerator.num_processes
    sums: dict[str, Tensor] = {}
    for index in range(micro):
        batch = next(stream)
        wait = index + 1 < micro and processes > 1
        with step_module.no_sync() if wait else nullcontext():
            total, parts = _forward(job, step_module, batch)
            (total * (batch.share * processes)).backward()  # DDP takes the mean over processes
        for name, value in {"loss": total.detach(), **parts}.items():
            sums[name] = sums.get(name, 0.0) + value * batch.share
    return sums


def _forward(job: Job, step_module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    if not len(batch.indices_B):
        raise DataError("no image of a whole batch can be read", do="look at the skipped files the run lists")
    device = job.accelerator.device
    images = batch.images_BCHW.to(device, non_blocking=True)
    labels = _labels(batch, plan_of(job).known(job.labeled), device)
    targets: list[Mapping[str, Tensor]] = [{}] * (1 + max((teacher.number for teacher in job.teachers), default=0))
    for teacher in job.teachers:
        targets[teacher.number] = teacher.targets(images, batch.indices_B, batch.view)
    job.student.attached.set_sample_keys(batch.keys_B.to(device))
    kept = job.features.rows(batch.indices_B) if job.features is not None else None
    return step_module(images, targets, labels, kept)


def _labels(batch: Batch, known: float, device: torch.device) -> Labels:
    def placed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return Labels(placed(batch.labels_B), placed(batch.other_B), placed(batch.share_B), known)


def _step(
    job: Job,
    state: State,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    sums: dict[str, Tensor],
    update: int,
    total: int,
) -> float:
    """Clip, look for anything that is not finite, then do update number ``update`` of ``total``; gives the loss."""
    limit = job.recipe.train.clip_norm
    clipped = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
    values = torch.stack(list(sums.values()))
    if job.accelerator.num_processes > 1:
        torch.distributed.all_reduce(values)
    *means, norm = torch.cat([values, clipped[None]]).tolist()  # one transfer for all of them
    losses = dict(zip(sums, means, strict=True))
    if not all(abs(value) < float("inf") for value in (*means, norm)):
        named = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise TrainingError(
            f"the loss is not finite in epoch {state.epoch + 1}, step {state.step + 1}; nothing was stepped",
            given=f"{named}, gradient norm {norm:.4g}, learning rate {optimizer.param_groups[0]['lr']:.3g}",
            do="lower --lr, or set train.precision=fp32; the last checkpoint is whole",
        )
    optimizer.step()
    job.student.attached.after_step(update, total)
    for teacher in job.teachers:
        teacher.after_step(job.student, update)
    optimizer.zero_grad(set_to_none=True)
    for name, value in losses.items():
        state.loss_sums[name] = state.loss_sums.get(name, 0.0) + value
    return losses["loss"]


def _finish_epoch(job: Job, state: State, plan: Plan) -> None:
    record: dict[str, Any] = {"epoch": state.epoch + 1}
    record |= {name: value / plan.steps for name, value in state.loss_sums.items()}
    done = state.epoch + 1
    if done % job.recipe.train.eval_every == 0 or done == job.recipe.train.epochs:
        record |= job.evaluate()
    record["seconds"] = round(state.seconds, 3)
    state.history.append(record)
    state.epoch, state.step, state.loss_sums = state.epoch + 1, 0, {}
    if job.accelerator.is_main_process:
        job.on_epoch(state.history)


def plan_of(job: Job) -> Plan:
    spec, accelerator = job.recipe.train, job.accelerator
    return Plan(
        seed=job.recipe.seed,
        images=len(job.source.split),
        batch_size=spec.batch_size,
        accumulation=spec.accumulation,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        augment=job.recipe.data.augment,
        views=job.recipe.data.views,
        mixup=job.recipe.data.mixup,
        cutmix=job.recipe.data.cutmix,
        mix_probability=job.recipe.data.mix_probability,
    )


def _save(job: Job, state: State, optimizer: torch.optim.Optimizer) -> None:
    if job.checkpoint is not None and job.accelerator.is_main_process:
        save_checkpoint(job.checkpoint, state, job.tensors(), optimizer, job.student.attached.memory())


def _load(job: Job, digest: str, optimizer: torch.optim.Optimizer) -> State:
    state, memory = load_checkpoint(job.checkpoint, digest, job.tensors(), optimizer)
    job.student.attached.recall(memory)
    return state
