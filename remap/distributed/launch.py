"""One process or many: the only place that starts Accelerate."""

import atexit
import functools
import math
import os
import re
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from remap.distributed import launcher_env
from remap.errors import RunError, TrainingError

# Seconds that a process waits for the others at the start, when one may still read PyTorch from a slow disk.
STARTING = 1800.0
# And afterwards, unless the variable says otherwise.
TIMEOUT, VARIABLE = 600.0, "REMAP_TIMEOUT"
LONGEST = 10 * 365 * 86400


class ProcessLost(TrainingError):
    """Another process of the run ended or went silent; its own message, if it had one, says why."""

    exit_code = 3


@functools.cache
def accelerator() -> Accelerator:
    """The process group of this run; device and ranks come from the launcher's environment.

    Raises:
        TrainingError: There are fewer GPUs than processes, or the launcher asks for what is not supported, or says
            what cannot be.
    """
    limit = _timeout()
    _require_supported()
    launcher_env.require_complete()
    _require_devices(launcher_env.number("LOCAL_WORLD_SIZE", 1))
    if launcher_env.number("WORLD_SIZE", 1) > 1 and not torch.accelerator.is_available():
        launcher_env.require_interface()
    atexit.register(_leave_group)
    starting = InitProcessGroupKwargs(timeout=timedelta(seconds=max(STARTING, limit)))
    # Told nothing, Accelerate leaves the processes of a launcher on a machine without a GPU each to itself.
    on_cpu = not torch.accelerator.is_available()
    try:
        # The recipe alone decides the precision, whatever a saved configuration of the launcher says.
        found = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[starting])
    except ValueError as error:  # about other variables, such as MASTER_PORT
        what, do = "Accelerate cannot start", "look at the environment variables ACCELERATE_* and MASTER_*"
        if launcher_env.number("WORLD_SIZE", 1) > 1:
            what = "the launcher's processes cannot be brought together"
            do = "start them with torchrun or with `remap ... --devices N`"
        raise TrainingError(what, given=str(error)[:200], do=do) from error
    if found.num_processes > 1:
        found.wait_for_everyone()
        _limit_waits(timedelta(seconds=limit))
    return found


def _timeout() -> float:
    word = os.environ.get(VARIABLE, "")
    try:
        seconds = float(word) if word else TIMEOUT
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST:
        raise TrainingError(
            f"{VARIABLE} must be a number of seconds",
            given=word,
            allowed=f"above 0, at most {LONGEST} (ten years); {TIMEOUT:g} unless it is set",
        )
    return seconds


def _require_supported() -> None:
    for name in ("DeepSpeed", "Megatron_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            raise TrainingError(
                f"the configuration of accelerate launch asks for {name.replace('_', '-')}, which is not supported",
                do="choose another distributed_type with `accelerate config`, or start with `remap ... --devices N`",
            )


def _require_devices(count: int) -> None:
    """One GPU to a process; without any GPU, processes share the CPU."""
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if gpus and count > gpus:
        raise TrainingError(
            f"{count} processes on a machine with {gpus} GPU{'s' if gpus > 1 else ''}",
            allowed=f"one process a GPU: --devices {gpus}",
        )


def _limit_waits(limit: timedelta) -> None:
    if hasattr(torch.distributed, "set_timeout"):  # PyTorch 2.15
        torch.distributed.set_timeout(limit)
    else:
        torch.distributed.distributed_c10d._set_pg_timeout(limit, None)


def _leave_group() -> None:
    """Close the process group in order: torn down by the interpreter's exit, a rank may abort after all went well."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_processes(wanted: int | None) -> None:
    """Compare the number of processes with what was asked for.

    Raises:
        TrainingError: They differ; some launchers start fewer processes than asked for without a word.
    """
    running = accelerator().num_processes
    launched = launcher_env.number("WORLD_SIZE", 1)
    if launched != running:
        raise TrainingError(
            f"the launcher started {launched} processes, but {running} found each other",
            given=f"WORLD_SIZE={launched}",
            do=f"start it with torchrun or with `remap ... --devices {launched}`; or unset WORLD_SIZE for one process",
        )
    if wanted is not None and wanted != running:
        launched = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]  # there, --devices starts nothing
        leave_out = f"env {' '.join(f'-u {name}' for name in launched)} " if launched else ""
        none = "no launcher (WORLD_SIZE is not set)"
        if "ACCELERATE_DYNAMO_MODE" in os.environ:
            none = "accelerate launch, which started one process; with --cpu it starts no more"
        raise TrainingError(
            f"this run asks for {wanted} processes and has {running}",
            given=", ".join(f"{name}={os.environ[name]}" for name in launched) or none,
            do=f"without a launcher: {leave_out}remap ... --devices {wanted}\n"
            f"           or: torchrun --nproc-per-node {wanted} -m remap_cli ...",
        )


def require_one_process(what: str, do: str) -> None:
    """What several processes would each do again.

    Args:
        what: Says so, as the first line of the message.

    Raises:
        RunError: There are several.
    """
    running = accelerator().num_processes
    if running > 1:
        raise RunError(what, given=f"{running} processes", do=do)


def broadcast_str(text: str) -> str:
    """The first process's text, on all of them; every process has to call it."""
    if accelerator().num_processes == 1:
        return text
    device = accelerator().device
    told = torch.frombuffer(bytearray(os.fsencode(text)), dtype=torch.uint8).to(device)
    length = torch.tensor([len(told)], device=device)
    torch.distributed.broadcast(length, src=0)
    if not accelerator().is_main_process:
        told = torch.empty(int(length), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(told, src=0)
    return os.fsdecode(bytes(told.tolist()))


def lost_process(error: BaseException | None) -> ProcessLost | None:
    """What an error of a collective call means; None for one that comes of something else."""
    while error is not None and not _is_of_group(error):
        error = error.__cause__ or error.__context__
    if error is None or isinstance(error, ProcessLost):
        return error
    # "[.../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:20868. This is typically ..."
    said = re.sub(r"^\[\S+\]\s*", "", str(error)).partition("\n")[0].partition(". ")[0]
    what = "does not answer" if "timed out" in said.lower() else "has ended"
    return ProcessLost(f"another process of this run {what} ({said[:200]})")


def _is_of_group(error: BaseException) -> bool:
    distributed = getattr(torch.distributed, "DistError", ())
    broken = type(error) is RuntimeError and "/gloo/" in str(error)  # Gloo's errors have no type of their own
    return broken or isinstance(error, (ProcessLost, distributed))


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: asked for, or "auto" on a GPU that has it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"
