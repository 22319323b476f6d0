"""The one training loop: from (student, teacher, objective, images) to history."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from remap.data import keyed_random
from remap.data.batches import Batch, EpochPlan, batches
from remap.distributed.collectives import all_reduce_max, all_reduce_mean_, all_reduce_sum, broadcast_
from remap.distributed.device_memory import is_out_of_memory
from remap.distributed.interrupts import defer_signals, requested_signal, signal_exit_code, signal_name, watch_signals
from remap.distributed.sharding import is_sharded, sharded
from remap.engine.checkpoint import (
    State,
    digest_of,
    has_checkpoint,
    load_checkpoint,
    require_planned,
    save_checkpoint,
    snapshot,
)
from remap.engine.faults import BrokenWeights, Fault
from remap.engine.job import Job, StudentStep, epoch_plan, require_divisible
from remap.engine.optim import adamw, clip_gradients, learning_rate, set_learning_rate
from remap.engine.recovery import Buffers, Recovery
from remap.errors import DataError, Interrupted, RunError, TrainingError
from remap.network import Network
from remap.remapping.labels import Labels


def fit(job: Job, *, resume: bool = False) -> State:
    """Train until the last epoch.

    Raises:
        TrainingError: Losses or gradients stay not finite, or memory does not suffice for a single image.
        Interrupted: A signal came; the state is saved.
    """
    begun = resume and _has_begun(job)
    with watch_signals(), defer_signals():
        if job.student.attached.wants_sample and not begun:
            assert job.sample is not None
            with job.progress.wait(f"{job.recipe.method.name} looks at training images"):
                job.student.attached.prepare(job.sample)
        if job.recipe.train.parallel == "ddp":
            return _fit(job, resume=begun)
        with sharded(job.made_of_student(), job.accelerator, job.progress):
            return _fit(job, resume=begun)


def _has_begun(job: Job) -> bool:
    """Whether there is a checkpoint; every process has to call it.

    Raises:
        RunError: Not every process sees it.
    """
    if job.checkpoint is None:
        return False
    here = has_checkpoint(job.checkpoint)
    somewhere, nowhere = all_reduce_max(job.accelerator, here, not here)
    if somewhere and nowhere:
        raise RunError(
            f"not every process sees the checkpoints in {job.checkpoint}",
            do="let all machines of the run share the folder of --output",
        )
    return bool(somewhere)


def _fit(job: Job, *, resume: bool) -> State:
    loop = Loop(job)
    try:
        loop.begin(resume=resume)
        while loop.state.epoch < job.recipe.train.epochs:
            try:
                loop.epoch()
            except BrokenWeights:
                loop.recovery.go_back()
    finally:
        loop.step_module.runner.tap.close()
        job.student.attached.set_sample_keys(None)
    return loop.state


def _compile_blocks(network: Network) -> None:
    """Compile block by block: most methods' blocks share one graph, so start-up is short, and hooks outside stay."""
    # Methods that replace a layer's forward have one graph a block; PyTorch would give up at the ninth.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * network.anatomy.depth)
    for block in network.anatomy.blocks:
        network.model.get_submodule(block.block).compile()


