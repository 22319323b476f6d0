"""Check what matters to a run on this machine."""

import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from remap import __version__
from remap.io.human_size import number_of
from remap.io.versions import PACKAGES, version_of


def examine() -> dict[str, Any]:
    """Return checks with a state ("ok", "note", "bad"); ``ok`` is False when one is bad. Needs no network."""
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    checks = [_row("ok", "python", python), *_packages(), *_devices(), _precision(), *_kernels()]
    checks += [_hub(), _token(), _own_cache(), _disk(), _writable(), _mini()]
    return {"ok": all(check["state"] != "bad" for check in checks), "checks": checks}


def _row(state: str, what: str, found: str) -> dict[str, str]:
    return {"state": state, "what": what, "found": found}


def _packages() -> list[dict[str, str]]:
    rows = [_row("ok", "remap", __version__)]
    # A missing package is reported here, not by an import error in the middle of a run.
    for name in PACKAGES:
        version = version_of(name)
        rows.append(_row("bad" if version == "missing" else "ok", name, version))
    return rows


def _devices() -> list[dict[str, str]]:
    import torch

    if not torch.cuda.is_available():
        cores, threads = number_of(os.cpu_count() or 1, "CPU core"), number_of(torch.get_num_threads(), "thread")
        return [_row("note", "GPU", f"none; {cores}, {threads}")]
    return [
        _row("ok", f"GPU {i}", f"{p.name}, {p.total_memory / 1e9:.1f} GB")
        for i, p in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    ]


def _precision() -> dict[str, str]:
    import torch

    from remap.distributed.launch import use_bf16

    # The device that a run would choose.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    word = "bf16" if use_bf16("auto", device) else "fp32"
    why = {"bf16": ": the processor has avx512_bf16 or AMX", "fp32": ": the processor has neither avx512_bf16 nor AMX"}
    return _row("ok", "precision 'auto'", word + (why[word] if device.type == "cpu" else ""))


def _kernels() -> list[dict[str, str]]:
    import torch

    from remap.backbones.kernels import COMPILED_FROM, fused_attention
    from remap.distributed.launch import use_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16, texts = use_bf16("auto", device), []
    for word, trains in (("training", True), ("forward", False)):
        # 197: at 224 px a ViT has 14 x 14 patches of 16 px, and a class token.
        fused, why = fused_attention("auto", device.type, bf16=bf16, trains=trains, tokens=197)
        texts.append(f"{word}: {'fused' if fused else 'explicit'} ({why})")
    least = COMPILED_FROM.get(device.type)
    when = "off here" if least is None else f"in runs of {least:,} steps and more"
    return [_row("ok", "attention of a ViT at 224 px", "; ".join(texts)), _row("ok", "compile 'auto'", when)]


def _hub() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    folder = Path(HF_HUB_CACHE)
    # Only counted: nothing is downloaded to find out.
    count = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    return _row(
        "ok", "hub cache", f"{folder}: {number_of(count, 'model')}{', offline by setting' if HF_HUB_OFFLINE else ''}"
    )


def _token() -> dict[str, str]:
    from huggingface_hub import get_token

    return _row("ok", "hub token", "present" if get_token() else "none (needed for gated models only)")


def _own_cache() -> dict[str, str]:
    """Where teacher outputs and prepared teachers are cached; the folder is made by the first run that needs it."""
    from remap.cache.cache_folders import cache_root

    folder = cache_root()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is not a folder"
        return _row("note", "remap's cache", f"{folder}: {there} {why}; name another one in REMAP_CACHE")
    return _row("ok", "remap's cache", f"{folder}, {shutil.disk_usage(there).free / 1e9:.1f} GB free on its disk")


def _disk() -> dict[str, str]:
    # A run of a large backbone with full tuning needs gigabytes of checkpoints.
    free = shutil.disk_usage(".").free
    return _row("ok" if free > 2e9 else "note", "disk here", f"{free / 1e9:.1f} GB free")


def _writable() -> dict[str, str]:
    try:
        # By making a file: permission bits do not tell of a disk that is mounted read-only.
        with tempfile.TemporaryFile(dir="."):
            return _row("ok", "this folder", "can be written")
    except OSError as error:
        return _row("note", "this folder", f"cannot be written ({error.strerror}); use --output")


def _mini() -> dict[str, str]:
    from remap.backbones.mini import default_cfgs

    files = {name: configs.default.file for name, configs in default_cfgs.items()}
    missing = [name for name, file in files.items() if file is not None and not Path(file).is_file()]
    found = f"missing: {', '.join(missing)}" if missing else "all there"
    return _row("bad" if missing else "ok", "embedded weights", found)
