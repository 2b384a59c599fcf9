"""Log-probabilities and entropies of a batch's responses from packed rows, by TRL's own fused head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vppo.packed_rows import PackedRows


def packed_logprobs(forward: Callable[..., Any], packed: PackedRows) -> tuple[Tensor, Tensor]:
    """What the plain pass gives, for less: a prompt's tokens pass once, and their gradients are summed before they go
    back through it.

    Args:
        forward: A model to which TRL has given its fused head, or what wraps it.
        packed: The rows.

    Returns:
        Log-probabilities and entropies, `[B, T]` float32 in nats; 0 outside the responses and in rows not packed.
    """
    with packed.masked():
        output = forward(**packed.inputs, shift_labels=packed.labels, fused_lm_head=True)
    return packed.spread(output.log_probs), packed.spread(output.entropy)
