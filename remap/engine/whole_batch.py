"""Losses that compare the images of a batch: over all of them, across processes and micro-batches.

As GradCache does (Gao et al. 2021, arXiv 2101.06983): the student's signals of all parts are gathered, the loss and its
gradient with respect to them are computed on every process alike, and each part's own backward pass goes on from there.
Where a process has several micro-batches, the student runs twice, so that one of them is held at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from remap.data.batches import Batch
from remap.distributed.collectives import all_reduce_max, gather_rows
from remap.distributed.device_memory import is_out_of_memory
from remap.engine.micro_batch import Inputs, inputs_of, run_student
from remap.engine.training import Training
from remap.remapping.labels import Labels
from remap.remapping.signals import Needs, Signals

# Parts of signals by name, each one row an image.
Rows = dict[str, Tensor]


def forward_backward_whole(
    training: Training, batches: Sequence[Batch], first_row: int, bad_targets: list[Tensor]
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Do a step's forward and backward passes where losses read the whole batch; every process calls it.

    Args:
        batches: This process's micro-batches with readable images, one at least.
        first_row: Where their images begin among those of all processes.
        bad_targets: As for ``inputs_of``.

    Yields:
        Values of losses, and the share of the step's batch that they are the mean of: those of the whole batch come
        with the share of this process, so that over all processes everything adds up.
    """
    accelerator, objective = training.accelerator, training.job.objective
    items = {
        teacher.number: teacher.items_over_batch(training.job.source.view.shape) for teacher in training.job.teachers
    }
    # One seed a micro-batch, so that what a method draws is the same in both passes.
    seeds = torch.randint(2**62, (len(batches),)).tolist()
    parts, signals = _first_pass(training, batches, seeds, bad_targets)

    # All that other processes send: from here on, one that runs out of memory leaves no other one waiting.
    needs = objective.student_needs(over_batch=True)
    own = [_rows(one, needs) for one in signals]
    leaves = _gathered(accelerator, [{name: rows.detach() for name, rows in one.items()} for one in own], own[0])
    targets = [
        _gathered(accelerator, [part.targets[number] for part in parts], items.get(number, ()))
        for number in range(len(parts[0].targets))
    ]
    labels = _gathered_labels(accelerator, [part.labels for part in parts])

    for rows in leaves.values():
        # The first backward pass ends here, at the gathered signals of all processes.
        rows.requires_grad_()
    total, values = objective(_with(signals[0], leaves), targets, labels, over_batch=True)
    total.backward()  # projectors have the same gradient on every process, as their mean has then
    yield {"loss": total.detach(), **values}, sum(batch.share for batch in batches)

    for number, (seed, part, batch) in enumerate(zip(seeds, parts, batches, strict=True)):
        if len(batches) > 1:
            torch.manual_seed(seed)
            signals[number] = run_student(training, part)
        mine = slice(first_row, first_row + len(batch.indices_B))
        first_row = mine.stop
        loss, values = training.module.losses(signals[number], part.targets, part.labels, over_batch=False)
        loss_of_part = loss * batch.share
        for name, rows in _rows(signals[number], needs).items():
            gradient = leaves[name].grad
            if gradient is not None and rows.requires_grad:
                # The gradient of this product with respect to the rows is that of the loss over the batch.
                loss_of_part = loss_of_part + (rows.float() * gradient[mine].float()).sum()
        # Gradients are averaged over processes afterwards.
        (loss_of_part * accelerator.num_processes).backward()
        yield {"loss": loss.detach(), **values}, batch.share


def _first_pass(
    training: Training, batches: Sequence[Batch], seeds: Sequence[int], bad_targets: list[Tensor]
) -> tuple[list[Inputs], list[Signals]]:
    """Run teachers and student; with a graph where one micro-batch is all, without where there will be a second pass.

    Raises:
        OutOfMemoryError: On all processes if it happens on one of them.
    """
    twice, failed = len(batches) > 1, ""
    parts, signals = [], []
    try:
        for seed, batch in zip(seeds, batches, strict=True):
            parts.append(inputs_of(training, batch, bad_targets))
            torch.manual_seed(seed)
            with torch.set_grad_enabled(not twice):
                signals.append(run_student(training, parts[-1]))
    except (RuntimeError, MemoryError) as error:
        if training.sharded or not is_out_of_memory(error):
            raise
        failed = str(error)
    (any_failed,) = all_reduce_max(training.accelerator, bool(failed))
    if any_failed:
        # An error that ``forward_backward`` knows: all processes then halve their micro-batches.
        raise torch.OutOfMemoryError(failed or "reported by another process")
    if twice:
        training.restore_buffers()  # batch statistics count the second pass
    return parts, signals


def _gathered(accelerator: Accelerator, parts: Sequence[Mapping[str, Tensor]], names: Iterable[str]) -> Rows:
    return {name: gather_rows(accelerator, torch.cat([part[name] for part in parts])) for name in names}


def _gathered_labels(accelerator: Accelerator, parts: Sequence[Labels]) -> Labels:
    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        known = [tensor for tensor in tensors if tensor is not None]
        return gather_rows(accelerator, torch.cat(known)) if known else None

    classes_B = joined([part.classes_B for part in parts])
    assert classes_B is not None
    other_B, share_B = joined([part.other_B for part in parts]), joined([part.share_B for part in parts])
    return Labels(classes_B, other_B, share_B, parts[0].labeled, parts[0].weights_C)


def _rows(signals: Signals, needs: Needs) -> Rows:
    """Return the tensors that losses over the batch may read."""
    assert not needs.attention | needs.values, "a loss over the batch reads attention"
    rows = {"logits": signals.logits_BC, **{f"head{n}": one for n, one in enumerate(signals.head_logits)}}
    if needs.pooled and signals.pooled_BD is not None:
        rows["pooled"] = signals.pooled_BD
    for block in sorted(needs.tokens):
        rows |= {
            f"patches{block}": signals.tokens[block].patches_BND,
            f"prefix{block}": signals.tokens[block].prefix_BPD,
        }
    return rows


def _with(signals: Signals, rows: Rows) -> Signals:
    """Return signals of the same kind with other rows."""
    return Signals(
        rows["logits"],
        rows.get("pooled"),
        tokens={
            block: replace(one, patches_BND=rows[f"patches{block}"], prefix_BPD=rows[f"prefix{block}"])
            for block, one in signals.tokens.items()
            if f"patches{block}" in rows
        },
        head_logits=tuple(rows[f"head{number}"] for number in range(len(signals.head_logits))),
    )
