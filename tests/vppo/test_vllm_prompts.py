"""Prompts with one placeholder an image, and vLLM's side of a run with an engine that keeps what it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support import families
from support.engine import Engine, engine  # noqa: F401
from support.looking import call_it_first, look
from support.runs import FAMILY, options, rows, varied_reward
from trl.chat_template_utils import qwen3_vl_chat_template
from trl.data_utils import prepare_multimodal_messages

from vppo import VPPOConfig, VPPOTrainer
from vppo.errors import InputError
from vppo.loading import load_processor
from vppo.sampler_guard import SamplerMismatchError
from vppo.vllm_prompts import TextOnly, Unexpanded, first_difference

PLACEHOLDERS = {"gemma3": "<start_of_image>", "llava": "<image>", "idefics3": "<image>", "internvl": "<image>"}


def conversation(row: dict[str, Any]) -> Any:
    return prepare_multimodal_messages(row["prompt"], images=row["images"])


@pytest.mark.parametrize("family", [*(each.name for each in families.FAMILIES), "internvl"])
def test_text_alone_has_one_placeholder_an_image(family: str) -> None:
    processor = families.build(family)[1]
    placeholder = families.VOCABULARY[PLACEHOLDERS.get(family, "<|image_pad|>")]
    data = rows(3, images=(2, 1, 0))
    for row, count in zip(data, (2, 1, 0), strict=True):
        given = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        expanded = processor.apply_chat_template([conversation(row)], **given)["input_ids"][0]
        plain = TextOnly(processor).apply_chat_template([conversation(row)], **given)["input_ids"][0]
        assert plain.count(placeholder) == count and (plain == expanded) == (count == 0)
        text = processor.apply_chat_template(conversation(row), tokenize=False, add_generation_prompt=True)
        again = processor(text=[text], images=[row["images"]] if count else None)["input_ids"][0]
        assert again == expanded and plain == processor.tokenizer(text)["input_ids"]


def test_pieces_that_were_told_are_replaced() -> None:
    change = Unexpanded()
    change.tell_prompts([[1, 9, 9, 2], [1, 9, 9, 9, 2]], [[1, 9, 2], [1, 9, 2]])
    change.tell_results([4, 9, 9, 5], [4, 9, 5])
    change.tell_results([4, 9, 9, 9, 5], [4, 9, 5])
    assert change([1, 9, 9, 9, 2]) == [1, 9, 2]
    assert change([1, 9, 9, 2, 7, 4, 9, 9, 5, 4, 8, 4, 9, 9, 9, 5]) == [1, 9, 2, 7, 4, 9, 5, 4, 8, 4, 9, 5]
    assert change([1, 9, 2]) == [1, 9, 2] and change([3, 3]) == [3, 3]
    change.clear()
    assert change([1, 9, 9, 2]) == [1, 9, 9, 2]


def test_the_first_difference_is_named() -> None:
    tokenizer = families.tokenizer("<image>")
    a, b, image = (families.VOCABULARY[token] for token in ("a", "b", "<image>"))
    assert first_difference(0, [a, b], [a, b], tokenizer) is None
    assert first_difference(3, [a, image, image, b], [a, image, b], tokenizer) == (
        f"the sampler's prompt of row 3 has 4 tokens where the trainer's has 3; the first that differs is number 2: "
        f"{image} ('<image>') for {b} ('b')"
    )
    assert str(first_difference(3, [a], [a, b], tokenizer)).endswith(f"number 1: its end for {b} ('b')")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = families.build(FAMILY)
    processor.chat_template = qwen3_vl_chat_template
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def colocated(path: Path, folder: Path, data: list[dict[str, Any]], **changes: Any) -> VPPOTrainer:
    tools = changes.pop("tools", None)
    processor = changes.pop("processor", None) or load_processor(str(folder))
    given = {"per_device_train_batch_size": 12, "generation_kwargs": None, "use_vllm": True, "vllm_mode": "colocate"}
    return VPPOTrainer(
        model=str(folder),
        reward_funcs=varied_reward,
        args=VPPOConfig(**options(path, **{"model_init_kwargs": {"dtype": "float32"}, **given, **changes})),
        train_dataset=Dataset.from_list(data),
        processing_class=processor,
        tools=tools,
    )


def gaps(run: VPPOTrainer) -> list[float]:
    return [entry["vppo/sampler_gap_mean"] for entry in run.state.log_history if "vppo/sampler_gap_mean" in entry]


def counts(given: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Placeholders and images of each prompt that the engine was given."""
    token = families.VOCABULARY["<|image_pad|>"]
    found = []
    for prompt in given:
        images = prompt.get("multi_modal_data", {}).get("image", [])
        found.append((prompt["prompt_token_ids"].count(token), len(images) if isinstance(images, list) else 1))
    return found


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.usefixtures("engine")
def test_the_engine_draws_from_the_trainers_prompts(correction: bool, folder: Path, tmp_path: Path) -> None:
    """With and without the pass that TRL makes for its importance sampling correction; weights follow the steps."""
    data = rows(3, sizes=((56, 28), (28, 56), (84, 28)), images=(1, 2, 0))
    run = colocated(tmp_path, folder, data, vllm_importance_sampling_correction=correction, temperature=0.7)
    run.train()
    assert sorted(set(counts(Engine.latest.given))) == [(0, 0), (1, 1), (2, 2)]
    assert len(gaps(run)) == 2 and max(gaps(run)) < 1e-4
    assert Engine.latest.forgotten == 2  # encoded images are of the weights that encoded them
    before = load_processor(str(folder)) and dict(Engine(str(folder)).model.named_parameters())
    moved = [(weight - before[name]).abs().max() for name, weight in run.model.named_parameters()]
    assert max(moved) > 1e-3
    bias = run.vllm_generation.generation_kwargs["logit_bias"]
    assert set(bias.values()) == {-100.0} and families.VOCABULARY["<|image_pad|>"] in bias


