"""Several processes that answer side by side, each a share of the questions, and each on GPUs of its own."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vppo.errors import InputError
from vppo.evaluation.options import EvaluationOptions

POLL = 0.5  # seconds between two looks at the processes


def run_side_by_side(
    model: str,
    names: Sequence[str],
    data: Sequence[str | Path],
    options: EvaluationOptions,
    folder: Path,
    watch: Callable[[], None],
) -> None:
    """Answers in `options.processes` processes; returns when all have done their share.

    Args:
        model, names, data, options: What is evaluated on what, see `vppo.evaluation.run.evaluate`.
        folder: Of the evaluation.
        watch: Called again and again while they work.

    Raises:
        InputError: There are fewer GPUs than were asked for, or a process could not do its share; the others are ended.
    """
    shares = gpu_shares(options)
    context = multiprocessing.get_context("spawn")
    said: Any = context.Queue()
    started: list[Any] = []
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        for number in range(options.processes):
            if shares:
                os.environ["CUDA_VISIBLE_DEVICES"] = shares[number]
            arguments = (number, os.getpid(), said, model, list(names), list(data), options, folder)
            process = context.Process(target=_work, args=arguments, name=f"vppo-eval-{number}")
            process.start()
            started.append(process)
        while any(process.is_alive() for process in started):
            watch()
            if any(process.exitcode for process in started):
                break
            time.sleep(POLL)
        watch()
        for number, process in enumerate(started):
            if process.exitcode:
                raise InputError(_message(said, number, options.processes, process.exitcode))
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
                process.join(10)
                process.kill()
            process.join()
        if shares:
            _restore("CUDA_VISIBLE_DEVICES", before)


def _message(said: Any, number: int, processes: int, code: int) -> str:
    try:
        return str(said.get(timeout=1))
    except queue.Empty:
        return (
            f"process {number + 1} of {processes} has ended (exit code {code}); what it said is the reason. The same "
            "command goes on with the answers that are there"
        )


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def gpu_shares(options: EvaluationOptions) -> list[str]:
    """The GPUs of each process, as `CUDA_VISIBLE_DEVICES` takes them; none where nothing computes on one.

    Raises:
        InputError: There are too few.
    """
    if (options.device or "cuda").split(":")[0] != "cuda" or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    each = options.tensor_parallel
    if options.processes * each > len(devices):
        raise InputError(
            f"processes: got {options.processes} of {each} GPU{'s' if each > 1 else ''} each, takes at most "
            f"{len(devices) // each}: there are {len(devices)}"
        )
    return [",".join(devices[number * each : (number + 1) * each]) for number in range(options.processes)]


def _work(
    number: int,
    parent: int,
    said: Any,
    model: str,
    names: list[str],
    data: list[Any],
    options: EvaluationOptions,
    folder: Path,
) -> None:
    """What one process does."""
    from vppo.analysis.model import Subject
    from vppo.evaluation.benchmarks import load_benchmarks
    from vppo.evaluation.store import Store
    from vppo.evaluation.work import Worker
    from vppo.progress import quieten

    quieten()
    torch.set_num_threads(max(1, torch.get_num_threads() // options.processes))
    try:
        benchmarks = load_benchmarks(names, data, options.data, options.mirror)
        Worker(Subject(model, options.analysis), benchmarks, options, Store(folder, number), number, parent).run()
    except InputError as error:
        said.put(str(error))
        said.close()
        said.join_thread()
        raise SystemExit(2) from error
