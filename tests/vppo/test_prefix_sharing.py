"""Passes that share prompts: the plain pass's hidden states, with fewer tokens; and when they are not taken."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support import families
from support.runs import FAMILY, batch_inputs
from support.views import PeakMemory
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration, Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.masking_utils import create_causal_mask

from vppo.batch import Batch, View
from vppo.cached_prompts import cache_name
from vppo.heads import logit_options
from vppo.packed_rows import PackedRows, refusal
from vppo.perturbations import Perturbation, PixelLayout, seeded
from vppo.prefix_sharing import Footprint, ResponsePasses
from vppo.scoring import score

NAMES = [f.name for f in families.FAMILIES]
GROUPS = ((4, 1), (1, 2), (3, 1))  # (rollouts, images) of each prompt


CACHE = cache_name(families.build(FAMILY)[0])


@cache
def built(name: str) -> tuple[Any, Any]:
    return families.build(name)


def grouped(
    model: Any,
    processor: Any,
    groups: Sequence[tuple[int, int]] = GROUPS,
    lengths: Sequence[int] = (5, 2, 6, 1, 3),
    questions: Sequence[int] = (9, 2, 5),
) -> tuple[Batch, View]:
    """A batch of prompts that differ in length, number and size of images; lengths of questions and responses go round.

    Returns:
        The batch and its clean view.
    """
    data, keys = [], []
    for prompt, (rollouts, images) in enumerate(groups):
        pictures = [families.picture(10 * prompt + i, ((56, 28), (28, 56))[prompt % 2]) for i in range(images)]
        question = "How much?"[: questions[prompt % len(questions)]]
        for _ in range(rollouts):
            ids = torch.randint(
                len(families.SPECIAL),
                len(families.VOCABULARY),
                (lengths[len(data) % len(lengths)],),
                generator=torch.Generator().manual_seed(len(data)),
            )
            chat = [{"role": "user", "content": question}]
            data.append({"prompt": chat, "images": pictures, "response_ids": ids.tolist()})
            keys.append(prompt)
    return Batch(batch_inputs(model, processor, data)), View(keys)


def perturbed(batch: Batch, processor: Any, keys: Sequence[int]) -> View:
    """A perturbed view of the rows with images, drawn once for each key."""
    layout = PixelLayout.of(processor.image_processor)
    first = {key: row for row, key in reversed(list(enumerate(keys))) if batch.has_image[row]}
    draw = Perturbation(patch_size=layout.patch_size)
    return View(keys, {key: batch.perturbed_pixels(row, layout, draw, seeded(key)) for key, row in first.items()})


def passes_of(model: Any, way: str | None = None, **options: Any) -> ResponsePasses:
    """Passes that know only one way to share, "packed" or "cached"; None lets them choose."""
    passes = ResponsePasses(model, **options)
    if way is not None:
        passes._ways = [getattr(passes, f"_pass_{way}")]
    return passes


def hidden(model: Any, batch: Batch, view: View, rows: Sequence[int] | None = None, **options: Any) -> Tensor:
    """`[tokens, D]` of the response tokens."""
    rows = range(len(batch)) if rows is None else rows
    found = passes_of(model, **options).hidden(batch, rows, view)
    return found[batch.completion_mask[list(rows), : found.shape[1]].bool()]


def same(model: Any, batch: Batch, view: View, way: str | None = "packed", **options: Any) -> None:
    shared = hidden(model, batch, view, sharing="on", way=way, **options)
    plain = hidden(model, batch, view, sharing="off", **options)
    assert len(plain) and plain.norm() > 0.1
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)


def count_passes(model: Any) -> list[SimpleNamespace]:
    """A list that receives, of every forward, its real tokens, those of images, and rows of pixels."""
    seen: list[SimpleNamespace] = []

    def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        pixels = inputs.get("pixel_values")
        real = mask[:, -ids.shape[1] :].bool()
        seen.append(
            SimpleNamespace(
                rows=len(ids),
                tokens=int(real.sum()),
                images=int((ids[real] == families.VOCABULARY["<|image_pad|>"]).sum()),
                patches=0 if pixels is None else len(pixels),
            )
        )

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    return seen


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "memory"), [("packed", 1 << 17), ("packed", 1 << 32), ("cached", 1), ("cached", 1 << 32)]
)
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_the_plain_ones(name: str, way: str, memory: int) -> None:
    model, processor = built(name)
    batch, view = grouped(model, processor)
    same(model, batch, view, way, memory=memory)
    same(model, batch, perturbed(batch, processor, view.keys), way, memory=memory)
    same(model, batch, view, way, memory=memory, rows=[6, 1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    groups=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 2)), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    questions=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    memory=st.sampled_from([1, 200_000, 1 << 32]),
)
def test_whatever_the_shapes_are(
    name: str, groups: list[tuple[int, int]], lengths: list[int], questions: list[int], memory: int
) -> None:
    model, processor = built(name)
    batch, view = grouped(model, processor, groups, lengths, questions)
    options = {"kind": "kl", "options": logit_options(model, 1.0)}
    spoiled = perturbed(batch, processor, view.keys)
    shared, plain = (
        score(ResponsePasses(model, sharing=way, memory=memory), batch, range(len(batch)), view, spoiled, **options)
        for way in ("auto", "off")
    )
    torch.testing.assert_close(shared, plain, rtol=1e-3, atol=1e-6)
    same(model, batch, view, memory=memory)


@pytest.mark.parametrize("name", NAMES)
def test_text_beside_images(name: str) -> None:
    model, processor = built(name)
    batch, view = grouped(model, processor, ((2, 1), (3, 0), (2, 1)))
    assert batch.has_image.tolist() == [True] * 2 + [False] * 3 + [True] * 2
    same(model, batch, view)
    same(model, batch, view, "cached")


@pytest.mark.parametrize("name", NAMES)
def test_text_alone_after_images(name: str) -> None:
    """What a model remembers of the last image's height and width must not reach the next prompt."""
    model, processor = built(name)
    batch, view = grouped(model, processor)
    hidden(model, batch, view)
    same(model, *grouped(model, processor, ((3, 0), (2, 0))))


