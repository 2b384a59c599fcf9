"""What an evaluation can be told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vppo.analysis.options import SAMPLERS, AnalysisOptions
from vppo.data import DataOptions
from vppo.errors import InputError
from vppo.evaluation.graders import check_graders
from vppo.evaluation.protocols import PROTOCOLS

BLIND = ("grey", "removed", "none")
JUDGES = ("none",)
# what no single answer is changed by: where things are, how many answers there are, and what is made of them
FREE = ("protocol", "graders", "judge", "processes", "memory", "mirror", "dependency", "image_dir", "trust_image_paths",
        "limit", "samples", "blind", "blind_samples")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(DataOptions):
    """What `vppo eval` can be told, beside how rows become problems (the fields of `vppo.data.DataOptions`).

    Attributes:
        protocol: Whose presets these are, see `vppo.evaluation.protocols`; a word for the report.
        limit: Only so many questions of each set, spread evenly over it; None for all.
        samples: Answers to each question.
        temperature: Divides the logits; 0 takes the most probable token each time.
        top_p: Only the most probable tokens that together reach this probability are drawn from, in (0, 1].
        top_k: Only so many of the most probable tokens are drawn from; 0 for all.
        max_tokens: The longest answer.
        min_pixels: Smaller images are enlarged to this many pixels; None keeps the processor's own limit.
        max_pixels: Larger images are reduced to this many pixels; None keeps the processor's own limit.
        graders: Who says what is right: "math-verify", "mathruler"; the first one counts, and where others disagree
            with it the report lists the answers.
        judge: Only "none": no model judges.
        blind: What the model is shown in the blind column: "grey" images of the same size, "removed" images; "none"
            leaves the column out.
        blind_samples: Answers to each question in the blind column.
        dependency: How many questions of each set have the visual dependency of their answers measured; 0 for none.
        seed: Of sampling and perturbation.
        processes: How many sample side by side; where there are GPUs, each has its own share of them.
        tensor_parallel: GPUs that one model of vLLM is spread over.
        sampler: "vllm", "transformers", or "auto": vLLM where it is installed and a GPU is there.
        memory: GiB that sampling by transformers, and scoring, may use for caches and activations.
        device: "cpu", "cuda", ...; None for a GPU where there is one.
        dtype: Of the weights: "auto" for the checkpoint's own, "float32", "bfloat16" or "float16".
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; None for the model's own choice.
        revision: Branch, tag or commit of a model on the hub.
        trust_remote_code: Whether the model's own code may run.
        mirror: A folder with copies of the hub's repositories of the published sets; None asks the hub.

    Raises:
        InputError: A value is out of range; the message names it, what it got and what it takes.
    """

    protocol: str = "paper"
    limit: int | None = None
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 2048
    min_pixels: int | None = None
    max_pixels: int | None = None
    graders: tuple[str, ...] = ("math-verify",)
    judge: str = "none"
    blind: str = "grey"
    blind_samples: int = 1
    dependency: int = 32
    seed: int = 0
    processes: int = 1
    tensor_parallel: int = 1
    sampler: str = "auto"
    memory: float = 4.0
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str = "main"
    trust_remote_code: bool = False
    mirror: str | Path | None = None
    split: str = "test"

    @classmethod
    def of(cls, protocol: str, **given: Any) -> EvaluationOptions:
        """The presets of a protocol, and over them what is given.

        Raises:
            InputError: There is no such protocol, or a value is out of range.
        """
        if protocol not in PROTOCOLS:
            raise InputError(f"protocol: got {protocol!r}, takes one of {list(PROTOCOLS)}")
        return cls(protocol=protocol, **{**PROTOCOLS[protocol], **given})

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = {"limit": 1, "samples": 1, "max_tokens": 1, "blind_samples": 1, "processes": 1, "tensor_parallel": 1}
        for name, least in {**whole, "top_k": 0, "dependency": 0, "seed": 0, "min_pixels": 1, "max_pixels": 1}.items():
            value = getattr(self, name)
            if value is None and name in ("limit", "min_pixels", "max_pixels"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}: got {value!r}, takes a whole number from {least}")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise InputError(f"min_pixels: got {self.min_pixels}, takes at most max_pixels, which is {self.max_pixels}")
        for name, choices in (("blind", BLIND), ("judge", JUDGES), ("sampler", SAMPLERS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: got {getattr(self, name)!r}, takes one of {list(choices)}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature: got {self.temperature!r}, takes a number from 0")
        for name in ("samples", "blind_samples"):
            if self.temperature == 0 and getattr(self, name) > 1:
                raise InputError(
                    f"{name}: got {getattr(self, name)}, takes 1 at temperature 0, where all would be the same"
                )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: got {self.top_p!r}, takes a number above 0 and at most 1")
        if not 0 < self.memory < math.inf:
            raise InputError(f"memory: got {self.memory!r}, takes a number of GiB above 0")
        check_graders(self.graders)

    @property
    def data(self) -> DataOptions:
        """How rows become problems."""
        return DataOptions(**{field.name: getattr(self, field.name) for field in fields(DataOptions)})

    @property
    def analysis(self) -> AnalysisOptions:
        """How the model is loaded, and how the dependency of answers is measured: as `vppo analyze` does."""
        names = ["temperature", "max_tokens", "seed", "memory", "min_pixels", "max_pixels", "device", "dtype"]
        names += ["attn_implementation", "revision", "trust_remote_code", "sampler"]
        return AnalysisOptions(**{name: getattr(self, name) for name in names})

    def knobs(self) -> dict[str, Any]:
        """Every option with its value, as JSON has it."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """What an evaluation has in common with the one that it goes on with."""
        return {name: value for name, value in self.knobs().items() if name not in FREE}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
