"""Whether the sampler and the trainer agree about the tokens that were sampled.

A sampler that saw another prompt, other weights or another temperature still answers, and training goes on, on ratios
of probabilities that mean nothing. Its log-probabilities of its own tokens give it away: the trainer's first pass over
the same tokens must find nearly the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor

from vppo.errors import InputError

logger = get_logger(__name__)
GUARDS = ("error", "warn", "off")
# Mean absolute differences in nats a token. vLLM 0.31 on a CPU and a small model: 0.003 to 0.005 in float32, and 2.8 to
# 3.0 where placeholders were expanded twice. In 16 bits the two passes round differently.
TOLERANCES = {"float32": 0.05, "16 bits": 0.3}
CAUSES = (
    "placeholders of images that are expanded twice, other image size limits in the sampler's processor, weights that "
    "are not synchronised, another temperature, another chat template, or raw instead of processed log-probabilities"
)


class SamplerMismatchError(InputError):
    """The sampler draws from another distribution than the one that is trained."""


@dataclass(frozen=True)
class Gap:
    """|log-probability by the sampler - by the trainer| over the sampled tokens of all processes, in nats.

    Attributes:
        mean, maximum: NaN where no token was sampled.
        tokens: How many were compared.
    """

    mean: float
    maximum: float
    tokens: int

    @classmethod
    @torch.no_grad()
    def gather(cls, accelerator: Any, sampled: Tensor, trained: Tensor, mask: Tensor) -> Gap:
        """The same on every process; every process must call it.

        Args:
            accelerator: Of the trainer.
            sampled, trained: `[B, T]` log-probabilities of this process's tokens. A NaN is what the sampler could not
                tell, and is not compared.
            mask: `[B, T]` bool, the tokens that were sampled.
        """
        gap = (sampled.double() - trained.double()).abs()[mask.bool()]
        gap = gap[~gap.isnan()]
        largest = gap.max() if len(gap) else gap.new_tensor(-math.inf)
        here = torch.stack([gap.sum(), gap.new_tensor(len(gap)), largest]).unsqueeze(0)
        totals, counts, maxima = accelerator.gather(here).unbind(1)
        tokens = int(counts.sum())
        if not tokens:
            return cls(math.nan, math.nan, 0)
        return cls(totals.sum().item() / tokens, maxima.max().item(), tokens)


class SamplerGuard:
    """Raises or warns where the sampler's log-probabilities are not the trainer's.

    Args:
        guard: "error", "warn" or "off".
        tolerance: Of the mean of a step, in nats a token.
        top_p: Of the sampler: probabilities within a nucleus are up to 1 / top_p larger than over all tokens, so
            -log(top_p) is added to the tolerance.
        incomparable: Why the two log-probabilities differ by right, if they do: then only prompts are judged.
    """

    def __init__(self, guard: str, tolerance: float, top_p: float = 1.0, incomparable: str | None = None) -> None:
        self.guard, self.tolerance = guard, tolerance
        self._limit = tolerance - math.log(top_p)
        self._incomparable = incomparable
        self._warned: set[str] = set()

    def check(self, accelerator: Any, step: int, gap: Gap, difference: str | None = None) -> None:
        """Judges one comparison; all processes come to the same verdict.

        Args:
            accelerator: Of the trainer.
            step: For the message.
            gap: Of all processes.
            difference: Where a prompt of this process differs from the trainer's, if the sampler told.

        Raises:
            SamplerMismatchError: The guard is "error", and a prompt of any process differs or the gap is too large.
        """
        if self.guard == "off":
            return
        everyone = gather_object([difference]) if accelerator.num_processes > 1 else [difference]
        seen = [each for each in everyone if each is not None]
        if gap.mean > self._limit:
            seen.append(
                f"its log-probabilities of {gap.tokens} tokens differ from the trainer's by {gap.mean:.3g} nats on the "
                f"mean and {gap.maximum:.3g} at most; the mean may be {self._limit:.3g}"
            )
            if self._incomparable and len(seen) == 1:
                self._warn(f"sampler_guard: {self._incomparable}: log-probabilities are not judged")
                return
        if not seen:
            return
        message = (
            f"step {step}: the sampler does not draw from the model that is trained: {'; '.join(seen[:2])}. Likely "
            f"causes: {CAUSES}. sampler_tolerance sets the limit, sampler_guard: warn goes on all the same"
        )
        if self.guard == "error":
            raise SamplerMismatchError(message)
        self._warn(message, kind="gap")

    def _warn(self, message: str, kind: str = "incomparable") -> None:
        """Once a run: the metrics tell the rest."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)


def tolerance(*dtypes: Any) -> float:
    """The tolerance that goes with the precision of sampler and trainer.

    Args:
        dtypes: torch's, or their names; None where it is not known.
    """
    exact = all("float32" in str(dtype) for dtype in dtypes if dtype is not None)
    return TOLERANCES["float32" if exact else "16 bits"]
