"""Where and with what a measurement was taken."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def machine(device: torch.device) -> dict[str, Any]:
    """CPU model, cores, torch's threads, and the name of the device."""
    cpu = _cpu_model()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": name}


def versions() -> dict[str, str | None]:
    """Of all that takes part; None for what is not installed, or not in a git checkout."""
    packages = {
        "torch": "torch",
        "triton": "triton",
        "trl": "trl",
        "liger": "liger-kernel",
        "vppo-kernels": "vppo-kernels",
    }
    return {
        "python": platform.python_version(),
        **{name: _version(package) for name, package in packages.items()},
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The checkout's commit, with "+" behind it where files differ from it."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