def _eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def _checkpointing(model: Any) -> Any:
    model.train()
    model.gradient_checkpointing_enable()
    return model.eval()


def _lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("change", [_eager, _checkpointing, _lora])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_kinds_of_models(name: str, change: Callable[[Any], Any]) -> None:
    model, processor = families.build(name)
    batch, view = grouped(model, processor)
    same(change(model).eval(), batch, view)


def test_sliding_windows() -> None:
    """A window shorter than the prompts, in every second layer."""
    plain, processor = families.build("gemma3")
    config = plain.config
    config.text_config.layer_types = ["sliding_attention", "full_attention"]
    config.text_config.sliding_window = 6
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    batch, view = grouped(model, processor)
    assert batch.prompt_mask.sum(1).min() > 6
    same(model, batch, view)
    same(model, batch, view, "cached")


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3", "internvl"])
def test_flex_attention(name: str) -> None:
    """Its block mask comes from the same function; compiled kernels are a GPU's, here the definition runs."""
    model, processor = families.build(name)
    batch, view = grouped(model, processor)
    plain = hidden(model, batch, view, sharing="off")
    model.set_attn_implementation({"text_config": "flex_attention"})
    with torch.compiler.set_stance("force_eager"):
        shared = hidden(model, batch, view, sharing="on", way="packed")
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)


