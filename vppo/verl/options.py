"""The keys under `trainer.v1.vppo`, and what of verl's own settings VPPO cannot run with; both are checked at start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vppo.algorithms import REGISTRY
from vppo.errors import InputError
from vppo.options import RECIPES, VPPOOptions, one_of
from vppo.verl.engine import Ask

ACTOR = "actor_rollout_ref.actor"
STRATEGIES = ("fsdp", "fsdp2")
LOSSES = ("vanilla", "gspo", "cispo")  # positively homogeneous in the advantage, which takes in mask and factor
AVERAGES = {"dapo": "token-mean", "grpo": "seq-mean-token-mean"}  # verl's names for what a recipe calls its loss
REFUSED = {  # what must be off, and why
    "actor_rollout_ref.model.use_fused_kernels": "vppo's own head makes no logits either",
    "actor_rollout_ref.model.mtp.enable": "more than one token is predicted at a place",
    f"{ACTOR}.calculate_sum_pi_squared": "it needs logits, which are never made",
    f"{ACTOR}.use_prefix_grouper": "its rows are not those of the batch",
    "distillation.enabled": "it needs logits, which are never made",
    "algorithm.rollout_correction.bypass_mode": "dependency is measured in the pass over old log-probabilities",
}


@dataclass
class VerlOptions(VPPOOptions):
    """`VPPOOptions` under `trainer.v1.vppo`, with what else of `VPPOConfig` is not verl's own.

    Raises:
        InputError: A field is out of range, with the message of `VPPOConfig`, or asks for what TRL's trainer alone has.
    """

    seed: int = field(default=42, metadata={"help": "Of the perturbed views, beside the step and the prompt."})
    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "A prompt of several rollouts passes once with its perturbed image: 'auto' where the rollouts are "
            "in one micro-batch, 'off'."
        },
    )

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
            one_of("prefix_sharing", self.prefix_sharing, ("auto", "off"))
        except (TypeError, ValueError) as error:
            raise InputError(f"trainer.v1.vppo.{error}") from error
        if not (isinstance(self.seed, int) and self.seed >= 0):
            raise InputError(f"trainer.v1.vppo.seed: got {self.seed!r}, takes a whole number from 0")
        if self.draws != 1:
            raise InputError(
                f"trainer.v1.vppo.draws: got {self.draws!r}, takes 1 with verl, whose workers draw one view"
            )
        own = [one for one in REGISTRY.values() if not (one.token_weights or one.penalizes)]
        takes = [one.name for one in own if one.score in (None, "dependency")]
        if self.algorithm not in takes:
            raise InputError(f"trainer.v1.vppo.algorithm: got {self.algorithm!r}, takes one of {takes} with verl")

    @classmethod
    def of(cls, config: DictConfig) -> VerlOptions:
        """From verl's config, whose other settings are checked, too.

        Raises:
            InputError: There is no such key, or it or one of verl's has a value that VPPO cannot run with.
        """
        given = OmegaConf.select(config, "trainer.v1.vppo")
        values: Any = {} if given is None else OmegaConf.to_container(given, resolve=True)
        known = {one.name: one for one in fields(cls)}
        if not isinstance(values, Mapping):
            raise InputError(f"trainer.v1.vppo: got {values!r}, takes keys of {sorted(known)}")
        for name, value in values.items():
            if name not in known:
                raise InputError(f"trainer.v1.vppo: got an unknown key {name!r}, takes {sorted(known)}")
            numeric = "str" not in str(known[name].type)
            if numeric and value is not None and not isinstance(value, int | float):
                raise InputError(f"trainer.v1.vppo.{name}: got {value!r}, takes a number")
        options = cls(**values)
        options._check(config)
        return options

    def _check(self, config: DictConfig) -> None:
        _takes(config, f"{ACTOR}.strategy", STRATEGIES)
        _takes(config, f"{ACTOR}.policy_loss.loss_mode", LOSSES)
        for name, reason in REFUSED.items():
            if OmegaConf.select(config, name):
                raise InputError(f"{name}: got {OmegaConf.select(config, name)!r}, takes False with vppo: {reason}")
        recipe = RECIPES[self.recipe]
        if self.recipe != "default":  # a named recipe is that or an error
            _takes(config, f"{ACTOR}.loss_agg_mode", (AVERAGES[str(recipe["loss_type"])],), f"recipe {self.recipe!r}")
        if "delta" in recipe:
            _takes(config, f"{ACTOR}.clip_ratio_c", (recipe["delta"],), f"recipe {self.recipe!r}")

    @property
    def shares_prompts(self) -> bool:
        """Whether rollouts of a prompt are to be near each other, so that their perturbed pass shares it."""
        return self.scores_tokens and self.prefix_sharing == "auto" and self.perturbation_scope == "prompt"

    def ask(self, step: int) -> Ask | None:
        """What workers are to measure at a step; None for an algorithm that needs no perturbed view."""
        if not self.scores_tokens:
            return None
        return Ask(
            divergence=str(self.divergence),
            perturbation=self.make_perturbation(14),
            own_patches=self.patch_size is None,
            seed=self.seed,
            step=step,
            check=self.check_kernels,
            share=self.shares_prompts,
        )


def _takes(config: DictConfig, name: str, choices: tuple[object, ...], whom: str = "vppo") -> None:
    value = OmegaConf.select(config, name)
    if value not in choices:
        raise InputError(f"{name}: got {value!r}, takes one of {list(choices)} with {whom}")
