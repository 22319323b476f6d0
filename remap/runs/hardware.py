"""What of PyTorch and the hardware decides the last bits of a sum, for environment.json; nothing private."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from remap.distributed.launch import accelerator

# Variables that choose other kernels or other orders of summation.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_NUM_THREADS",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def machine() -> dict[str, Any]:
    """Return processes, device, threads, instruction set, PyTorch's build, GPUs and what else chooses kernels."""
    found: dict[str, Any] = {
        "processes": accelerator().num_processes,
        "device": accelerator().device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_build": _build(),
        "settings": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if torch.cuda.is_available():
        devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        found["gpus"] = [f"{p.name} (compute capability {p.major}.{p.minor})" for p in devices]
        found["gpu_driver"] = _driver()
    return found


def _build() -> dict[str, str]:
    """Return the versions PyTorch was built with; its version may have a suffix that pip does not know."""
    text = torch.__config__.show()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = torch.backends.cudnn.version()
    for name, pattern in (("mkl", r"Math Kernel Library Version (\S+)"), ("onednn", r"MKL-DNN v(\S+)")):
        match = re.search(pattern, text)
        versions[name] = match[1] if match else None
    return {name: str(version) for name, version in versions.items() if version is not None}


def _driver() -> str:
    """Return the version of the GPU's kernel module."""
    try:
        match = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        match = None
    return match[0] if match else "unknown"
