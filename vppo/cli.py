"""The command line. What is heavy is imported where it is used, so that `--help` answers at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vppo.algorithms import COMMANDS, REGISTRY, summaries
from vppo.cli_options import (
    AnswerKey,
    AttnImplementation,
    Dtype,
    ImageDir,
    ImageKey,
    ImagePixelLimit,
    Instruction,
    ProblemKey,
    Revision,
    Sampler,
    SystemPrompt,
    TrustImagePaths,
    TrustRemoteCode,
)
from vppo.command_errors import clear_errors
from vppo.errors import InputError
from vppo.eval_cli import evaluation
from vppo.study_cli import study

if TYPE_CHECKING:
    AlgorithmName = str
else:
    AlgorithmName = Literal[COMMANDS]

main = typer.Typer(
    name="vppo",
    help="Train vision-language models with VPPO: reinforcement learning that rewards looking at the image; and see "
    "where any of them looks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a defect shows Python's own traceback, whole
    rich_markup_mode=None,
)


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
    algorithm: Annotated[AlgorithmName, typer.Option(help=f"What trains it. {summaries(COMMANDS)}.")] = "vppo",
    divergence: Annotated[
        Literal["kl", "k3", "jsd"] | None,
        typer.Option(
            help="Dependency of a token, in nats: exact KL, one-sample k3 as published, or exact JSD.",
            show_default="the algorithm's own, mostly kl",
        ),
    ] = None,
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
                divergence=divergence or REGISTRY[algorithm].divergence or "kl",
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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Read data, processor and rewards, draw one view, plan the memory, and stop."),
    ] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a dry run, 1 if not given; see vppo plan.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of each of them, 80 if not given.")] = None,
    accelerate: Annotated[
        Path | None, typer.Option(help="The file for accelerate launch --config_file, for a dry run.")
    ] = None,
) -> None:
    """Train a model as a YAML config says. `--key value` after it overrides a key; `--key` alone means true.

    Keys are the fields of VPPOConfig (which are TRL's GRPOConfig's too), of TRL's ModelConfig (LoRA, dtype, attention),
    and: model, dataset, dataset_split, eval_dataset, eval_dataset_split, problem_key, answer_key, image_key,
    image_dir, trust_image_paths, image_pixel_limit, bad_rows, system_prompt, instruction, min_pixels, max_pixels,
    eval_benchmarks (and its _steps, _limit, _samples, _mirror), reward, resume.

    On several GPUs: accelerate launch -m vppo train CONFIG.yaml
    """
    with clear_errors():
        from vppo.train import train as run
        from vppo.train_config import load_config

        if dry_run:
            from vppo.plan.dry_run import dry_run as rehearse

            given = load_config(config, context.args)
            fits = rehearse(given, gpus=gpus, gpu_memory=gpu_memory, accelerate=accelerate)
            raise typer.Exit(0 if fits else 1)
        for name, value in (("gpus", gpus), ("gpu-memory", gpu_memory), ("accelerate", accelerate)):
            if value is not None:
                raise InputError(
                    f"--{name}: got {value}, takes --dry-run beside it; accelerate launch trains on several"
                )
        run(load_config(config, context.args))


@main.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A training config, or a script of overrides for verl (.sh).")
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that train; several shard the model by FSDP2.")],
    gpu_memory: Annotated[float, typer.Option(help="GiB of each.")],
    accelerate: Annotated[
        Path | None, typer.Option(help="The file for accelerate launch --config_file; else every layer is sharded.")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest prompt beside its images; 512 if not given.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=0, help="Images of a prompt; 1 if not given.")] = None,
    image_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an image; those of max_pixels if not given.")
    ] = None,
    reserve: Annotated[
        float, typer.Option(help="Share of a GPU that is kept free, for CUDA, NCCL and fragmentation.")
    ] = 0.08,
    tflops: Annotated[float, typer.Option(help="10^12 operations a second of a GPU; an H100's if not given.")] = 989.0,
    out: Annotated[Path | None, typer.Option(help="Folder for plan.png and plan.json.")] = None,
) -> None:
    """Say whether a run fits its GPUs, before they are rented: its step is simulated, from the model's config alone.

    Ends with code 1 where it does not fit. `--key value` overrides a key of the config, as for vppo train.
    """
    with clear_errors():
        from vppo.plan.run import plan as run
        from vppo.progress import quieten

        quieten()
        fits = run(
            config,
            context.args,
            gpus=gpus,
            gpu_memory=gpu_memory,
            accelerate=accelerate,
            reserve=reserve,
            tflops=tflops,
            out=out,
            text_tokens=text_tokens,
            images=images,
            image_tokens=image_tokens,
        )
        raise typer.Exit(0 if fits else 1)


@main.command()
def analyze(
    model: Annotated[str, typer.Option(help="A model on the hub, or a folder as save_pretrained writes it.")],
    data: Annotated[str, typer.Option(help="Problems: a JSONL or parquet file, a folder of them, or a hub dataset.")],
    out: Annotated[Path, typer.Option(help="Folder for tables, figures and page; a run in it goes on.")],
    responses: Annotated[
        list[Path] | None,
        typer.Option(help="Responses to score, JSONL or parquet; may be repeated. Without any, they are sampled."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems of the data.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses to sample to each problem.")] = 1,
    perturbation: Annotated[
        Literal["patch", "noise", "blur", "grey"],
        typer.Option(help="How the second view is spoiled: black patches, noise, blur, or all grey."),
    ] = "patch",
    patch_size: Annotated[
        int | None, typer.Option(help="Side of a blackened patch in pixels; the model's own patch if not given.")
    ] = None,
    patch_probability: Annotated[float, typer.Option(help="Chance of each patch to be blackened, 0..1.")] = 0.5,
    noise_std: Annotated[float, typer.Option(help="Standard deviation of the noise, on the 0..255 scale.")] = 189.0,
    blur_radius: Annotated[float, typer.Option(help="Standard deviation of the blur, in pixels.")] = 6.0,
    draws: Annotated[
        int, typer.Option(min=1, help="Perturbed views of each problem; from two on, scores have a standard error.")
    ] = 1,
    divergence: Annotated[
        Literal["kl", "k3", "jsd", "reverse_kl"],
        typer.Option(help="What counts as dependency of a token, in nats; all four are in the table."),
    ] = "kl",
    keep_ratio: Annotated[float, typer.Option(help="Fraction of each response that counts as kept.")] = 0.4,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest response that is sampled.")] = 2048,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of sampling, and of both views' logits; 0 samples greedily, scores at 1.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling and perturbation.")] = 0,
    memory: Annotated[
        float,
        typer.Option(help="GiB that sampling and scoring may use for caches and activations, beside the weights."),
    ] = 4.0,
    split: Annotated[str, typer.Option(help="Which split of a dataset on the hub.")] = "train",
    problem_key: ProblemKey = None,
    answer_key: AnswerKey = None,
    image_key: ImageKey = None,
    image_dir: ImageDir = None,
    trust_image_paths: TrustImagePaths = False,
    image_pixel_limit: ImagePixelLimit = None,
    system_prompt: SystemPrompt = None,
    instruction: Instruction = None,
    min_pixels: Annotated[int | None, typer.Option(help="Smaller images are enlarged to this many pixels.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Larger images are reduced to this many pixels.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, ..., or auto to spread the model over all GPUs; a GPU if there is one."),
    ] = None,
    dtype: Dtype = "auto",
    attn_implementation: AttnImplementation = None,
    revision: Revision = "main",
    trust_remote_code: TrustRemoteCode = False,
    sampler: Sampler = "auto",
) -> None:
    """See where a model looks: how much each token of its responses depends on the image.

    No training is needed. Tables, figures and a page go to --out; the same command goes on with a run that was stopped.
    """
    given = dict(locals())
    with clear_errors():
        from vppo.analysis.run import analyze as run
        from vppo.progress import quieten

        quieten()
        prompts = ("system_prompt", "instruction")
        named = {"model": given.pop("model"), "data": given.pop("data"), "responses": given.pop("responses") or ()}
        run(**named, **{name: value for name, value in given.items() if name not in prompts or value is not None})


@main.command()
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR DIR ...", help="Folders that vppo analyze wrote; the first is the base."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for figures, table and page.")] = Path("runs/comparison"),
) -> None:
    """Put several analyses side by side: one page with a table and every figure over all of them.

    Runs that answered the same questions are compared on those alone.
    """
    with clear_errors():
        from vppo.analysis.comparison import compare as run

        print(run(folders, out))


main.add_typer(evaluation, name="eval")
main.command()(study)


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
        # a program of its own: the benchmarks use this package, which imports nothing of theirs
        paths = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "benchmarks", *(context.args or ["--help"])]
        raise typer.Exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}).returncode)
