"""Packed rows by flash-attention, which takes no mask: two calls in each layer, merged by their log-sum-exp.

In the first call the prompt and every response attend to themselves. In the second all responses of a row attend to its
prompt, whose keys are there once. With o, l of the first and p, m of the second (outputs and log-sum-exps of a response
token), attention to both is `lerp(o, p, sigmoid(m - l))`, and its log-sum-exp `logaddexp(l, m)`.

Given these two, flash-attention's own backward of either call has the right gradients: it computes probabilities from
scores and a log-sum-exp, and everything else from them, the output and its gradient.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.flash_attention import get_target_dtype
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

FLASH = "flash_attention_2"
UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")  # what changes attention and is not built here
flash_attention = ALL_ATTENTION_FUNCTIONS[FLASH]


@dataclass(frozen=True)
class Stretches:
    """Sequences that lie one behind the other, as flash-attention takes them.

    Attributes:
        ends: `[sequences + 1]` int32, from 0: where each begins and the last one ends.
        longest: A bound on their lengths.
    """

    ends: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Stretches:
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(ends, max([2, *lengths]))  # where it is 1, another kernel runs, and it skips no empty sequence


class Segments:
    """Where prompts and responses of packed rows lie. It takes the place of a mask on the way to each layer.

    Args:
        segment: `[packs, L]` 0 in a prompt, the number of the response in a response, -1 in padding.
        lengths: Of each pack: of its prompt and of its responses.

    Attributes:
        tokens: Places of all n tokens in `packs * L`.
        prompts, responses: Places among these n of a prompt's tokens, and of those of responses that have a prompt.
        own: All segments.
        asking, asked: Of each pack all its responses, and its prompt.
    """

    def __init__(self, segment: Tensor, lengths: Sequence[Sequence[int]]) -> None:
        self.tokens = (segment >= 0).flatten().nonzero().flatten()
        has_prompt = (segment == 0).any(1, keepdim=True)
        self.prompts = (segment == 0).flatten()[self.tokens].nonzero().flatten()
        self.responses = ((segment > 0) & has_prompt).flatten()[self.tokens].nonzero().flatten()
        self.own = Stretches.of([length for pack in lengths for length in pack], segment.device)
        self.asking = Stretches.of([sum(pack[1:]) for pack in lengths if pack[0]], segment.device)
        self.asked = Stretches.of([pack[0] for pack in lengths if pack[0]], segment.device)


class _PackedAttention(torch.autograd.Function):
    """`[n, heads, D]` attention of the tokens of packed rows to themselves and to their prompts."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        out, lse = _forward(query, key, value, segments.own, segments.own, scale, causal=True)
        if len(segments.responses):
            asking, to = segments.responses, segments.prompts
            out_prompt, lse_prompt = _forward(
                query[asking], key[to], value[to], segments.asking, segments.asked, scale, causal=False
            )
            out_own, lse_own = out[asking], lse[:, asking]
            share = (lse_prompt - lse_own).sigmoid().T.unsqueeze(-1)
            out[asking] = torch.lerp(out_own.to(share), out_prompt.to(share), share).to(out)
            lse[:, asking] = torch.logaddexp(lse_own, lse_prompt)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        segments = ctx.segments
        grads = _backward(grad, query, key, value, out, lse, segments.own, segments.own, ctx.scale, causal=True)
        if len(segments.responses):
            asking, to = segments.responses, segments.prompts
            inputs = grad[asking], query[asking], key[to], value[to], out[asking], lse[:, asking].contiguous()
            more = _backward(*inputs, segments.asking, segments.asked, ctx.scale, causal=False)
            for whole, places, part in zip(grads, (asking, to, to), more, strict=True):
                whole.index_add_(0, places, part)
        return (*grads, None, None)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, asking: Stretches, asked: Stretches, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """`[n, heads, D]` outputs and `[heads, n]` log-sum-exps."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(
        query,
        key,
        value,
        asking.ends,
        asked.ends,
        asking.longest,
        asked.longest,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
    )
    return out, lse


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    asking: Stretches,
    asked: Stretches,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, as far as these keys go."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    _flash_attn_varlen_backward(
        grad.contiguous(),
        query,
        key,
        value,
        out,
        lse,
        *grads,
        asking.ends,
        asked.ends,
        asking.longest,
        asked.longest,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1",  # as transformers has it
    )
    return grads


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function of `flash_attention_2`, where the mask may be the `Segments` of packed rows.

    Args:
        module: A layer's attention.
        query: `[packs, heads, L, D]`.
        key, value: `[packs, heads of keys, L, D]`.
        attention_mask: `Segments`; with anything else transformers' own function is called.
        options: What that function takes; `scaling` is the factor of the scores.

    Returns:
        `[packs, L, heads, D]`, 0 at padding, differentiable once; and no weights.

    Raises:
        NotImplementedError: The layer wants a kind of attention that packed rows do not have.
    """
    if not isinstance(attention_mask, Segments):
        result: tuple[Tensor, None] = flash_attention(module, query, key, value, attention_mask, **options)
        return result
    wanted = [name for name in UNKNOWN if options.get(name) is not None]
    wanted += ["dropout"] if options.get("dropout") else []
    if wanted:
        raise NotImplementedError(f"packed rows by {FLASH} have no {', '.join(wanted)}")
    dtype = get_target_dtype(query, module) or query.dtype  # 16 bits under autocast
    packs, heads, length, width = query.shape
    inputs = (x.transpose(1, 2).flatten(0, 1).index_select(0, attention_mask.tokens) for x in (query, key, value))
    scale = options.get("scaling") or width**-0.5
    found = _PackedAttention.apply(*(x.to(dtype) for x in inputs), attention_mask, scale)
    whole = found.new_zeros(packs * length, heads, width).index_copy(0, attention_mask.tokens, found)
    return whole.unflatten(0, (packs, length)), None


# the layers of a model look their attention up in each forward, and once more when its activations are recomputed
AttentionInterface.register(FLASH, attention)


def unusable() -> str:
    """Why flash-attention cannot run here; "" if it can."""
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward  # noqa: F401
    except ImportError as error:
        return f"{FLASH} is not flash-attn 2.7 or newer: {error}"
    return ""
