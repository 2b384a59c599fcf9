"""The command line. What is heavy is imported where it is used, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from vppo.errors import InputError

main = typer.Typer(
    name="vppo",
    help="Train vision-language models with VPPO: reinforcement learning that rewards looking at the image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a defect shows Python's own traceback, whole
    rich_markup_mode=None,
)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can put right ends as one red line and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except InputError as error:
        typer.secho(f"Error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"vppo-kernels {version('vppo-kernels')}")
        raise typer.Exit


@main.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@main.command()
def demo(
    algorithm: Annotated[
        Literal["vppo", "tas", "tgf", "dapo", "grpo"],
        typer.Option(
            help="vppo: token filtering and advantage shaping. tas: shaping only. tgf: filtering only. dapo, grpo: "
            "neither, as baselines."
        ),
    ] = "vppo",
    divergence: Annotated[
        Literal["kl", "k3", "jsd"],
        typer.Option(help="Dependency of a token, in nats: exact KL, one-sample k3 as published, or exact JSD."),
    ] = "kl",
    perturbation: Annotated[
        Literal["patch", "noise", "blur", "grey"],
        typer.Option(help="How the second view is spoiled: black patches, noise, blur, or all grey."),
    ] = "patch",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 16 prompts x 8 rollouts.")] = 180,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, model, warm-up, sampling and perturbation.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for metrics, report, pictures, model and checkpoints.")] = Path(
        "runs/demo"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out where it stopped.")] = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
) -> None:
    """Train a tiny vision-language model on handwritten digits, in a few minutes on a plain CPU, and report on it."""
    with clear_errors():
        from vppo.demo.run import DemoOptions, run_demo

        run_demo(
            DemoOptions(
                out=out,
                algorithm=algorithm,
                divergence=divergence,
                perturbation=perturbation,
                steps=steps,
                seed=seed,
                resume=resume,
                device=device,
            )
        )


@main.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A training config; see examples/.")],
) -> None:
    """Train a model as a YAML config says. `--key value` after it overrides a key; `--key` alone means true.

    Keys are the fields of VPPOConfig (which are TRL's GRPOConfig's too), of TRL's ModelConfig (LoRA, dtype, attention),
    and: model, dataset, dataset_split, system_prompt, instruction, min_pixels, max_pixels, reward, resume.

    On several GPUs: accelerate launch -m vppo train CONFIG.yaml
    """
    with clear_errors():
        from vppo.train import load_config
        from vppo.train import train as run

        run(load_config(config, context.args))


@main.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measure the kernels beside their peers: the same as `python -m benchmarks`, in a checkout."""
    with clear_errors():
        checkout = Path(__file__).parents[1]
        if not (checkout / "benchmarks" / "cli.py").is_file():
            raise InputError(
                "bench: the benchmarks are not in the installed package; run it in a checkout of the repository, "
                "installed with pip install --editable"
            )
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        from benchmarks.cli import main as run

        run(context.args or ["--help"], program="vppo bench")
