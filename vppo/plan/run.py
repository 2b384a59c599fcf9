"""`vppo plan`: a training config, so many GPUs, and whether they are enough."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vppo.errors import InputError
from vppo.plan.settings import Settings, from_config, read_accelerate
from vppo.prefix_sharing import GIB

RESERVE = 0.08  # of a GPU: the CUDA context, buffers of NCCL, and what lies between tensors; a guess, not a measurement
TERAFLOPS = 989.0  # an H100 SXM in 16 bits without sparsity, as its maker states it


def plan(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    gpus: int,
    gpu_memory: float,
    accelerate: Path | None = None,
    reserve: float = RESERVE,
    tflops: float = TERAFLOPS,
    out: Path | None = None,
    **sizes: int | None,
) -> bool:
    """Plans a run, prints what was found and saves it.

    Args:
        config: A training config, or a script of overrides for verl.
        overrides: As `vppo train` takes them.
        gpus: That train, one process each.
        gpu_memory: GiB of each.
        accelerate: The file that `accelerate launch --config_file` is given.
        reserve: Share of a GPU that nothing planned may take.
        tflops: 10^12 operations a second of a GPU, as its maker states them.
        out: A folder for `plan.png` and `plan.json`.
        **sizes: `text_tokens`, `images`, `image_tokens` of a prompt.

    Returns:
        Whether it fits.

    Raises:
        InputError: A setting cannot be used.
    """
    if config.suffix == ".sh":
        from vppo.plan.verl_settings import read_overrides, settings_of

        settings = settings_of(read_overrides(config, overrides), gpus=gpus, **sizes)
    else:
        from vppo.train_config import load_config

        given = read_accelerate(accelerate) if accelerate else None
        settings = from_config(load_config(config, overrides), gpus=gpus, accelerate=given, **sizes)
    return report(settings, gpu_memory=gpu_memory, reserve=reserve, tflops=tflops, out=out)


def report(
    settings: Settings,
    *,
    gpu_memory: float,
    reserve: float = RESERVE,
    tflops: float = TERAFLOPS,
    out: Path | None = None,
) -> bool:
    """Prints and saves the plan of settings; see `plan`."""
    from rich.console import Console

    from vppo.plan.estimate import estimate, largest_micro_batch
    from vppo.plan.report import Report
    from vppo.plan.sampler import sampler_memory

    for name, value, most in (("gpu-memory", gpu_memory, 1e6), ("reserve", reserve, 1.0), ("tflops", tflops, 1e6)):
        if not 0 <= value < most or (name != "reserve" and value == 0):
            raise InputError(f"--{name}: got {value:g}, takes a number above 0 and below {most:g}")
    console: Any = Console()
    whole = gpu_memory * GIB
    with console.status("Simulating a step"):
        found = estimate(settings)
        sampler = sampler_memory(settings, found.parameters, whole)
        room = whole * (1 - reserve) - sampler.held
        largest = largest_micro_batch(settings, room, found)
    made = Report(found, sampler, whole, whole * reserve, largest, tflops)
    made.print(console)
    if out is not None:
        made.save(out)
        console.print(f"Saved {out / 'plan.png'} and {out / 'plan.json'}", highlight=False)
    return made.fits