@pytest.mark.usefixtures("engine")
def test_a_prompt_that_was_expanded_twice_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Unexpanded, "__call__", lambda self, ids: ids)
    with pytest.raises(SamplerMismatchError, match=r"nats on the mean .* expanded twice"):
        colocated(tmp_path, folder, rows(3)).train()


@pytest.mark.usefixtures("engine")
def test_other_weights_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "load_weights", lambda self, weights: None)
    with pytest.raises(SamplerMismatchError, match=r"step 1: .*weights that are not synchronised"):
        colocated(tmp_path, folder, rows(3), learning_rate=1e-2).train()


@pytest.mark.usefixtures("engine")
def test_nothing_changes_where_prompts_come_right(folder: Path, tmp_path: Path) -> None:
    """A later TRL hands over prompts with one placeholder an image."""
    run = colocated(tmp_path, folder, rows(3, images=(1, 2, 0)))
    generate = run.vllm_generation.generate
    token = families.VOCABULARY["<|image_pad|>"]

    def mended(prompts: list[list[int]], **kwargs: Any) -> Any:
        single = [
            [t for t, last in zip(ids, [None, *ids], strict=False) if (t, last) != (token, token)] for ids in prompts
        ]
        return generate(prompts=single, **kwargs)

    run.vllm_generation.generate = mended
    run.train()
    assert sorted(set(counts(Engine.latest.given))) == [(0, 0), (1, 1), (2, 2)]
    assert max(gaps(run)) < 1e-4


@pytest.mark.usefixtures("engine")
def test_image_limits_reach_the_engine(folder: Path, tmp_path: Path) -> None:
    processor = load_processor(str(folder), min_pixels=784, max_pixels=784)
    run = colocated(tmp_path, folder, rows(3), processor=processor)
    run.train()
    assert Engine.latest.options["mm_processor_kwargs"] == {"min_pixels": 784, "max_pixels": 784}
    assert max(gaps(run)) < 1e-4


@pytest.mark.usefixtures("engine")
def test_settings_that_do_not_reach_the_engine_are_refused(folder: Path, tmp_path: Path) -> None:
    processor = load_processor(str(folder))
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    with pytest.raises(InputError, match="processing_class: image_mean: vLLM reads"):
        colocated(tmp_path, folder, rows(3), processor=processor)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.usefixtures("engine")
def test_pictures_of_tools_have_one_placeholder_too(images: int, folder: Path, tmp_path: Path) -> None:
    run = colocated(
        tmp_path, folder, rows(2, images=(images,)), tools=[look], max_completion_length=250, max_steps=1,
        per_device_train_batch_size=8,
    )  # fmt: skip
    call_it_first(run)
    run.train()
    assert counts(Engine.latest.given) == [(1 + images, 1 + images)] * 8
    assert len(gaps(run)) == 1 and gaps(run)[0] < 1e-4


@pytest.mark.usefixtures("engine")
def test_a_run_says_what_samples(folder: Path, tmp_path: Path) -> None:
    said = colocated(tmp_path, folder, rows(3)).describe_sampler()
    assert said.startswith("Sampler: vLLM 0.31.0, colocate, in this process (trl 1.")
    assert f"torch {torch.__version__.split('+')[0]}" in said and said.endswith("error, at 0.05 nats a token")
