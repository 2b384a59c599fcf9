"""`vppo study`: every arm with every seed, side by side in processes; what is there already is not done again."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.progress import Progress

from vppo.errors import InputError
from vppo.files import write_atomic
from vppo.folders import ELSEWHERE, enter, read_object
from vppo.locks import claimed
from vppo.progress import columns, say
from vppo.study.options import WARM_STEPS, WARM_UP, StudyOptions
from vppo.study.report import show, write_report
from vppo.study.summary import MEANS, summarise, without_nan

PACKAGES = ("torch", "transformers", "trl", "vppo-kernels")
PARTS_OF_A_RUN = {"arm", "seed", "rewards", "products", *MEANS}  # "guess_rate" of the task "guess" alone
Task = tuple[str, str, int]  # "warm" or "train", arm, seed


def run_study(options: StudyOptions) -> dict[str, Any]:
    """Runs what is missing of a study, and writes its report; every file of it is under `options.out`.

    Args:
        options: What to run.

    Returns:
        The contents of `study.json`.

    Raises:
        InputError: `out` holds something else, or a part of it is broken.
        RuntimeError: A run failed; its process has printed why.
    """
    console = Console()
    with claimed(options.out, "--out"):
        _claim(options)
        seeds = range(options.seeds)
        warm = [("warm", "", seed) for seed in seeds if not options.warm_folder(seed).exists()]
        runs = [
            ("train", arm, seed) for seed in seeds for arm in options.arms if not options.run_file(arm, seed).exists()
        ]
        _work_off(options, warm, WARM_STEPS, "warm-up", console)
        _work_off(options, runs, options.steps, "training", console)
        summary = {
            **summarise(options, [read_run(options, arm, seed) for seed in seeds for arm in options.arms]),
            "warm": [
                without_nan(read_object(options.warm_folder(seed) / "warmup.json", remedy=ELSEWHERE)) for seed in seeds
            ],
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.jobs} jobs of one thread",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "date": datetime.now(UTC).date().isoformat(),
            "command": shlex.join(["vppo", *sys.argv[1:]]),
        }
        write_atomic(options.out / "study.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        page = write_report(options.out, summary)
    show(console, summary)
    say(console, f"Report: {page}")
    return summary


def _claim(options: StudyOptions) -> None:
    """Make the folder this study's, or find that it is another's."""
    before = enter(options.out, options.identity, what="run of `vppo study`", known_by={"study"})
    if before is None:
        return
    for name, value in WARM_UP.items():
        if before.get(name) != value:
            got = f"the {name} {before[name]}" if name in before else f"a {name} that it does not tell"
            raise InputError(
                f"--out: the study in {options.out} was begun by another version, with {got}; this one has {value}: "
                f"{ELSEWHERE}"
            )
    for name, value in options.identity.items():
        if before.get(name) != value:
            option = {"study": "task"}.get(name, name.replace("_", "-"))
            raise InputError(
                f"--{option}: got {value!r}, but the study in {options.out} was begun with {before.get(name)!r}"
            )


def read_run(options: StudyOptions, arm: str, seed: int) -> dict[str, Any]:
    """The numbers of one run.

    Raises:
        InputError: Its file is broken.
    """
    file = options.run_file(arm, seed)
    again = f"remove {file}, and the same command makes it anew"
    row = read_object(file, remedy=again)
    if not row.keys() >= PARTS_OF_A_RUN - (set() if options.task == "guess" else {"guess_rate"}):
        raise InputError(f"{file}: is no run of a study; {again}")
    return row


# -- processes ---------------------------------------------------------------------------------------------------------


def _work_off(options: StudyOptions, tasks: Sequence[Task], steps: int, what: str, console: Console) -> None:
    """Does these tasks in `options.jobs` processes, and shows how far they are."""
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")  # torch has threads, which no fork takes along
    todo, done, refused = context.Queue(), context.Value("i", 0), context.SimpleQueue()
    workers = [
        context.Process(target=_worker, args=(options, todo, done, refused, os.getpid()), daemon=True)
        for _ in range(min(options.jobs, len(tasks)))
    ]
    for task in [*tasks, *([None] * len(workers))]:
        todo.put(task)
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")}
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    try:
        for worker in workers:
            worker.start()
        with Progress(*columns(), console=console) as bar:
            shown = bar.add_task(f"{what}, {len(tasks)} of {steps} steps", total=len(tasks) * steps)
            at_work = True
            while at_work:
                workers[0].join(0.2)
                time.sleep(0.0 if workers[0].is_alive() else 0.2)
                bar.update(shown, completed=done.value)
                at_work = any(worker.is_alive() for worker in workers)
                if not refused.empty():
                    raise InputError(refused.get())
                if any(worker.exitcode for worker in workers):
                    raise RuntimeError(f"a process of the study ended with code {[w.exitcode for w in workers]}")
            bar.update(shown, completed=len(tasks) * steps)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _worker(options: StudyOptions, todo: Any, done: Any, refused: Any, parent: int) -> None:
    """One process: takes tasks until there are no more. What is wrong with the study's folder goes to `refused`."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    from vppo.progress import quieten
    from vppo.study.one_run import train, warm

    torch.set_num_threads(1)
    quieten()

    def advance() -> None:
        with done.get_lock():
            done.value += 1

    while (task := todo.get()) is not None:
        kind, arm, seed = task
        try:
            if kind == "warm":
                warm(options, seed, advance)
            else:
                train(options, arm, seed, advance)
        except InputError as error:
            refused.put(str(error))
            sys.exit(1)


def _end_with(parent: int) -> None:
    """Ends this process where the one that started it is gone: a killed study leaves nothing that computes on."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
