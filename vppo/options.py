"""What VPPO is told, whichever trainer runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypedDict

from vppo.algorithms import ALGORITHMS, REGISTRY, Algorithm, summaries
from vppo.perturbations import KINDS, Perturbation

SAMPLED = ("k3", "prob_drop")  # from the sampled token alone
DIVERGENCES = ("kl", "reverse_kl", "jsd", *SAMPLED)
SCOPES = ("prompt", "rollout")
LARGEST = (2 - 2**-23) * 2.0**127  # of single precision, in which tokens are scored

# What a recipe sets where the user has not: the paper's equations, its released code, and this library's own choice.
RECIPES: dict[str, dict[str, object]] = {
    "default": {"divergence": "kl", "loss_type": "dapo", "tas_statistics": "batch", "nll_coef": 0.0},
    "paper": {"divergence": "kl", "loss_type": "grpo", "tas_statistics": "batch", "nll_coef": 0.0},
    "official": {
        "divergence": "k3",
        "loss_type": "dapo",
        "tas_statistics": "micro-batch",
        "nll_coef": 0.06,
        "delta": 3.0,
        "perturbation_scope": "rollout",
    },
}


class Shaping(TypedDict):
    """What the shaping of advantages is told; see `vppo_kernels.vppo_advantages`."""

    keep_ratio: float
    keep_threshold: float | None
    scale_min: float
    scale_max: float | None


@dataclass
class VPPOOptions:
    """The knobs of VPPO itself. Fields whose default is None are filled by the recipe; a value given wins over it.

    Raises:
        ValueError: A field is out of range; the message names it, what it got and what it takes.
    """

    algorithm: str = field(default="vppo", metadata={"help": f"What is trained. {summaries()}."})
    recipe: str = field(
        default="default",
        metadata={
            "help": "'default': exact KL, mean over all response tokens, statistics of the whole batch. 'paper': exact "
            "KL, mean over each sequence first. 'official': as the released code (k3, micro-batch statistics, dual "
            "clip 3.0, penalty on -log p)."
        },
    )
    divergence: str | None = field(
        default=None,
        metadata={
            "help": "Dependency of a token: 'kl', 'reverse_kl', 'jsd' (exact, in nats), 'k3' (one sample) or "
            "'prob_drop' (by how much the sampled token is less probable)."
        },
    )
    keep_ratio: float = field(
        default=0.4, metadata={"help": "Fraction of each trajectory's tokens that keep their gradient, in (0, 1]."}
    )
    keep_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Dependency in nats that those tokens have to exceed as well, at least 0; with keep_ratio 1 it "
            "decides alone. A response that nowhere exceeds it carries no gradient. None for no such bound."
        },
    )
    scale_min: float = field(
        default=0.9, metadata={"help": "Factor on the advantage of the least image-dependent trajectory, above 0."}
    )
    scale_max: float | None = field(
        default=None, metadata={"help": "Factor of the most dependent one; None makes the mean factor 1."}
    )
    tas_statistics: str | None = field(
        default=None,
        metadata={
            "help": "Where shaping takes its statistics: 'batch' (all ranks) or 'micro-batch' (min and max of a "
            "device's mini-batch, mean of its micro-batch, as the released code)."
        },
    )
    nll_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the mean -log p over all response tokens (0.06 in the released code, 0.12 for 8B)."
        },
    )
    perturbation: str = field(
        default=Perturbation.kind, metadata={"help": "Perturbed view: 'patch', 'noise', 'blur' or 'grey'."}
    )
    perturbation_scope: str | None = field(
        default=None,
        metadata={
            "help": "One perturbed view per 'prompt' and step: its rollouts are measured against the same view, which "
            "passes once (those that a tool has shown other pictures have their own). Or one per 'rollout', as the "
            "released code: the view's luck enters the shaping, and nothing of its pass is shared."
        },
    )
    draws: int = field(
        default=1,
        metadata={
            "help": "Perturbed views of each prompt; the dependency is the mean over them, and its standard error is "
            "logged from two on. The first is that of draws=1. Each costs as much as the first."
        },
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "Side of a blackened patch in pixels; None takes the model's own patch, or 14."}
    )
    patch_probability: float = field(
        default=Perturbation.patch_probability, metadata={"help": "Chance of each patch to be blackened, 0..1."}
    )
    noise_std: float = field(
        default=Perturbation.noise_std, metadata={"help": "Standard deviation of the noise, on the 0..255 scale."}
    )
    blur_radius: float = field(
        default=Perturbation.blur_radius, metadata={"help": "Standard deviation of the blur, in pixels."}
    )
    check_kernels: bool = field(
        default=False, metadata={"help": "Compare a sample of every divergence with its float64 definition."}
    )

    def __post_init__(self) -> None:
        one_of("algorithm", self.algorithm, ALGORITHMS)
        one_of("recipe", self.recipe, tuple(RECIPES))
        self.divergence = self.divergence or self.method.divergence
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name, value) is None:  # a trainer of its own losses lacks the fields of TRL's
                setattr(self, name, value)
        self.perturbation_scope = self.perturbation_scope or "prompt"

        one_of("divergence", self.divergence, DIVERGENCES)
        one_of("tas_statistics", self.tas_statistics, ("batch", "micro-batch"))
        one_of("perturbation", self.perturbation, KINDS)
        one_of("perturbation_scope", self.perturbation_scope, SCOPES)
        for name in ("keep_ratio", "scale_min"):
            a_number(name, getattr(self, name))
        for name in ("scale_max", "keep_threshold"):
            if getattr(self, name) is not None:
                a_number(name, getattr(self, name))
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio: got {self.keep_ratio!r}, takes a number above 0 and at most 1")
        threshold = self.keep_threshold
        if threshold is not None and not 0 <= threshold <= LARGEST:
            raise ValueError(f"keep_threshold: got {threshold!r}, takes None or a finite number of at least 0")
        if threshold is not None and self.method.filters and not self.perturbs:
            raise ValueError(
                f"keep_threshold: got {threshold!r}, takes None with algorithm {self.algorithm!r}, which does not "
                "measure dependency"
            )
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 1:
            raise ValueError(f"draws: got {self.draws!r}, takes a whole number from 1")
        if self.draws > 1 and self.perturbation in ("blur", "grey"):
            raise ValueError(f"draws: got {self.draws!r}, takes 1 with {self.perturbation!r}, which is always the same")
        if not self.scale_min > 0:
            raise ValueError(f"scale_min: got {self.scale_min!r}, takes a number above 0")
        if self.scale_max is None and not self.scale_min <= 1:  # the factors' mean of 1 would lie below the smallest
            raise ValueError(
                f"scale_min: got {self.scale_min!r}, takes a number of at most 1 unless scale_max is given"
            )
        if self.scale_max is not None and not self.scale_max >= self.scale_min:
            raise ValueError(f"scale_max: got {self.scale_max!r}, takes None or a number of at least scale_min")
        if not (isinstance(self.nll_coef, (int, float)) and math.isfinite(self.nll_coef)):
            raise ValueError(f"nll_coef: got {self.nll_coef!r}, takes a finite number")
        self.make_perturbation(14)  # validates its own fields

    @property
    def method(self) -> Algorithm:
        """The entry of `algorithm`."""
        return REGISTRY[self.algorithm]

    @property
    def scores_tokens(self) -> bool:
        """Whether training weighs the tokens of a response at all."""
        return self.method.score is not None

    @property
    def perturbs(self) -> bool:
        """Whether training needs the perturbed view."""
        return self.method.perturbs

    @property
    def shaping(self) -> Shaping:
        """What `vppo_advantages` is told, as the algorithm uses it."""
        method = self.method
        given = method.score == "given"  # who names the tokens decides how many
        return {
            "keep_ratio": self.keep_ratio if method.filters and not given else 1.0,
            "keep_threshold": 0.0 if given else self.keep_threshold if method.filters else None,
            "scale_min": self.scale_min if method.shapes else 1.0,
            "scale_max": self.scale_max if method.shapes else 1.0,
        }

    def make_perturbation(self, model_patch_size: int) -> Perturbation:
        """The perturbation of this run; blackened patches default to the model's own."""
        return Perturbation.of(self, model_patch_size)


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {list(choices)}")


def a_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: got {value!r}, takes a number")
