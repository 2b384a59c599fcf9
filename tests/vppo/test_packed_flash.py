"""Packed rows by flash-attention: what a dense mask gives, forward and backward, with no mask and no copied keys.

flash-attn runs on GPUs alone. Here its functions are stand-ins in plain torch (`support/flash.py`); where there is a
GPU with flash-attn, the last test runs the real ones.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families, flash
from support.runs import FAMILY, fix_rollouts, rows, trainer
from test_prefix_sharing import GROUPS, grouped, hidden, passes_of, perturbed
from test_training_pass import LENGTHS, LORA, SIZES, WHOLE, once, same_gradients, step, tokens_of_forwards
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vppo.packed_flash import Segments, attention, unusable
from vppo.packed_rows import refusal
from vppo.prefix_sharing import ResponsePasses

# of each pack: tokens of the prompt and of the responses
PACKS = {
    "one prompt": ((5, 3, 1, 4),),
    "several prompts": ((5, 3, 1, 4), (2, 6), (7, 1, 1)),
    "a prompt of one token": ((0, 3, 2), (4, 1, 2)),
    "nothing but such prompts": ((0, 3, 2),),
    "an empty response": ((3, 0, 2),),
}


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    flash.install(monkeypatch)


def packed(packs: tuple[tuple[int, ...], ...], device: str = "cpu") -> tuple[Segments, Tensor]:
    """Segments, and the dense mask that says the same: `[packs, 1, L, L]`."""
    length = max(map(sum, packs))
    segment = torch.full((len(packs), length), -1, device=device)
    for number, sizes in enumerate(packs):
        segment[number, : sum(sizes)] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
    of_query, of_key = segment.unsqueeze(2), segment.unsqueeze(1)
    mask = ((of_key == 0) | (of_key == of_query)) & torch.ones_like(of_query == of_key).tril()
    return Segments(segment, packs), (mask & (of_query >= 0)).unsqueeze(1)


def attended(way: Callable[..., Tensor], real: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a sum of them with weights of its own for each."""
    out = way(*leaves) * real
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("packs", PACKS)
def test_the_merge_is_the_dense_mask(packs: str, heads: tuple[int, int], flash_attn: None) -> None:
    """To the last digits of float64, though flash-attention gives no gradient through its log-sum-exp."""
    segments, mask = packed(PACKS[packs])
    count, _, length, _ = mask.shape
    draw = torch.Generator().manual_seed(0)
    shapes = ((count, heads[0], length, 8), *2 * ((count, heads[1], length, 8),))
    leaves = [(3 * torch.randn(shape, generator=draw, dtype=torch.float64)).requires_grad_() for shape in shapes]
    real = mask.any(-1).transpose(1, 2).unsqueeze(-1)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = mask | ~mask.any(-1, keepdim=True)
        out = scaled_dot_product_attention(query, key, value, seen, scale=0.4, enable_gqa=True)
        return out.transpose(1, 2)

    def merged(*inputs: Tensor) -> Tensor:
        return attention(None, *inputs, segments, scaling=0.4, is_causal=True)[0]

    for found, expected in zip(attended(merged, real, leaves), attended(dense, real, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not merged(*leaves)[~real.expand(-1, -1, *merged(*leaves).shape[2:])].any(), "0 at padding"


def test_two_calls_and_no_copy_of_keys(flash_attn: None) -> None:
    """Every key is there once in the first call, those of prompts once more in the second."""
    segments, _ = packed(PACKS["several prompts"])
    inputs = [torch.randn(3, 2, 13, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    attention(None, *inputs, segments)[0].sum().backward()
    tokens, prompts = 13 + 8 + 9, 5 + 2 + 7
    assert flash.calls == [("forward", tokens), ("forward", prompts), ("backward", tokens), ("backward", prompts)]


@pytest.mark.parametrize(
    ("option", "value"), [("sliding_window", 4), ("softcap", 30.0), ("s_aux", torch.zeros(2)), ("dropout", 0.1)]
)
def test_other_kinds_of_attention_are_refused(option: str, value: Any, flash_attn: None) -> None:
    segments, _ = packed(PACKS["one prompt"])
    inputs = [torch.randn(1, 2, 13, 8, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(NotImplementedError, match=f"packed rows by flash_attention_2 have no {option}"):
        attention(None, *inputs, segments, **{option: value})


# -- in models ---------------------------------------------------------------------------------------------------------

NAMES = [f.name for f in families.FAMILIES if f.name != "gemma3"]  # which has sliding windows


@pytest.mark.parametrize("groups", [GROUPS, ((2, 1), (3, 0), (2, 1)), ((3, 0), (2, 0))], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_the_plain_ones(
    name: str, groups: tuple[tuple[int, int], ...], flash_attn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several prompts of different lengths in a pass, several images in a prompt, and text alone."""
    model, processor = families.build(name)
    batch, view = grouped(model, processor, groups)
    views = [view, perturbed(batch, processor, view.keys)] if batch.has_image.all() else [view]
    plain = [hidden(model, batch, shown, sharing="off") for shown in views]
    flash.by_flash(model)
    for shown, expected in zip(views, plain, strict=True):
        flash.calls.clear()
        found = hidden(model, batch, shown, sharing="on", way="packed")
        assert flash.calls
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden(model, batch, shown, sharing="off"), expected, rtol=1e-5, atol=1e-5)


def test_a_group_is_one_pack(flash_attn: None) -> None:
    """Nothing is paid for what a mask would hide, and there is no mask to keep in memory."""
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor, ((8, 1),))
    batch.response_lengths = [1000] * 8
    dense = ResponsePasses(model)
    pack = list(range(8))
    cost = dense._pack_cost(batch, pack)
    assert len(dense.packs(batch, pack, view)) > 1
    passes = ResponsePasses(flash.by_flash(model))
    assert passes.packs(batch, pack, view) == [pack]
    length = batch.prompt_lengths[0] + 8000
    assert cost - passes._pack_cost(batch, pack) == passes._footprint.pair * length**2


@pytest.mark.parametrize("images", [(1, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", [FAMILY, "qwen3_vl"])
def test_training_is_as_with_a_dense_mask(
    family: str, lora: bool, images: tuple[int, int], flash_attn: None, tmp_path: Path
) -> None:
    """Loss and gradients, with activations recomputed: layers then attend once more, when the masks are gone."""
    runs = []
    for by_flash in (True, False):
        torch.manual_seed(0)  # of adapters
        model = families.build(family)[0]
        settings = {"peft_config": LORA if lora else None, "gradient_checkpointing": True, "prefix_sharing": "on"}
        model = flash.by_flash(model) if by_flash else model
        runs.append(step(trainer(tmp_path, family=family, model=model, **settings, **WHOLE), images))
    (loss, grads, seen, inputs), (dense_loss, dense_grads, *_) = runs
    assert seen == once(inputs)
    assert [name for name, _ in flash.calls].count("backward") == 2 * 2, "twice a layer"
    torch.testing.assert_close(loss, dense_loss, rtol=1e-5, atol=1e-6)
    same_gradients(grads, dense_grads)


def test_the_ratio_to_old_logprobs_is_one_in_16_bits(flash_attn: None, tmp_path: Path) -> None:
    run = trainer(tmp_path, model=flash.by_flash(families.build(FAMILY)[0]), bf16=True, num_iterations=2, **WHOLE)
    fix_rollouts(run, LENGTHS)
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    found: list[Tensor] = []
    compute = run._packed_training_pass
    run._packed_training_pass = lambda *args: found.append(compute(*args)) or found[-1]  # type: ignore
    inputs = run._prepare_inputs([row for row in rows(2, SIZES) for _ in range(4)])
    seen = tokens_of_forwards(run)
    run._compute_loss(run.model, inputs).backward()
    assert seen == once(inputs) and flash.calls
    mask = inputs["completion_mask"].bool()
    assert torch.equal(found[-1][0][mask], inputs["old_per_token_logps"][mask])


# -- models that cannot ------------------------------------------------------------------------------------------------


def test_sliding_windows_are_refused_by_name(flash_attn: None) -> None:
    model = flash.by_flash(families.build("gemma3")[0])
    assert refusal(model) == (
        "the model has layers of sliding_attention, which flash_attention_2 has not for packed rows"
    )
    model.config.text_config.layer_types = ["full_attention"] * 2
    assert refusal(model) == ""


def test_a_softcap_is_refused_by_name(flash_attn: None, caplog: pytest.LogCaptureFixture) -> None:
    """Which no configuration tells in the same way: the comparison of the first pass finds it."""
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    flash.by_flash(model)
    for layer in model.model.language_model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs, softcap=30.0)
    with pytest.raises(ValueError, match="NotImplementedError: packed rows by flash_attention_2 have no softcap"):
        passes_of(model, "packed", sharing="on").hidden(batch, range(len(batch)), view)


def test_without_flash_attn() -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("it is there")
    model = flash.by_flash(families.build(FAMILY)[0])
    assert (
        unusable() == refusal(model) == "flash_attention_2 is not flash-attn 2.7 or newer: No module named 'flash_attn'"
    )


# -- the stand-in ------------------------------------------------------------------------------------------------------


def test_the_stand_in_gives_autograds_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = (5, 4, 8), (7, 2, 8), (7, 2, 8)
    leaves = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    ends = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
    grad = torch.randn(shapes[0], generator=draw, dtype=torch.float64)
    for causal in (False, True):
        options: dict[str, Any] = {"dropout_p": 0.0, "softmax_scale": 0.3, "causal": causal}
        expected = torch.autograd.grad(flash.flash_attn_varlen_func(*leaves, *ends, 3, 4, **options), leaves, grad)
        inputs = [leaf.detach() for leaf in leaves]
        out, lse, *_ = flash._flash_attn_varlen_forward(*inputs, *ends, 3, 4, **options)
        found = [torch.empty_like(x) for x in inputs]
        rest: dict[str, Any] = {"softcap": 0.0, "alibi_slopes": None, "deterministic": False}
        windows = {"window_size_left": -1, "window_size_right": -1}
        flash._flash_attn_varlen_backward(grad, *inputs, out, lse, *found, *ends, 3, 4, **options, **windows, **rest)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None, reason="no GPU with flash-attn"
)
@pytest.mark.parametrize("packs", PACKS)
def test_on_a_gpu(packs: str) -> None:
    """The real functions in bfloat16, beside the dense mask in float32 on the same numbers."""
    segments, mask = packed(PACKS[packs], "cuda")
    count, _, length, _ = mask.shape
    draw = torch.Generator().manual_seed(0)
    shapes = ((count, 4, length, 64), *2 * ((count, 2, length, 64),))
    leaves = [torch.randn(shape, generator=draw).bfloat16().cuda().requires_grad_() for shape in shapes]
    real = mask.any(-1).transpose(1, 2).unsqueeze(-1)

    def dense(*inputs: Tensor) -> Tensor:
        seen = mask | ~mask.any(-1, keepdim=True)
        return scaled_dot_product_attention(*(x.float() for x in inputs), seen, enable_gqa=True).transpose(1, 2)

    weights = torch.randn(count, length, 4, 64, generator=draw).cuda() * real
    for way in (lambda *inputs: attention(None, *inputs, segments)[0], dense):
        out = way(*leaves)
        grads = torch.autograd.grad((out.float() * weights).sum(), leaves)
        if way is not dense:
            found = [out.float() * real, *grads]
    for one, other in zip(found, [out * real, *grads], strict=True):
        assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()
