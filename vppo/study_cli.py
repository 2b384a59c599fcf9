"""`vppo study`. What is heavy is imported where it is used, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vppo.command_errors import clear_errors

NAMES = "dapo,tgf,vppo,k3,random,entropy,oracle,gate,gate4,tas"


def study(
    out: Annotated[Path, typer.Option(help="Folder for runs, table and page; a study in it goes on.")],
    arms: Annotated[
        str,
        typer.Option(
            help="What is compared, with commas. gate keeps tokens above 1 nat, gate4 by the mean of 4 draws."
        ),
    ] = NAMES,
    seeds: Annotated[int, typer.Option(help="Seeds of each arm, from 0; more can be added later.")] = 10,
    jobs: Annotated[int, typer.Option(help="Runs side by side, each on one thread.")] = 2,
    task: Annotated[
        Literal["narrated", "guess"],
        typer.Option(
            help="narrated: read three digits among free words, and add. guess: is the sum odd? One may guess."
        ),
    ] = "narrated",
    steps: Annotated[int, typer.Option(help="Training steps of 8 prompts x 8 rollouts.")] = 100,
    held_out: Annotated[int, typer.Option(help="Held-out questions, each answered eight times.")] = 256,
) -> None:
    """Compare ways to choose the tokens that carry gradient, over several seeds, on a task of a minute a run.

    The same command goes on with a study that was stopped; more arms and seeds may be added to it.
    """
    with clear_errors():
        from vppo.progress import quieten
        from vppo.study.options import StudyOptions
        from vppo.study.run import run_study

        options = StudyOptions(
            out, tuple(arm.strip() for arm in arms.split(",") if arm.strip()), seeds, jobs, task, steps, held_out
        )
        quieten()
        run_study(options)