def linear_attention() -> tuple[Any, Any]:
    """A model with states instead of keys in every second layer."""
    _, processor = families.build("qwen3_vl")
    text = {
        **families.TEXT,
        "head_dim": 16,
        "rope_parameters": {**families.MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": families.HIDDEN,
        "num_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **families.QWEN_TOKENS)
    return Qwen3_5ForConditionalGeneration(config).eval(), processor


@pytest.mark.parametrize("memory", [1, 1 << 32])
def test_hybrid_caches(memory: int) -> None:
    """Shared or not, whatever this version of transformers can: the numbers are the plain ones."""
    model, processor = linear_attention()
    batch, view = grouped(model, processor)
    shared = hidden(model, batch, view, sharing="on", memory=memory)
    alone, together = (hidden(model, batch, view, sharing="off", memory=each) for each in (1, 1 << 32))
    # a state is summed in other chunks where a row is padded differently: the plain passes differ by that, too
    rounding = (alone - together).abs().max().item()
    assert rounding < 5e-5
    torch.testing.assert_close(shared, together, rtol=1e-5, atol=1e-5 + rounding)


def test_the_cache_has_the_name_of_this_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 renamed it and warns of the older name, now by its logger, now by `warnings`."""
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda logger, message, *_: said.append(message), raising=False)
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    model = _lora(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden(model, batch, view, sharing="on")
    assert not [message for message in said if "past_key_values" in message]


def test_half_precision_is_shared() -> None:
    model, processor = families.build(FAMILY)
    model.bfloat16()
    batch, view = grouped(model, processor)
    shared, plain = (hidden(model, batch, view, sharing=way).float() for way in ("on", "off"))
    assert (shared - plain).norm() < 0.02 * plain.norm()


def test_the_model_forgets_the_pass() -> None:
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    passes = after_the_check(model, batch, view)
    model.model.rope_deltas = remembered = torch.tensor([[7]])
    passes.hidden(batch, range(len(batch)), view)
    assert model.model.rope_deltas is remembered
    assert "forward" not in model.get_output_embeddings().__dict__


# -- fewer tokens ------------------------------------------------------------------------------------------------------


def after_the_check(model: Any, batch: Batch, view: View, **options: Any) -> ResponsePasses:
    """Passes whose first use, with its comparison, lies behind them."""
    passes = passes_of(model, **options)
    passes.hidden(batch, range(len(batch)), view)
    return passes


def test_tokens_that_pass() -> None:
    """Prompts and images once for each prompt and view; what predicts nothing not at all."""
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    passes = after_the_check(model, batch, view)
    seen = count_passes(model)
    spoiled = perturbed(batch, processor, view.keys)
    score(passes, batch, range(len(batch)), view, spoiled, kind="kl", options=logit_options(model, 1.0))
    leaders = [view.keys.index(key) for key in (0, 1, 2)]
    prompts = sum(batch.prompt_lengths[row] for row in leaders)
    images = sum(int((batch.prompt_ids[row] == families.VOCABULARY["<|image_pad|>"]).sum()) for row in leaders)
    assert [s.tokens for s in seen] == [prompts - 3 + sum(batch.response_lengths)] * 2
    assert [s.images for s in seen] == [images] * 2
    assert [s.patches for s in seen] == [4 * images] * 2, "four patches a token"


def test_tokens_that_pass_where_memory_is_short() -> None:
    """In as few packs as fit; and from a cache response by response, with no prompt twice."""
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor, ((4, 1), (3, 2)), lengths=(5, 2, 6, 4))
    first, second = batch.prompt_lengths[0], batch.prompt_lengths[4]
    pair = passes_of(model)._pack_cost(batch, [2, 3])
    counts = {
        ("packed", 1): [n - 1 + r for n, r in zip([first] * 4 + [second] * 3, batch.response_lengths, strict=True)],
        ("packed", pair): [first - 1 + 7, first - 1 + 10, second - 1 + 13],
        ("cached", 1): [first, 4, 1, 5, 3, second, 4, 1, 5],
    }
    for (way, memory), expected in counts.items():
        passes = after_the_check(model, batch, view, way=way, memory=memory)
        seen = count_passes(model)
        for portion in passes.portions(batch, range(7), view):
            passes.hidden(batch, portion, view)
        assert [s.tokens for s in seen] == expected, way
        assert all(s.rows == 1 for s in seen)


def test_long_responses_pass_in_smaller_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention with a dense mask pays for what is masked; FlexAttention does not."""
    model, processor = built(FAMILY)
    batch, view = grouped(model, processor, ((8, 1),))

    def sizes(length: int) -> list[int]:
        batch.response_lengths = [length] * 8
        return [len(pack) for pack in ResponsePasses(model).packs(batch, range(8), view)]

    assert sizes(5) == [8]
    assert sizes(40) == [2] * 4
    assert sizes(1000) == [1] * 8
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "flex_attention")
    assert sizes(1000) == [8]


def test_without_sharing_every_row_passes_whole() -> None:
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    seen = count_passes(model)
    hidden(model, batch, view, sharing="off")
    assert sum(s.tokens for s in seen) == sum(batch.prompt_lengths) + sum(batch.response_lengths)


def test_a_view_for_every_row_passes_whole() -> None:
    """Nothing is shared between rows that are shown different images, though their prompts are the same."""
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    passes = after_the_check(model, batch, view)
    seen = count_passes(model)
    spoiled = perturbed(batch, processor, list(range(len(batch))))
    found = passes.hidden(batch, range(len(batch)), spoiled)
    assert len(seen) == 1 and seen[0].tokens == sum(batch.prompt_lengths) + sum(batch.response_lengths)
    for row in range(len(batch)):
        length = batch.response_lengths[row]
        own = hidden(model, batch, spoiled, rows=[row])
        torch.testing.assert_close(found[row, :length], own, rtol=1e-5, atol=1e-5)


def test_rows_of_one_key_with_other_prompts_are_kept_apart() -> None:
    model, processor = built(FAMILY)
    batch, view = grouped(model, processor)
    careless = View([0] * len(batch))
    assert not torch.equal(batch.prompt_ids[0], batch.prompt_ids[4])
    torch.testing.assert_close(
        hidden(model, batch, careless, sharing="on"), hidden(model, batch, view, sharing="off"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("length", [200, 700])
def test_the_mask_takes_no_more_than_it_is_counted_for(length: int) -> None:
    """Bytes of a pair of tokens, while the mask is made and as attention takes it."""
    model, processor = built(FAMILY)
    batch, view = grouped(model, processor, ((2, 1),), lengths=(length,))
    packed = PackedRows(model, batch, [[0, 1]], view)
    tokens = packed.inputs["input_ids"].shape[1]
    with torch.no_grad(), packed.masked(), PeakMemory() as memory:
        mask = create_causal_mask(
            config=model.config.text_config, inputs_embeds=torch.empty(1, tokens, 1), past_key_values=None,
            attention_mask=packed.inputs["attention_mask"], position_ids=None,
        )  # fmt: skip
        taken = mask.new_zeros(mask.shape, dtype=model.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    assert mask.shape == taken.shape == (1, 1, tokens, tokens)
    counted = Footprint.of(model).pair * tokens**2
    assert counted / 2 <= memory.peak <= counted


def test_portions_are_whole_prompts_that_fit() -> None:
    model, processor = built(FAMILY)
    batch, view = grouped(model, processor)
    rows, footprint = range(len(batch)), Footprint.of(model)
    assert ResponsePasses(model, memory=1).portions(batch, rows, view) == [[0, 1, 2, 3], [4], [5, 6, 7]]
    assert ResponsePasses(model).portions(batch, rows, view) == [list(rows)]
    tokens = [p + r for p, r in zip(batch.prompt_lengths, batch.response_lengths, strict=True)]
    fits = 4 * (footprint.cached + footprint.passing) * sum(tokens[:4])
    assert len(ResponsePasses(model, memory=fits).portions(batch, rows, view)) < 3
    assert ResponsePasses(model).portions(batch, [], view) == []


def test_the_footprint_of_a_cached_token_is_at_least_what_the_cache_takes() -> None:
    model, processor = built(FAMILY)
    batch, view = grouped(model, processor)
    with torch.no_grad():
        kept = getattr(model(**batch.prompts([0], view), use_cache=True), CACHE)
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    assert taken <= Footprint.of(model).cached * batch.prompt_lengths[0] <= 4 * taken


# -- models that cannot ------------------------------------------------------------------------------------------------


def _no_cache(forward: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output[CACHE] = None
        return output

    return changed


def _forgets(forward: Any) -> Any:
    return lambda *args, **kwargs: forward(*args, **{**kwargs, CACHE: None})


def _refuses(forward: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get(CACHE) is not None:
            raise TypeError(f"forward() got an unexpected keyword argument '{CACHE}'\nand more")
        return forward(*args, **kwargs)

    return changed


def _misplaces(forward: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = 2 * kwargs["position_ids"] + 3
        return forward(*args, **kwargs)

    return changed


def _makes_its_own_masks(forward: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("position_ids") is not None:
            length = kwargs["input_ids"].shape[1]
            kwargs["attention_mask"] = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        return forward(*args, **kwargs)

    return changed


CANNOT = {
    (_no_cache, "cached"): "the model's cache is a NoneType, which cannot be repeated",
    (_forgets, "cached"): "differ from the plain pass by|cannot go on from a cache",
    (_refuses, "cached"): f"TypeError: .*{CACHE}'",
    (_misplaces, "cached"): "hidden states from a cache differ from the plain pass by",
    (_misplaces, "packed"): "hidden states from packed rows differ from the plain pass by",
    (_makes_its_own_masks, "packed"): "NotImplementedError: the model makes its masks in a way of its own",
}


@pytest.mark.parametrize(("change", "way"), CANNOT)
def test_one_warning_and_the_same_numbers(change: Any, way: str, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    plain = hidden(model, batch, view, sharing="off")
    model.forward = change(model.forward)
    passes = passes_of(model, way)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = passes.hidden(batch, range(len(batch)), view)
    torch.testing.assert_close(found[batch.completion_mask.bool()], plain, rtol=1e-5, atol=1e-5)
    warnings = [record.message for record in caplog.records if "not shared" in record.message]
    assert len(warnings) == 1 and "\n" not in warnings[0]
    with pytest.raises(
        ValueError, match=rf"prefix_sharing: got 'on', takes 'auto' or 'off' here: .*({CANNOT[change, way]})"
    ):
        hidden(model, batch, view, sharing="on", way=way)


@pytest.mark.parametrize("sharing", ["auto", "on"])
def test_the_next_best_way(sharing: str, caplog: pytest.LogCaptureFixture) -> None:
    """A model whose masks are out of reach goes on from its cache."""
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    plain = hidden(model, batch, view, sharing="off")
    forward, changed = model.forward, _makes_its_own_masks(model.forward)
    model.forward = lambda **given: (forward if CACHE in given else changed)(**given)
    passes = ResponsePasses(model, sharing=sharing)
    for _ in range(2):
        found = passes.hidden(batch, range(len(batch)), view)
    torch.testing.assert_close(found[batch.completion_mask.bool()], plain, rtol=1e-5, atol=1e-5)
    assert passes._ways == [passes._pass_cached] and not passes.packs_rows(batch, view)
    assert caplog.text.count("shared while scoring, but not in training passes: the model cannot take packed rows") == 1


def test_what_a_configuration_tells() -> None:
    model, _ = families.build(FAMILY)
    assert refusal(model) == ""
    model.config.text_config._attn_implementation_internal = "flash_attention_3"
    masks = "sdpa, eager, flex_attention do, and flash_attention_2 needs none"
    assert refusal(model) == f"attention by flash_attention_3 takes no mask ({masks})"
    states, _ = linear_attention()
    assert refusal(states) == "the model has layers of linear_attention, which no mask reaches"


@pytest.mark.parametrize("way", ["packed", "cached"])
def test_running_out_of_memory_is_no_reason(way: str) -> None:
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_cache") or "position_ids" in kwargs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    model.forward = changed
    with pytest.raises(torch.OutOfMemoryError):
        hidden(model, batch, view, way=way)


def test_images_in_responses_pass_whole(caplog: pytest.LogCaptureFixture) -> None:
    model, processor = families.build(FAMILY)
    batch, view = grouped(model, processor)
    passes = after_the_check(model, batch, view)
    image, before = families.VOCABULARY["<|image_pad|>"], batch.completion_ids[0, 0].item()
    for token in (image, before):
        batch.completion_ids[0, 0] = token
        assert (passes._way(batch, [[0, 1, 2, 3]], view) == passes._pass_whole) == (token == image)
        assert passes._way(batch, [[5, 6, 7]], view) == passes._pass_packed, "others are shared all the same"
    batch.prompt_ids[0, -1] = image
    assert passes._way(batch, [[0, 1, 2, 3]], view) == passes._pass_whole
    assert "a response holds image tokens" in caplog.text


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sharing: got 'perhaps', takes one of \['auto', 'on', 'off'\]"):
        ResponsePasses(built(FAMILY)[0], sharing="perhaps")
