"""TRL's fused head with this library's operation inside: in its backward, tokens without gradient meet no product.

TRL scores tokens through a patched `model.forward` that ends in one function of hidden states and weight. Only that
function is exchanged, while a call runs: everything around it (PEFT, mixed devices, router losses) stays TRL's. Here it
runs inside the head's own forward, where FSDP makes the weight whole. TRL reads the weight outside: under FSDP2 it then
gathers it by itself from the second forward on, and what each process learns of its gradient is its own part alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import trl.trainer.utils as seam
from accelerate.logging import get_logger
from torch import Tensor

from vppo.heads import head_forward
from vppo_kernels import linear_logprob

logger = get_logger(__name__)
OUTPUTS = {"log_probs", "entropy"}
ARGUMENTS = 9  # hidden, weight, bias, targets, temperature, chunk size, softcap, logit scale, outputs


@cache
def _warn(reason: str) -> None:
    logger.warning(
        f"TRL's own head is used, which multiplies filtered tokens too: {reason}. Results are the same, steps slower."
    )


class _Function:
    """What TRL calls `.apply` of, for the head of `model`; `original` is what it would have called."""

    def __init__(self, original: Any, model: Any) -> None:
        self.original, self.model = original, model

    @torch.compiler.disable  # the exchange of a forward is not to be traced; what is inside are kernels already
    def apply(self, *args: Any) -> Any:
        if len(args) != ARGUMENTS or not set(args[8]) <= OUTPUTS:
            _warn(f"this version asks it for what is not known here ({len(args)} arguments, outputs {args[-1]!r})")
            return self.original.apply(*args)
        hidden, weight, _, targets, temperature, _, softcap, logit_scale, outputs = args
        device = hidden.device.type
        if weight.is_cuda and torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
            _warn("float32 weights under autocast, which it rounds to 16 bits tile by tile")
            return self.original.apply(*args)

        def at_head(head: Any, hidden: Tensor) -> Tensor:
            found = linear_logprob(
                hidden,
                head.weight,
                targets,
                getattr(head, "bias", None),
                temperature=float(temperature),
                softcap=None if softcap is None else float(softcap),
                logit_scale=float(logit_scale),
            )
            return torch.stack([found.logprobs, found.entropy], dim=-1)

        with head_forward(self.model, at_head):
            logprobs, entropy = self.model.get_output_embeddings()(hidden).unbind(-1)
        return logprobs, entropy if "entropy" in outputs else None, None, None, None


@contextmanager
def fused_head(model: Any, gathered: bool) -> Iterator[None]:
    """Within the block, TRL's scoring of tokens is done by `linear_logprob`, on response tokens only.

    Where TRL has changed and the seam is not there, the block changes nothing, and one warning says so.

    Args:
        model: The one that scores, unwrapped.
        gathered: Whether the backward, too, will find the head's weight whole; under ZeRO-3 only TRL's own does.
    """
    missing = [name for name in ("_ChunkedLogProbFunction", "_use_triton") if not hasattr(seam, name)]
    if missing or not gathered:
        _warn(f"trl.trainer.utils has no {' and no '.join(missing)}" if missing else "ZeRO-3 gathers the weight for it")
        yield
        return
    with (
        mock.patch.object(seam, "_ChunkedLogProbFunction", _Function(seam._ChunkedLogProbFunction, model)),
        mock.patch.object(seam, "_use_triton", lambda device: True),  # "leave prompts and padding out": on CPUs too
    ):
        yield
