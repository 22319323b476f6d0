"""One process or many: the only module that starts Accelerate."""

import atexit
import functools
import math
import os
import re
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from remap.distributed import launcher_env
from remap.distributed.collectives import all_gather_json
from remap.errors import RunError, TrainingError
from remap.io.human_size import number_of

# Seconds that a process waits for the others at the start, when one may still read PyTorch from a slow disk; and
# afterwards, unless the variable says otherwise.
START_TIMEOUT_S, TIMEOUT_S, VARIABLE = 1800.0, 600.0, "REMAP_TIMEOUT"
LONGEST_TIMEOUT_S = 10 * 365 * 86400


class ProcessLost(TrainingError):
    """Another process of the run ended or went silent; its own message, if it had one, says why."""

    exit_code = 3


@functools.cache
def accelerator() -> Accelerator:
    """Return the process group of this run; device and ranks come from the launcher's environment.

    Raises:
        TrainingError: There are fewer GPUs than processes, the launcher asks for something that is not supported, or
            its variables are not possible.
    """
    # Read first: a wrong value is an error before anything waits.
    limit = _timeout()
    _require_supported()
    launcher_env.require_complete()
    # The interpreter takes modules down in any order; the group must be closed before.
    atexit.register(_leave_group)
    # The long limit is for meeting; it is shortened once all processes are there.
    starting = InitProcessGroupKwargs(timeout=timedelta(seconds=max(START_TIMEOUT_S, limit)))
    # By default Accelerate does not join the processes of a launcher on a machine without a GPU.
    on_cpu = not torch.accelerator.is_available()
    try:
        # The recipe alone decides the precision, whatever a saved configuration of the launcher says.
        found = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[starting])
    except ValueError as error:  # about other variables, such as MASTER_PORT
        advice = "look at the environment variables ACCELERATE_* and MASTER_*, which launchers set"
        raise TrainingError("Accelerate cannot start", given=str(error)[:200], do=advice) from error
    if found.num_processes > 1:
        found.wait_for_everyone()
        # The function has a public name from PyTorch 2.15 on.
        set_timeout = getattr(torch.distributed, "set_timeout", torch.distributed.distributed_c10d._set_pg_timeout)
        set_timeout(timedelta(seconds=limit), None)
    return found


def _timeout() -> float:
    word = os.environ.get(VARIABLE) or str(TIMEOUT_S)
    try:
        seconds = float(word)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_TIMEOUT_S:
        raise TrainingError(
            f"{VARIABLE} must be a number of seconds",
            given=word,
            allowed=f"above 0, at most {LONGEST_TIMEOUT_S} (ten years); {TIMEOUT_S:g} unless it is set",
        )
    return seconds


def _require_supported() -> None:
    """Refuse other engines of Accelerate, and more processes than GPUs; without any GPU, processes share the CPU."""
    for name in ("DeepSpeed", "Megatron_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            raise TrainingError(
                f"the configuration of accelerate launch asks for {name.replace('_', '-')}, which is not supported",
                do="choose another distributed_type with `accelerate config`, or start with `remap ... --devices N`",
            )
    count = launcher_env.number("LOCAL_WORLD_SIZE", 1)
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if gpus and count > gpus:
        raise TrainingError(
            f"{count} processes on a machine with {number_of(gpus, 'GPU')}",
            allowed=f"one process a GPU: --devices {gpus}",
        )


def _leave_group() -> None:
    """Close the process group in order: torn down by the interpreter's exit, a rank may abort after all went well."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_processes(wanted: int | None) -> None:
    """Compare the number of processes with the one that was requested.

    Raises:
        TrainingError: They differ; some launchers silently start fewer processes than requested.
    """
    running, launched = accelerator().num_processes, launcher_env.number("WORLD_SIZE", 1)
    if launched == running and wanted in (None, running):
        return
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    unset = f"env {' '.join(f'-u {name}' for name in given)} " if given else ""  # with these, --devices starts nothing
    no_launcher = "no launcher (WORLD_SIZE is not set)"
    if "ACCELERATE_DYNAMO_MODE" in os.environ:
        no_launcher = "accelerate launch, which started one process; with --cpu it starts no more"
    wanted = launched if wanted is None else wanted
    raise TrainingError(
        f"this run asks for {wanted} processes and has {running}",
        given=", ".join(f"{name}={os.environ[name]}" for name in given) or no_launcher,
        do=f"without a launcher: {unset}remap ... --devices {wanted}\n"
        f"           or: torchrun --nproc-per-node {wanted} -m remap_cli ...",
    )


def require_one_process(what: str, do: str) -> None:
    """Raise a RunError that says ``what`` and advises ``do`` in several processes, which would all do the same."""
    running = accelerator().num_processes
    if running > 1:
        raise RunError(what, given=f"{running} processes", do=do)


def broadcast_str(text: str) -> str:
    """Return the first process's text on all of them; every process has to call it."""
    return str(all_gather_json(accelerator(), text)[0])


def lost_process(error: BaseException | None) -> ProcessLost | None:
    """Return what an error of a collective call means, or None for an error with another cause."""
    while error is not None and not _is_of_group(error):
        error = error.__cause__ or error.__context__
    if error is None or isinstance(error, ProcessLost):
        return error
    # As in "[.../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:20868. This is typically ..."
    said = re.sub(r"^\[\S+\]\s*", "", str(error)).partition("\n")[0].partition(". ")[0]
    what = "does not answer" if "timed out" in said.lower() else "has ended"
    return ProcessLost(f"another process of this run {what} ({said[:200]})")


def _is_of_group(error: BaseException) -> bool:
    distributed = getattr(torch.distributed, "DistError", ())
    broken = type(error) is RuntimeError and "/gloo/" in str(error)  # Gloo's errors have no type of their own
    return broken or isinstance(error, (ProcessLost, distributed))


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """Return where to compute, checked; None is the accelerator if there is one, else the CPU.

    Raises:
        RunError: PyTorch does not know the device, or cannot use it here.
    """
    if device is None:
        # Checked: a PyTorch that was built for GPUs also runs where there is none.
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"cannot compute on {device}: {reason}", do="name cpu, or a device of this machine") from error
    return found


def use_bf16(precision: str, device: torch.device) -> bool:
    """Return whether to autocast to bfloat16: requested, or "auto" on a GPU or processor that computes in it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_multiplies_bf16()


def cpu_multiplies_bf16() -> bool:
    """Return whether the processor multiplies bfloat16 itself (avx512_bf16 or AMX); others are faster in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
