"""`python -m vppo_kernels`: what is installed here and what runs on it; put it into bug reports."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from vppo_kernels import backends, native_library, tiling

PACKAGES = ("vppo-kernels", "torch", "triton", "apache-tvm-ffi", "numpy")


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{torch.get_num_threads()} threads, torch's instruction set {torch.backends.cpu.get_cpu_capability()}"
    for index in range(torch.cuda.device_count()):
        chip = torch.cuda.get_device_properties(index)
        memory = f"{chip.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}", f"{chip.name}, {memory}, compute capability {chip.major}.{chip.minor}"


def _libraries() -> Iterator[tuple[str, str]]:
    for device in ("cpu", "cuda"):
        reason = native_library.missing(device)
        if not reason and device == "cpu":
            loaded = native_library.library(device)
            yield device, f"instruction set {loaded.instructions()}, {loaded.threads()} threads"
        yield device, reason or f"built by {native_library.built_by(device)}"


def _backends() -> Iterator[tuple[str, str]]:
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.float64):
            auto = backends.resolve("auto", torch.device(device), dtype).name
            names = ", ".join(backends.available(device, dtype))
            yield f"{device}, {str(dtype).removeprefix('torch.')}", f"{names}; auto is {auto}"


def main() -> None:
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "native library": _libraries(),
        "backends": _backends(),
        "memory": [("workspace", f"{tiling.current_workspace() / tiling.MIB:.0f} MiB")],
    }
    for title, lines in sections.items():
        print(title)
        for name, text in lines:
            print(f"  {name:16} {text}")


if __name__ == "__main__":
    main()
