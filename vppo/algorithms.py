"""The algorithms: one entry says what sets one apart, and everything else asks it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from vppo_kernels.statistics import DivergenceOutput

    TokenWeights = Callable[[DivergenceOutput, Tensor], Tensor]

SCORES = ("dependency", "entropy", "random", "given")


@dataclass(frozen=True)
class Algorithm:
    """What a clipped loss on group advantages becomes.

    Attributes:
        name: As the option `algorithm` has it.
        summary: What is trained, for help and tables.
        title: What a model card calls it.
        paper: Whose it is, a key of `vppo.card.PAPERS`; None leaves GRPO's to TRL.
        score: What scores a token: "dependency" on the image, the policy's "entropy", a "random" number, or what a
            subclass of the trainer has "given"; None where no token is scored.
        divergence: What its paper measures dependency by, where that is not the recipe's.
        filters: Whether the tokens of highest score alone carry gradient.
        shapes: Whether a trajectory's advantage grows with its mean score.
        token_weights: `module:function`, imported when it is used. From the two views' `DivergenceOutput`, every field
            `[B, T]`, and the mask of response tokens, `[B, T]` bool, to `[B, T]` factors on the advantages, in place of
            filtering; what it returns outside the mask is not read.
        penalizes: Whether the loss itself has both views' divergence and entropies, with their gradient.
        symmetric_clip: Whether the upper clip is the lower one.

    Raises:
        ValueError: The entry contradicts itself.
    """

    name: str
    summary: str
    title: str
    paper: str | None = "vppo"
    score: str | None = None
    divergence: str | None = None
    filters: bool = False
    shapes: bool = False
    token_weights: str | None = None
    penalizes: bool = False
    symmetric_clip: bool = False

    def __post_init__(self) -> None:
        if self.score not in (None, *SCORES):
            raise ValueError(f"score: got {self.score!r}, takes None or one of {list(SCORES)}")
        weighs = bool(self.filters or self.shapes or self.token_weights or self.penalizes)
        if weighs != (self.score is not None):
            raise ValueError(f"score: got {self.score!r} for {self.name!r}, takes one where tokens are weighed by it")
        if self.token_weights and (self.filters or not self.perturbs):
            raise ValueError(
                f"token_weights: got {self.token_weights!r} for {self.name!r}, takes the place of filtering, from both "
                "views"
            )
        if self.penalizes and not self.perturbs:
            raise ValueError(f"penalizes: got True for {self.name!r}, takes the score 'dependency'")

    @property
    def perturbs(self) -> bool:
        """Whether training needs the perturbed view."""
        return self.score == "dependency"

    def load_token_weights(self) -> TokenWeights:
        """The function that `token_weights` names."""
        module, _, function = str(self.token_weights).partition(":")
        found: TokenWeights = getattr(import_module(module), function)
        return found


REGISTRY = {
    one.name: one
    for one in (
        Algorithm(
            "vppo", "token filtering and advantage shaping", "VPPO", score="dependency", filters=True, shapes=True
        ),
        Algorithm("tas", "advantage shaping only", "VPPO's advantage shaping alone", score="dependency", shapes=True),
        Algorithm("tgf", "token filtering only", "VPPO's token filtering alone", score="dependency", filters=True),
        Algorithm(
            "soft",
            "advantage shaping, and a weight between 0 and 1 for every token in place of the filtering",
            "VPPO with its soft mask",
            score="dependency",
            shapes=True,
            token_weights="vppo.methods:soft_mask_weights",
        ),
        Algorithm(
            "pgpo",
            "advantages moved to the tokens that depend on the image, at an unchanged sum",
            "PGPO",
            paper="pgpo",
            score="dependency",
            token_weights="vppo.methods:pgpo_weights",
        ),
        Algorithm(
            "vepo",
            "the fifth of the tokens that are uncertain and moved by the image",
            "VEPO",
            paper="vepo",
            score="dependency",
            divergence="jsd",
            token_weights="vppo.methods:vepo_weights",
        ),
        Algorithm(
            "papo",
            "the divergence of the two views rises, and both entropies fall, by terms of the loss",
            "PAPO",
            paper="papo",
            score="dependency",
            penalizes=True,
        ),
        Algorithm(
            "random",
            "a control: as many tokens as tgf, drawn at random",
            "VPPO's token filtering with tokens drawn at random, a control",
            score="random",
            filters=True,
        ),
        Algorithm(
            "entropy",
            "a control: as many tokens as tgf, where the policy is least sure",
            "VPPO's token filtering by the policy's entropy, a control",
            score="entropy",
            filters=True,
        ),
        Algorithm(
            "oracle",
            "a control: the tokens that a subclass of the trainer names",
            "VPPO's token filtering with tokens that are known to look, a control",
            score="given",
            filters=True,
        ),
        Algorithm("dapo", "neither", "DAPO's objective, without dynamic sampling", paper="dapo"),
        Algorithm("grpo", "neither, with a symmetric clip", "GRPO", paper=None, symmetric_clip=True),
    )
}
ALGORITHMS = tuple(REGISTRY)
COMMANDS = tuple(name for name, one in REGISTRY.items() if one.score != "given")  # what needs no code of one's own


def summaries(names: tuple[str, ...] = ALGORITHMS) -> str:
    """One phrase for each algorithm, as help shows them."""
    return "; ".join(f"{name}: {REGISTRY[name].summary}" for name in names)
