"""Options that several commands take: how data is read and a model is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

ProblemKey = Annotated[str | None, typer.Option(help="Column of the problem, if not prompt, problem or question.")]
AnswerKey = Annotated[str | None, typer.Option(help="Column of the answer, if not answer, ground_truth or solution.")]
ImageKey = Annotated[str | None, typer.Option(help="Column of the images, if not images or image.")]
ImageDir = Annotated[
    str | None, typer.Option(help="Folder that image paths are relative to; that of the data if not given.")
]
TrustImagePaths = Annotated[bool, typer.Option("--trust-image-paths", help="Let image paths lead out of that folder.")]
ImagePixelLimit = Annotated[
    int | None, typer.Option(min=1, help="The largest image in pixels; Pillow's bound, 179 million, if not given.")
]
SystemPrompt = Annotated[
    str | None, typer.Option(help="First message of every prompt, empty for none; training's if not given.")
]
Instruction = Annotated[
    str | None, typer.Option(help="What follows every problem, may be empty; training's if not given.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="What weights are loaded as; auto is as they were saved."),
]
AttnImplementation = Annotated[
    str | None, typer.Option(help="sdpa, eager, flash_attention_2, ...; the model's own choice if not given.")
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a model on the hub.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's own code run.")]
Sampler = Annotated[
    Literal["auto", "vllm", "transformers"],
    typer.Option(help="Who samples; auto is vLLM where it is installed and a GPU is there."),
]
