"""The command line of the benchmarks."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vppo.command_errors import clear_errors
from vppo.errors import InputError
from vppo.files import write_atomic

PROGRAM = "python -m benchmarks"
RESULTS = Path(__file__).parent / "results"

app = typer.Typer(
    name="benchmarks",
    help="Time, working memory and error of the kernels beside their peers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line, and leave the process."""
    arguments = sys.argv[1:]
    app(args=_repeat("--rows", arguments), prog_name=PROGRAM, obj=f"{PROGRAM} {shlex.join(arguments)}")


@app.command("list")
def list_() -> None:
    """Show the suites with their peers, and the presets."""
    from benchmarks.inputs import PRESETS
    from benchmarks.peers import peers
    from benchmarks.suites import load_suite, suite_names

    console = Console()
    for name in suite_names():
        suite = load_suite(name)
        console.print(f"[bold]{name}[/bold]  {suite.summary}")
        if suite.known is not PRESETS:
            console.print(f"  its presets: {', '.join(suite.known)}", highlight=False)
        for peer, module in peers(name).items():
            console.print(f"  {peer:10} {(module.__doc__ or '').splitlines()[0]}", highlight=False)
    console.print("[bold]presets[/bold]  head of a model, vocabulary x width")
    for name, shape in PRESETS.items():
        console.print(f"  {name:10} {shape.vocab:,} x {shape.width:,}", highlight=False)


@app.command()
def run(
    context: typer.Context,
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="What to measure; see list.")],
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where.")] = "cpu",
    preset: Annotated[
        list[str] | None, typer.Option(help="Preset, see list; may be given again. The suite's own choice by default.")
    ] = None,
    peers: Annotated[str | None, typer.Option(help="Names after commas, '' for none; all by default.")] = None,
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows, one number or several. The suite's own choice by default.")
    ] = None,
    backward: Annotated[
        bool | None, typer.Option("--backward/--no-backward", help="With gradients only, or without; both by default.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Time for the timed rounds of a case; 6 on cuda, 30 on cpu.")
    ] = None,
    time_wrong: Annotated[bool, typer.Option("--time-wrong", help="Time what fails its gate, and mark it.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the PNG.")] = RESULTS,
) -> None:
    """Measure a suite, print a table per case, and store the result with its picture."""
    with clear_errors():
        # before torch starts: contestants then share what they free, however large their tensors are
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        import torch

        from benchmarks import prediction
        from benchmarks.contest import Setting
        from benchmarks.harness import run_case
        from benchmarks.machine import machine, versions
        from benchmarks.peers import peers as peers_of
        from benchmarks.plot import png
        from benchmarks.report import LEGEND, CaseResult, Result, case_view
        from benchmarks.suites import load_suite, suite_names

        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no such device here")
        _known("SUITE", [suite], suite_names())
        loaded = load_suite(suite)
        _known("--preset", preset or [], list(loaded.known))
        chosen = list(peers_of(suite)) if peers is None else [name for name in peers.split(",") if name]
        _known("--peers", chosen, list(peers_of(suite)))

        where = torch.device(device)
        settings = [
            Setting(p, n, mode, where)
            for p in preset or loaded.presets(where)
            for n in rows or loaded.rows(p, where)
            for mode in (loaded.modes if backward is None else [backward])
        ]
        result = Result(
            suite=suite,
            device=device,
            presets=list(dict.fromkeys(setting.preset for setting in settings)),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=context.obj or PROGRAM,
            machine=machine(where),
            versions=versions(),
        )
        budget = seconds if seconds is not None else {"cuda": 6.0, "cpu": 30.0}[device]
        path = out / f"{result.stem}.json"
        console = Console()
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        ) as progress:
            task = progress.add_task("preparing", total=len(settings))
            for done, setting in enumerate(settings):

                def report(what: str, share: float, done: int = done) -> None:
                    case = f"case {done + 1} of {len(settings)}"
                    progress.update(task, completed=done + share, description=f"{case}: {what}")

                report("preparing", 0.0)
                case = loaded.case(setting, chosen)
                records = run_case(case, where, budget, report, time_wrong)
                predicted = prediction.of(suite, case.labels) if device == "cuda" else None
                result.cases.append(CaseResult(case.labels, records, predicted))
                console.print(case_view(result.cases[-1]))
                result.save(path)  # what is measured is kept, whatever happens next
        write_atomic(path.with_suffix(".png"), png(result))
        console.print(LEGEND, style="dim")
        console.print(f"{path}\n{path.with_suffix('.png')}", soft_wrap=True, highlight=False)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A stored result.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another, of the same suite.")],
) -> None:
    """Set two results beside each other: medians, and their ratio."""
    with clear_errors():
        from benchmarks.report import Result, compare_view

        first, second = Result.load(a), Result.load(b)
        console = Console()
        console.print(compare_view(first, second))
        if first.machine != second.machine:
            console.print("The machines differ: only the multiples of the floor can be compared.", style="yellow")


@app.command()
def predict(
    gpu: Annotated[str, typer.Option(help="Which: a100, h100, h200, b200.")] = "h100",
    preset: Annotated[list[str] | None, typer.Option(help="Head of a model, see list. 7b and 32b by default.")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of each view.")] = None,
) -> None:
    """Say by a model, right to some 15 % at best, how long our sweeps take on a GPU that is not here."""
    with clear_errors():
        from benchmarks.inputs import PRESETS
        from benchmarks.prediction import GPUS, view

        known = [name for name in GPUS if name != "here"]
        _known("--gpu", [gpu], known)
        _known("--preset", preset or [], list(PRESETS))
        Console().print(view(gpu, preset or ["7b", "32b"], rows or [1024, 4096, 16_384, 32_768]))


@app.command()
def plot(result: Annotated[Path, typer.Argument(metavar="RESULT.json", help="A stored result.")]) -> None:
    """Draw a result again, beside its file."""
    with clear_errors():
        from benchmarks.plot import png
        from benchmarks.report import Result

        print(write_atomic(result.with_suffix(".png"), png(Result.load(result))))


def _repeat(option: str, arguments: list[str]) -> list[str]:
    """`--rows 1 2` as `--rows 1 --rows 2`, which is what typer takes."""
    repeated: list[str] = []
    within = False
    for argument in arguments:
        more = within and argument.isdigit()
        repeated += [option, argument] if more and repeated[-1] != option else [argument]
        within = more or argument == option
    return repeated


def _known(name: str, given: list[str], known: list[str]) -> None:
    for value in given:
        if value not in known:
            raise InputError(f"{name}: got {value!r}, takes one of {known}")