class Loop:
    """Training of one job from ``state`` on."""

    def __init__(self, job: Job) -> None:
        self.job, self.accelerator, self.spec = job, job.accelerator, job.recipe.train
        digest = digest_of(job.recipe, job.data_digest, job.weights_digest)
        self.state = State(digest, accumulation=self.spec.accumulation)
        self._require_divisible()
        self.recovery = Recovery(self)
        self.step_module = StudentStep(job.student, job.objective, bf16=job.bf16).to(self.accelerator.device)
        self.parameters = job.parameters()
        extra = [(name, p) for name, p in self.parameters.items() if name.startswith("objective.")]
        self.optimizer = adamw(job.student, extra, job.peak_lr, self.spec.weight_decay)
        self.buffers = Buffers({})
        self.stream: Iterator[Batch] | None = None
        self.unsound: list[Tensor] = []
        self.needs_all = any(map(is_sharded, (job.student, *(teacher.network for teacher in job.teachers))))
        self.read = 0  # images of the step, on this process
        self.checked = False  # that a gradient reaches everything that is trained
        self.started = self.saved = time.perf_counter()

    @property
    def plan(self) -> EpochPlan:
        """How steps are cut into micro-batches, as memory allows by now."""
        return epoch_plan(self.job, self.state.accumulation)

    def begin(self, *, resume: bool) -> None:
        job = self.job
        if resume:
            self.load()
            job.on_resume(self.state, self.plan.steps)
        else:
            broadcast_(self.accelerator, [t for t in job.tensors().values() if not isinstance(t, DTensor)])
            if not self.recovery.is_whole():
                raise TrainingError(
                    "what is to be trained holds numbers that are not finite before the first step",
                    do="choose other weights for the student",
                )
            self._save(must=True)  # finds out about the disk before any work, and is something to go back to
        if self.spec.compile:
            _compile_blocks(job.student)
        if job.features is not None:
            job.features.with_images = any(teacher.kept is None for teacher in job.teachers)

    def epoch(self) -> None:
        """The rest of epoch ``state.epoch``, its evaluation and its record."""
        state, job = self.state, self.job
        job.student.attached.train()
        self.stream, self.started, self.buffers = None, time.perf_counter(), Buffers(job.tensors())
        steps = self.plan.steps
        with job.progress.wait(f"epoch {state.epoch + 1}/{self.spec.epochs}", steps) as shown:
            shown.advance(state.step)
            while state.step < steps:
                loss = self.step(steps)
                state.step += 1
                shown.advance(**({} if loss is None else {"loss": loss}))
                due = time.perf_counter() - self.saved > self.spec.checkpoint_seconds  # each process has its own clock
                stop, due = all_reduce_max(self.accelerator, requested_signal(self.accelerator), due)
                if stop or due:
                    self._save(must=bool(stop))
                if stop:
                    self.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has left
                    raise Interrupted(
                        f"stopped by {signal_name(stop)}; the state is saved", exit_code=signal_exit_code(stop)
                    )
            if state.counted:
                shown.advance(0, loss=state.loss_sums["loss"] / state.counted)  # as the metrics have it
        self._count_time()
        self.recovery.require_whole()
        broadcast_(self.accelerator, self.buffers.tensors)
        try:
            self._finish_epoch()
        except Interrupted as error:  # while it evaluated; the epoch's steps are done
            if not error.at_once:
                self._save(must=True)
                self.accelerator.wait_for_everyone()
                error.add("the state is saved")
            raise
        self._save()

    def step(self, steps: int) -> float | None:
        """One step, from images to update; gives the loss, or None where it was skipped."""
        state, spec, accelerator = self.state, self.spec, self.accelerator
        update = state.epoch * steps + state.step
        rate = learning_rate(spec, self.job.peak_lr, update, steps) * state.lr_factor
        set_learning_rate(self.optimizer, rate)
        broadcast_(accelerator, self.buffers.tensors)
        sums = self.accumulate(update)
        self._require_gradients()
        all_reduce_mean_(accelerator, [p.grad for p in self.parameters.values() if not isinstance(p.grad, DTensor)])
        norm = clip_gradients(self.parameters.values(), spec.clip_norm)
        unsound = torch.stack(self.unsound).sum() if self.unsound else torch.zeros((), device=norm.device)
        values = all_reduce_sum(accelerator, torch.stack([*sums.values(), unsound]))
        *means, unsound_count, gradient = torch.cat([values, norm[None]]).tolist()  # one transfer for all of them
        losses = dict(zip(sums, means, strict=True))
        if unsound_count or not all(abs(value) < float("inf") for value in (*means, gradient)):
            self.buffers.restore()  # batch statistics saw the step already
            self.recovery.from_fault(Fault(losses, gradient, int(unsound_count), rate, state.step))
            return None
        self.optimizer.step()
        self.job.student.attached.after_step(update, spec.epochs * steps)
        for teacher in self.job.teachers:
            teacher.after_step(self.job.student, update)
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in losses.items():
            state.loss_sums[name] = state.loss_sums.get(name, 0.0) + value
        state.counted += 1
        return losses["loss"]

    def accumulate(self, update: int) -> dict[str, Tensor]:
        """Forward and backward over this process's micro-batches of one step, in smaller ones if memory runs out.

        Returns:
            This process's part of each loss; over all processes they add up to the mean over the global batch.
        """
        while True:
            torch.manual_seed(keyed_random.step_seed(self.job.recipe.seed, self.state.epoch, update) + self._rank)
            self.buffers.remember()
            out_of_memory = ""
            try:
                sums = self._forward_and_backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.needs_all:  # the others are in the middle of a pass and wait for this one's part of a weight
                    raise TrainingError(
                        "out of memory, and a step with sharded weights cannot be done again in smaller parts",
                        given=str(error).partition("\n")[0][:200],
                        do="start again with train.accumulation doubled, or with smaller images or models",
                    ) from error
                out_of_memory = str(error)  # the error itself holds on to the tensors of the step
            failed, read = all_reduce_max(self.accelerator, bool(out_of_memory), self.read)
            if failed:
                self.buffers.restore()
                self.recovery.from_lack_of_memory(out_of_memory)
            elif not read:
                self._refuse_unreadable()
            else:
                return sums

    def _forward_and_backward(self) -> dict[str, Tensor]:
        """Micro-batches of which no image can be read count nothing, as unreadable images do."""
        if self.stream is None:
            self.stream = batches(self.job.features or self.job.source, self.plan, self.state.epoch, self.state.step)
        sums: dict[str, Tensor] = {}
        self.unsound, self.read = [], 0
        for _ in range(self.state.accumulation):
            batch = next(self.stream)
            if not len(batch.indices_B):
                continue
            self.read += len(batch.indices_B)
            value, parts = self.forward(batch)
            (value * (batch.share * self.accelerator.num_processes)).backward()  # gradients are averaged
            for name, part in {"loss": value.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + part * batch.share
        return sums if self.read else self._nothing()

    def _nothing(self) -> dict[str, Tensor]:
        """A part in the step for a process that can read none of its images: the others wait for one."""
        if self.needs_all:
            self._refuse_unreadable()
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        penalized = self.job.student.attached.penalty() is not None
        names = ("loss", *self.job.objective.terms, *(("penalty",) if penalized else ()))
        return dict.fromkeys(names, torch.zeros((), device=self.accelerator.device))

    def _refuse_unreadable(self) -> None:
        bad = self.job.source.bad_names()
        raise DataError(
            f"no image of step {self.state.step + 1} can be read, and {len(bad)} in all so far",
            given="; ".join(f"{name} ({reason})" for name, reason in bad[-3:]),
            do="see that the images are still there; then go on with --resume",
        )

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        job, device = self.job, self.accelerator.device
        images = batch.images_BCHW.to(device, non_blocking=True)
        labels = _labels(batch, self.plan.known(job.labeled), device)
        targets: list[Mapping[str, Tensor]] = [{}] * (1 + max((teacher.number for teacher in job.teachers), default=0))
        for teacher in job.teachers:
            found = targets[teacher.number] = teacher.targets(images, batch.indices_B, batch.view)
            if teacher.kept is None:  # what is kept was looked at when it was computed
                self.unsound += [(~torch.isfinite(value)).any().float() for value in found.values()]
        job.student.attached.set_sample_keys(batch.keys_B.to(device))
        kept = job.features.rows(batch.indices_B) if job.features is not None else None
        return self.step_module(images, targets, labels, kept)

    def _require_gradients(self) -> None:
        """In the first step: what the loss cannot reach would count as trained and stay as it was drawn."""
        if self.checked or not self.read:
            return
        self.checked = True
        missing = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if missing:
            raise TrainingError(
                f"no loss reaches {len(missing)} of {len(self.parameters)} trained parameters; nothing was stepped",
                given=", ".join(missing[:5]) + (" ..." if len(missing) > 5 else ""),
                do="add a loss that reads what they change (ce and kd read the classifier), or take another method",
            )

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.state.seconds, self.started = self.state.seconds + now - self.started, now

    def _finish_epoch(self) -> None:
        state, job = self.state, self.job
        record: dict[str, Any] = {"epoch": state.epoch + 1}
        record |= {name: value / state.counted for name, value in state.loss_sums.items()}
        done = state.epoch + 1
        if done % self.spec.eval_every == 0 or done == self.spec.epochs:
            record |= job.evaluate()
        record["seconds"] = round(state.seconds, 3)
        state.history.append(record)
        state.epoch, state.step, state.counted, state.loss_sums = done, 0, 0, {}
        if self.accelerator.is_main_process:
            job.on_epoch(state.history)

    def _save(self, *, must: bool = False) -> None:
        """Write a checkpoint. A disk that refuses it does not end a run that goes on, unless it ``must`` be written."""
        job = self.job
        if job.checkpoint is None:
            return
        self._count_time()
        self.saved = time.perf_counter()
        self.recovery.require_whole()
        together = any(isinstance(tensor, DTensor) for tensor in self.parameters.values())
        if not (self.accelerator.is_main_process or together):
            return
        tensors = snapshot(job.tensors(), self.optimizer, job.student.attached.memory())
        if not self.accelerator.is_main_process:
            return
        try:
            save_checkpoint(job.checkpoint, self.state, tensors)
        except RunError as error:
            if must:
                raise
            job.progress.say(f"no checkpoint was written, the one before is kept: {error.what} ({error.given})")

    def load(self) -> None:
        """Put the newest whole checkpoint back into the job."""
        job = self.job
        self.state, memory = load_checkpoint(
            job.checkpoint, self.state.digest, job.tensors(), self.optimizer, job.progress.say
        )
        try:
            job.student.attached.recall(memory)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise RunError(
                f"the checkpoint in {job.checkpoint} does not fit {job.recipe.method.name}",
                given=str(error)[:200],
                do="resume with the versions of the run (its environment.json), or start it again in another --output",
            ) from error
        while self.plan.step_images < self.plan.processes * self.plan.accumulation > self.plan.processes:
            if self.state.accumulation <= self.spec.accumulation:
                break
            self.state.accumulation //= 2  # on more processes, each needs fewer parts for the same memory
        self._require_divisible()
        require_planned(job.checkpoint, self.state, self.spec.epochs, self.plan.steps)

    def _require_divisible(self) -> None:
        plan = self.plan
        require_divisible(plan.step_images, plan.processes, plan.accumulation)

    @property
    def _rank(self) -> int:
        return self.accelerator.process_index


def _labels(batch: Batch, known: float, device: torch.device) -> Labels:
    def placed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return Labels(placed(batch.labels_B), placed(batch.other_B), placed(batch.share_B), known)
