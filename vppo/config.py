"""Every knob of VPPO on top of TRL's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from vppo.options import VPPOOptions, a_number, one_of
from vppo.prefix_sharing import SHARING
from vppo.sampler_guard import GUARDS


@dataclass
class VPPOConfig(VPPOOptions, GRPOConfig):
    """TRL's `GRPOConfig` with the knobs of VPPO; all of TRL's own keep their meaning.

    Defaults that differ from TRL's are the paper's: `epsilon_high=0.28`, `top_p=0.99`, a constant learning rate and
    weight decay 0.01; and `vllm_server_timeout`, so that a missing server is told within a minute. Fields whose default
    is None are filled by the recipe; a value given explicitly wins over it.

    Raises:
        ValueError: A field is out of range; the message names it, what it got and what it takes.
    """

    papo_kl_coef: float = field(
        default=0.01, metadata={"help": "With papo: weight of the divergence that is to rise, at least 0."}
    )
    papo_entropy_coef: float = field(
        default=0.03, metadata={"help": "With papo: weight of each view's entropy, which is to fall, at least 0."}
    )
    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "A prompt of several rollouts passes once, in scoring and in training, whose micro-batches then "
            "hold neighbouring rollouts: 'auto' where the model can take it, 'on' or an error, 'off'."
        },
    )
    scoring_memory: float = field(
        default=4.0, metadata={"help": "GiB that scoring may use for activations, masks and repeated caches, above 0."}
    )
    sampler_guard: str = field(
        default="error",
        metadata={
            "help": "What happens where the sampler's log-probabilities of its tokens, or its prompts, are not the "
            "trainer's: 'error', 'warn' or 'off'."
        },
    )
    sampler_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Mean difference of a step's log-probabilities that the guard accepts, in nats a token, above 0; "
            "None is 0.05 where sampler and trainer compute in float32, and 0.3 in 16 bits."
        },
    )

    vllm_server_timeout: float = field(
        default=50.0, metadata={"help": "Seconds to wait for a vLLM server before the first step."}
    )
    loss_type: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "TRL's loss; None takes the recipe's."}
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clip; None is 0.28, and `epsilon` for 'grpo'."}
    )
    top_p: float = field(default=0.99, metadata={"help": "Nucleus of the rollouts' sampling."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})

    def __post_init__(self) -> None:
        VPPOOptions.__post_init__(self)
        if self.method.symmetric_clip:
            self.epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        self.epsilon_high = 0.28 if self.epsilon_high is None else self.epsilon_high
        for name in ("papo_kl_coef", "papo_entropy_coef"):
            a_number(name, getattr(self, name))
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, takes a finite number of at least 0")
        if self.method.penalizes:
            self._check_penalty()
        one_of("prefix_sharing", self.prefix_sharing, SHARING)
        one_of("sampler_guard", self.sampler_guard, GUARDS)
        if self.sampler_tolerance is not None and not 0 < self.sampler_tolerance < math.inf:
            raise ValueError(f"sampler_tolerance: got {self.sampler_tolerance!r}, takes a finite number above 0")
        if not self.scoring_memory > 0:
            raise ValueError(f"scoring_memory: got {self.scoring_memory!r}, takes a number above 0")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature!r}, takes a finite number above 0")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, takes a number of at least 1")
        GRPOConfig.__post_init__(self)

    def _check_penalty(self) -> None:
        for name, choices in (("divergence", ("kl", "k3")), ("loss_type", ("dapo", "grpo")), ("draws", (1,))):
            value = getattr(self, name)
            if value not in choices:
                takes = " or ".join(map(repr, choices))
                raise ValueError(f"{name}: got {value!r}, takes {takes} with algorithm {self.algorithm!r}")
