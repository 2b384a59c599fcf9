"""The training pass with prompts shared: the plain one's loss and gradients from fewer tokens; when it is not taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support import families
from support.runs import fix_rollouts, rows, trainer
from test_passes import linear_attention
from torch import Tensor

from vppo import VPPOTrainer
from vppo.batch import Batch, View

NAMES = [f.name for f in families.FAMILIES]
SIZES = ((56, 28), (30, 60))
LENGTHS = (6, 3, 5, 1)  # of the responses to each prompt
WHOLE = {"per_device_train_batch_size": 8}  # a step's rollouts are one micro-batch


def tokens_of_forwards(run: VPPOTrainer) -> list[int]:
    """A list that receives the real tokens of every forward of the backbone from here on."""
    seen: list[int] = []
    policy = run.accelerator.unwrap_model(run.model)
    backbone = getattr(policy, "get_base_model", lambda: policy)().base_model

    def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        seen.append(int(inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :].sum()))

    backbone.register_forward_pre_hook(count, with_kwargs=True)
    return seen


def step(
    run: VPPOTrainer, images: Sequence[int] = (1, 1), **changes: Any
) -> tuple[Tensor, dict[str, Tensor], list[int], dict[str, Any]]:
    """Two prompts with four responses each as one shuffled micro-batch: its loss, gradients, forwards and inputs."""
    fix_rollouts(run, LENGTHS)
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    inputs = {**run._prepare_inputs([row for row in rows(2, SIZES, images) for _ in range(4)]), **changes}
    seen = tokens_of_forwards(run)
    loss = run._compute_loss(run.model, inputs)
    loss.backward()
    return loss, {name: w.grad for name, w in run.model.named_parameters() if w.grad is not None}, seen, inputs


def whole(inputs: dict[str, Any]) -> list[int]:
    return [int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())]


def once(inputs: dict[str, Any]) -> list[int]:
    """Each prompt, then all responses but their last tokens, from which nothing is predicted."""
    lengths = dict(zip(inputs["prompt"].tolist(), inputs["prompt_mask"].sum(1).tolist(), strict=True))
    longest = inputs["completion_mask"].shape[1]
    return [sum(lengths.values()), int(inputs["completion_mask"][:, : longest - 1].sum())]


def same(shared: VPPOTrainer, plain: VPPOTrainer, images: Sequence[int] = (1, 1)) -> None:
    loss, grads, seen, inputs = step(shared, images)
    plain_loss, plain_grads, plain_seen, _ = step(plain, images)
    assert inputs["prompt"].tolist() != sorted(inputs["prompt"].tolist())  # TRL has shuffled it
    assert seen == once(inputs) and plain_seen == whole(inputs)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == plain_grads.keys()
    size = torch.cat([grad.flatten() for grad in plain_grads.values()]).norm()
    assert size > 1e-2
    for name, grad in plain_grads.items():
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * size, name
    for name in ("entropy", "clip_ratio/region_mean", "vppo/clip_ratio_kept"):
        assert shared._metrics["train"][name] == pytest.approx(plain._metrics["train"][name], rel=1e-4), name


@pytest.mark.parametrize("images", [(1, 1), (2, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_it_is_the_plain_one(family: str, images: tuple[int, int], tmp_path: Path) -> None:
    same(*(trainer(tmp_path, family=family, prefix_sharing=way, **WHOLE) for way in ("on", "off")), images)


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_recipes(recipe: str, tmp_path: Path) -> None:
    """The penalty of the released code looks at these log-probabilities too; a view for each rollout is no obstacle."""
    same(*(trainer(tmp_path, recipe=recipe, prefix_sharing=way, **WHOLE) for way in ("auto", "off")))


def test_lora(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(0)
    shared = trainer(tmp_path, peft_config=lora, prefix_sharing="on", **WHOLE)
    torch.manual_seed(0)
    same(shared, trainer(tmp_path, peft_config=lora, prefix_sharing="off", **WHOLE))


def test_old_logprobs_of_another_pass(tmp_path: Path) -> None:
    """In float32 the ratio of the two passes is 1 but for the last digits."""
    run = trainer(tmp_path, num_iterations=2, **WHOLE)
    *_, seen, inputs = step(run)
    assert seen == once(inputs)
    assert run._metrics["train"]["clip_ratio/region_mean"] == [0]


def of_lora(path: Path, **settings: Any) -> VPPOTrainer:
    lora = LoraConfig(r=2, target_modules=["q_proj"], **{"lora_dropout": 0.0, **settings})
    return trainer(path, peft_config=lora, **WHOLE)


# where a pass that shares would be another one, or could not have gradients
PLAIN: dict[str, Callable[[Path], VPPOTrainer]] = {
    "not wanted": lambda path: trainer(path, prefix_sharing="off", **WHOLE),
    "activations recomputed": lambda path: trainer(path, gradient_checkpointing=True, **WHOLE),
    "dropout": lambda path: of_lora(path, lora_dropout=0.1),
    "a head within another": lambda path: of_lora(path, modules_to_save=["lm_head"]),
    "a cache that is overwritten": lambda path: trainer(path, family="qwen3_vl", model=linear_attention()[0], **WHOLE),
    "16 bits, and a ratio": lambda path: trainer(path, bf16=True, num_iterations=2, **WHOLE),
    "no scores": lambda path: trainer(path, algorithm="dapo", **WHOLE),
}


@pytest.mark.parametrize("why", PLAIN)
def test_rows_pass_whole(why: str, tmp_path: Path) -> None:
    *_, seen, inputs = step(PLAIN[why](tmp_path))
    assert seen[:1] == whole(inputs)


def test_a_run_that_has_scored_nothing_yet(tmp_path: Path) -> None:
    """A resumed run takes the same passes as one that was not stopped, whatever its first step holds."""
    run = trainer(tmp_path, reward=lambda completions, **_: [1.0] * len(completions), **WHOLE)
    *_, seen, inputs = step(run)
    assert len(seen) > 2 and seen[-2:] == once(inputs)  # after the comparison with the plain pass


def test_a_response_with_an_image_passes_whole(tmp_path: Path) -> None:
    """As a tool may give one."""
    run = trainer(tmp_path, **WHOLE)
    inputs = step(run)[-1]
    batch, view = Batch(inputs), View(inputs["prompt"].tolist())
    assert run._passes.carry_gradients(batch, view)
    batch.completion_ids[0, 0] = run.model.config.image_token_id
    assert not run._passes.carry_gradients(batch, view)


def test_rows_without_a_prompt_in_common_pass_whole(tmp_path: Path) -> None:
    run = trainer(tmp_path, **WHOLE)
    inputs = step(run)[-1]
    seen = tokens_of_forwards(run)
    apart = {**inputs, "prompt": torch.arange(8)}
    run._compute_loss(run.model, apart)
    assert seen[:1] == whole(inputs)


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8's tracer fails by itself (InternalTorchDynamoError)")
def test_a_compiled_model(tmp_path: Path) -> None:
    """Which has no truth value."""
    weights = []
    for compiled in (True, False):
        backend = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        run = trainer(tmp_path, max_steps=1, optim="sgd", learning_rate=0.1, **backend, **WHOLE)
        fix_rollouts(run, LENGTHS)
        run.train()
        weights.append({name.removeprefix("_orig_mod."): w.detach() for name, w in run.model.named_parameters()})
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=1e-4, atol=1e-5)
