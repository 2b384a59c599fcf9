"""TRL's fused head with this library's operation inside: in its backward, tokens without gradient meet no product.

TRL scores tokens through a patched `model.forward` that ends in one function of hidden states and weight. Only that
function is exchanged, while a call runs: everything around it (PEFT, mixed devices, router losses) stays TRL's. Here it
runs inside the head's own forward, where FSDP makes the weight whole. TRL reads the weight outside of it: under FSDP2
it then gathers the weight by itself from the second forward on, and each process computes only its own part of the
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vppo.heads import head_forward
from vppo.trl_seams import HEAD_ARGUMENTS, exchangeable_head, exchanged_head, warn_slower
from vppo_kernels import linear_logprob

OUTPUTS = {"log_probs", "entropy"}


def _warn(reason: str) -> None:
    warn_slower(f"TRL's own head is used, which multiplies filtered tokens too: {reason}")


class _Function:
    """What TRL calls `.apply` of, for the head of `model`; `original` is what it would have called."""

    def __init__(self, original: Any, model: Any) -> None:
        self.original, self.model = original, model

    @torch.compiler.disable  # the exchange of a forward is not to be traced; what is inside are kernels already
    def apply(self, *args: Any) -> Any:
        given = dict(zip(HEAD_ARGUMENTS, args, strict=False))
        if len(args) != len(HEAD_ARGUMENTS) or not set(given["outputs"]) <= OUTPUTS:
            _warn(f"this version asks it for what is not known here ({len(args)} arguments, outputs {args[-1]!r})")
            return self.original.apply(*args)
        weight, device = given["weight"], given["hidden"].device.type
        if weight.is_cuda and torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
            _warn(
                "float32 weights under autocast, which it rounds to 16 bits tile by tile; load the model in bfloat16 "
                "(dtype=bfloat16)"
            )
            return self.original.apply(*args)

        softcap = given["final_logit_softcapping"]

        def at_head(head: Any, hidden: Tensor) -> Tensor:
            found = linear_logprob(
                hidden,
                head.weight,
                given["targets"],
                getattr(head, "bias", None),
                temperature=float(given["temperature"]),
                softcap=None if softcap is None else float(softcap),
                logit_scale=float(given["logit_scale"]),
            )
            return torch.stack([found.logprobs, found.entropy], dim=-1)

        with head_forward(self.model, at_head):
            logprobs, entropy = self.model.get_output_embeddings()(given["hidden"]).unbind(-1)
        return logprobs, entropy if "entropy" in given["outputs"] else None, None, None, None


@contextmanager
def fused_head(model: Any, gathered: bool) -> Iterator[None]:
    """Within the block, TRL's scoring of tokens is done by `linear_logprob`, on response tokens only.

    Where TRL has changed and the seam is not there, the block changes nothing, and one warning says so.

    Args:
        model: The one that scores, unwrapped.
        gathered: Whether the backward, too, will find the head's weight whole; under ZeRO-3 only TRL's own does.
    """
    missing = exchangeable_head()
    if missing or not gathered:
        _warn(f"TRL lacks {missing}" if missing else "ZeRO-3 gathers the weight for it")
        yield
        return
    with exchanged_head(lambda own: _Function(own, model)):
        yield
