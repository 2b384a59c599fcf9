"""`vppo eval` and its commands. What is heavy is imported where it is used, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

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

evaluation = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Measure how often a model is right on published benchmarks or your own, with error bars and a blind column.",
)
NAMES = "mathverse,dynamath,mmk12,geo3k,mathvision,wemath,logicvista,mmmu_pro"


@evaluation.callback()
def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="A model on the hub, or a folder as save_pretrained writes it. Needed.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for answers, tables and page; a run in it goes on. Needed.")
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(help=f"Published sets, with commas: {NAMES}. All eight, or none where there is --data."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="A set of your own: JSONL, JSON or parquet, a folder, or a hub dataset; may be repeated."),
    ] = None,
    mirror: Annotated[
        Path | None, typer.Option(help="Folder with copies of the published sets' repositories, instead of the hub.")
    ] = None,
    protocol: Annotated[
        Literal["paper", "papo"],
        typer.Option(
            help="Presets. paper: as the paper writes. papo: as its evaluation code runs (top-k 50, mathruler)."
        ),
    ] = "paper",
    limit: Annotated[
        int | None, typer.Option(help="Only so many questions of each set, spread evenly over it.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each question; 8 in both protocols.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; 1 in both protocols, 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of sampling; 1 in both protocols.")] = None,
    top_k: Annotated[int | None, typer.Option(help="The most probable tokens that are drawn from; 0 for all.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The longest answer; 2048 in both protocols.")] = None,
    min_pixels: Annotated[
        int | None, typer.Option(help="Smaller images are enlarged to this many pixels; 0 keeps the processor's limit.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Larger images are reduced to this many pixels; 0 keeps the processor's limit.")
    ] = None,
    graders: Annotated[
        str | None, typer.Option(help="math-verify, mathruler, or both with a comma; the first one counts.")
    ] = None,
    judge: Annotated[Literal["none"], typer.Option(help="No model judges.")] = "none",
    blind: Annotated[
        Literal["grey", "removed", "none"],
        typer.Option(help="The blind column: grey images, no images, or no such column."),
    ] = "grey",
    blind_samples: Annotated[int, typer.Option(help="Answers to each question in the blind column.")] = 1,
    dependency: Annotated[
        int, typer.Option(help="Questions of each set whose answers' visual dependency is measured; 0 for none.")
    ] = 32,
    processes: Annotated[
        int, typer.Option(help="How many answer side by side, each on its own GPUs where there are any.")
    ] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that vLLM spreads one model over.")] = 1,
    sampler: Sampler = "auto",
    seed: Annotated[int, typer.Option(help="Seed of sampling and perturbation.")] = 0,
    memory: Annotated[
        float, typer.Option(help="GiB that transformers may use for caches and activations, beside the weights.")
    ] = 4.0,
    split: Annotated[str, typer.Option(help="Which split of a dataset on the hub that --data names.")] = "test",
    problem_key: ProblemKey = None,
    answer_key: AnswerKey = None,
    image_key: ImageKey = None,
    image_dir: ImageDir = None,
    trust_image_paths: TrustImagePaths = False,
    image_pixel_limit: ImagePixelLimit = None,
    system_prompt: SystemPrompt = None,
    instruction: Instruction = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = None,
    dtype: Dtype = "auto",
    attn_implementation: AttnImplementation = None,
    revision: Revision = "main",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure how often a model is right, with error bars, and how often without looking.

    Answers, tables and a page go to --out; the same command goes on with a run that was stopped.
    """
    given = dict(locals())
    context = given.pop("context")
    if context.invoked_subcommand is not None:
        return
    with clear_errors():
        missing = [f"--{name}" for name in ("model", "out") if given[name] is None]
        if missing:
            raise InputError(f"eval: {' and '.join(missing)} missing; vppo eval --help shows all options")
        from vppo.evaluation.run import evaluate as run
        from vppo.progress import quieten

        quieten()
        run(**_options(given))


# the protocol decides these where they are not given
_PRESET = ["samples", "temperature", "top_p", "top_k", "max_tokens", "min_pixels", "max_pixels", "graders"]
_PRESET += ["system_prompt", "instruction"]


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """What `vppo.evaluation.run.evaluate` takes."""
    found = {name: value for name, value in given.items() if name not in _PRESET or value is not None}
    for name in ("min_pixels", "max_pixels"):
        if found.get(name) == 0:
            found[name] = None
    if "graders" in found:
        found["graders"] = tuple(_words(found["graders"]))
    found["benchmarks"] = None if found["benchmarks"] is None else _words(found["benchmarks"])
    found["data"] = found["data"] or []
    return found


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@evaluation.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder that vppo eval wrote; the base.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    out: Annotated[Path, typer.Option(help="Folder for page, figure and numbers.")] = Path("runs/eval-comparison"),
) -> None:
    """Test whether evaluation B is better than A: question by question, on those that both were asked."""
    with clear_errors():
        from vppo.evaluation.comparison import compare_evaluations

        compare_evaluations(first, second, out)


@evaluation.command()
def grade(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that vppo eval wrote.")],
    graders: Annotated[
        str | None, typer.Option(help="math-verify, mathruler, or both with a comma; the first one counts.")
    ] = None,
) -> None:
    """Grade stored answers anew and write the report anew; no model is needed."""
    with clear_errors():
        from vppo.evaluation.run import regrade

        regrade(folder, None if graders is None else _words(graders))
