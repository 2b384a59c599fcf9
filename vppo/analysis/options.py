"""What an analysis can be told."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vppo.analysis.token_scores import DIVERGENCES
from vppo.data import DataOptions
from vppo.errors import InputError
from vppo.perturbations import Perturbation

SAMPLERS = ("auto", "vllm", "transformers")


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions(DataOptions):
    """What `vppo.analyze` can be told, beside how the data is read (the fields of `vppo.data.DataOptions`).

    Attributes:
        limit: Only the first problems of the data; None for all.
        samples: Responses to sample to each problem.
        perturbation: What the perturbed view does: "patch", "noise", "blur" or "grey".
        patch_size: Side of a blackened patch in pixels; None takes the model's own patch, or 14.
        patch_probability: Chance of each patch to be blackened, 0..1.
        noise_std: Standard deviation of the noise on the 0..255 scale.
        blur_radius: Standard deviation of the blur in pixels.
        draws: Perturbed views of each problem; scores are means over them, with a standard error from two on.
        divergence: What counts as dependency: "kl", "reverse_kl", "jsd" or "k3"; all four are in the table.
        keep_ratio: Fraction of each response that counts as kept, in (0, 1].
        max_tokens: The longest response that is sampled.
        temperature: Of sampling, and it divides the logits of both views; 0 takes the most probable token each time,
            and scores at 1.
        seed: Of sampling and perturbation.
        memory: GiB that sampling and scoring may use for caches and activations, beside the weights.
        min_pixels: Smaller images are enlarged to this many pixels; None keeps the processor's own limit.
        max_pixels: Larger images are reduced to this many pixels; None keeps the processor's own limit.
        device: "cpu", "cuda", ..., "auto" to spread the model over all GPUs; None for a GPU where there is one.
        dtype: Of a model that is loaded: "auto" for the checkpoint's own, "float32", "bfloat16" or "float16".
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; None for the model's own choice.
        revision: Branch, tag or commit of a model on the hub.
        trust_remote_code: Whether the model's own code may run.
        sampler: "vllm", "transformers", or "auto": vLLM where it is installed and a GPU is there.

    Raises:
        InputError: A value is out of range; the message names it, what it got and what it takes.
    """

    limit: int | None = None
    samples: int = 1
    perturbation: str = Perturbation.kind
    patch_size: int | None = None
    patch_probability: float = Perturbation.patch_probability
    noise_std: float = Perturbation.noise_std
    blur_radius: float = Perturbation.blur_radius
    draws: int = 1
    divergence: str = "kl"
    keep_ratio: float = 0.4
    max_tokens: int = 2048
    temperature: float = 1.0
    seed: int = 0
    memory: float = 4.0
    min_pixels: int | None = None
    max_pixels: int | None = None
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str = "main"
    trust_remote_code: bool = False
    sampler: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("limit", "samples", "draws", "max_tokens"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and not (name == "limit" and value is None):
                raise InputError(f"{name}: got {value!r}, takes a whole number from 1")
        if not (isinstance(self.seed, int) and self.seed >= 0):
            raise InputError(f"seed: got {self.seed!r}, takes a whole number from 0")
        for name, choices in (("divergence", DIVERGENCES), ("sampler", SAMPLERS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: got {getattr(self, name)!r}, takes one of {list(choices)}")
        if not 0 < self.keep_ratio <= 1:
            raise InputError(f"keep_ratio: got {self.keep_ratio!r}, takes a number above 0 and at most 1")
        if not self.memory > 0:
            raise InputError(f"memory: got {self.memory!r}, takes a number of GiB above 0")
        if not self.temperature >= 0:
            raise InputError(f"temperature: got {self.temperature!r}, takes a number from 0")
        if self.temperature == 0 and self.samples > 1:
            raise InputError(f"samples: got {self.samples}, takes 1 at temperature 0, where all would be the same")
        if self.draws > 1 and self.perturbation in ("blur", "grey"):
            raise InputError(f"draws: got {self.draws}, takes 1 with {self.perturbation!r}, which is always the same")
        try:
            self.make_perturbation(14)  # validates its own fields
        except ValueError as error:
            raise InputError(str(error)) from error

    @property
    def data(self) -> DataOptions:
        """How the data is read."""
        return DataOptions(**{field.name: getattr(self, field.name) for field in fields(DataOptions)})

    def make_perturbation(self, model_patch_size: int) -> Perturbation:
        """The perturbation of this run; blackened patches default to the model's own."""
        return Perturbation.of(self, model_patch_size)
