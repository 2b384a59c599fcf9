"""flash-attn's functions of sequences of any length, in plain torch on a CPU: a stand-in for what needs a GPU.

Signatures, shapes and checks are those of flash-attn 2.8 (`flash_attn/flash_attn_interface.py`,
`csrc/flash_attn/flash_api.cpp`); unlike there, float32 and float64 are taken too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor

calls: list[tuple[str, int]] = []  # what was called of the two functions for packed rows, and with how many keys


def _check(query: Tensor, keys: tuple[Tensor, ...], ends: tuple[Tensor, Tensor], longest: tuple[int, int]) -> None:
    """What flash-attention raises for."""
    assert query.dim() == 3 and query.shape[-1] % 8 == 0, "head_size should be a multiple of 8"
    assert query.shape[1] % keys[0].shape[1] == 0, "number of heads in key/value must divide number of heads in query"
    assert all(x.dtype == query.dtype and x.stride(-1) == 1 for x in keys)
    for end, bound, total in zip(ends, longest, (len(query), len(keys[0])), strict=True):
        assert end.dtype == torch.int32 and end.is_contiguous() and end[0] == 0 and end[-1] == total
        assert len(end) > 1 and end.diff().max() <= bound
    assert len(ends[0]) == len(ends[1])


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool, softcap: float = 0.0) -> Tensor:
    """`[heads, q, k]`; a causal mask is aligned to the last query and the last key."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    q, k = scores.shape[1:]
    hidden = torch.ones(q, k, dtype=torch.bool).tril(k - q).logical_not()
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def _sequences(ends_q: Tensor, ends_k: Tensor) -> Iterator[tuple[slice, slice]]:
    for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        yield slice(a, b), slice(c, d)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    scale: float,
    causal: bool,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for q, k in _sequences(ends_q, ends_k):
        scores = _scores(query[q], key[k], scale, causal, cap)
        values = value[k].repeat_interleave(query.shape[1] // value.shape[1], 1)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:2], torch.inf))
    return torch.cat(outs), torch.cat(lses, 1)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert not (dropout_p or softcap or alibi_slopes or return_softmax) and window_size_left == window_size_right == -1
    _check(q, (k, v), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    calls.append(("forward", len(k)))
    out, lse = _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    return out, lse if lse.dtype == torch.float64 else lse.float(), q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> Tensor:
    """Probabilities from scores and the log-sum-exp that is given, as in the kernels; writes dq, dk and dv."""
    assert not (dropout_p or softcap or alibi_slopes) and window_size_left == window_size_right == -1
    _check(q, (k, v, out, dout), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    assert softmax_lse.shape == q.shape[1::-1] and softmax_lse.is_contiguous()
    calls.append(("backward", len(k)))
    for x in (dq, dk, dv):
        x.fill_(torch.nan)  # whoever calls leaves garbage in them
    groups = q.shape[1] // k.shape[1]
    delta = (dout * out).sum(-1)
    for at, to in _sequences(cu_seqlens_q, cu_seqlens_k):
        keys, values = (x[to].repeat_interleave(groups, 1) for x in (k, v))
        weights = (_scores(q[at], k[to], softmax_scale, causal) - softmax_lse[:, at].unsqueeze(-1)).exp().to(q)
        of_weights = torch.einsum("qhd,khd->hqk", dout[at], values) - delta[at].T.unsqueeze(-1)
        of_scores = weights * of_weights * softmax_scale
        dq[at] = torch.einsum("hqk,khd->qhd", of_scores, keys)
        dk[to] = torch.einsum("hqk,qhd->khd", of_scores, q[at]).unflatten(1, (-1, groups)).sum(2)
        dv[to] = torch.einsum("hqk,qhd->khd", weights, dout[at]).unflatten(1, (-1, groups)).sum(2)
    return delta


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    softcap: float = 0.0,
) -> Tensor:
    _check(q, (k, v), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale or q.shape[-1] ** -0.5, causal, softcap)[0]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    softcap: float = 0.0,
) -> Tensor:
    ends = [torch.arange(len(q) + 1, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    flat = (x.flatten(0, 1) for x in (q, k, v))
    options = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap}
    found = flash_attn_varlen_func(*flat, *ends, q.shape[1], k.shape[1], dropout_p, **options)
    return found.unflatten(0, (len(q), q.shape[1]))


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Tensor:
    raise NotImplementedError


def install(patch: pytest.MonkeyPatch) -> None:
    """For as long as the patch lasts `import flash_attn` finds these, and transformers takes it for installed."""
    package, interface, padding = map(
        ModuleType, ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding")
    )
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(package, function.__name__, function)
    for function in (_flash_attn_varlen_forward, _flash_attn_varlen_backward):
        setattr(interface, function.__name__, function)
    vars(padding).update(pad_input=flash_utils._pad_input, unpad_input=flash_utils._unpad_input)
    for module in (package, interface, padding):
        patch.setitem(sys.modules, module.__name__, module)
    patch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        patch.setattr(flash_utils, name, None)
    patch.setattr(flash_utils, "_process_with_kvcache_kwargs_fn", None)
    calls.clear()


def by_flash(model: Any) -> Any:
    """The model with `flash_attention_2` in all its parts, which transformers itself refuses on a CPU."""
    for config in (model.config, model.config.get_text_config(), model.config.vision_config):
        config._attn_implementation_internal = "flash_attention_2"
    return model
