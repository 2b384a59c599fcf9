"""The training pass with prompts shared: the plain one's loss and gradients from fewer tokens; when it is not taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support import families
from support.runs import fix_rollouts, rows, trainer, varied_reward
from test_prefix_sharing import linear_attention
from torch import Tensor

from vppo import VPPOTrainer
from vppo.batch import Batch, View
from vppo.logprobs import packed_logprobs
from vppo.packed_rows import PackedRows
from vppo.sampler_guard import SamplerMismatchError

NAMES = [f.name for f in families.FAMILIES]
SIZES = ((56, 28), (30, 60))
LENGTHS = (6, 3, 5, 1)  # of the responses to each prompt
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
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
    """Two prompts with four responses each as one micro-batch: its loss, gradients, forwards and inputs."""
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
    """Each prompt but its last token, then of each response that token and all of its own but the last."""
    lengths = dict(zip(inputs["prompt"].tolist(), inputs["prompt_mask"].sum(1).tolist(), strict=True))
    return [sum(length - 1 for length in lengths.values()) + int(inputs["completion_mask"].sum())]


def same(shared: VPPOTrainer, plain: VPPOTrainer, images: Sequence[int] = (1, 1)) -> None:
    loss, grads, seen, inputs = step(shared, images)
    plain_loss, plain_grads, plain_seen, _ = step(plain, images)
    shuffled = shared.args.tas_statistics == "micro-batch"
    assert (inputs["prompt"].tolist() != [0] * 4 + [4] * 4) == shuffled
    assert seen == once(inputs) and plain_seen == whole(inputs)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    same_gradients(grads, plain_grads)
    for name in ("entropy", "clip_ratio/region_mean", "vppo/clip_ratio_kept"):
        assert shared._metrics["train"][name] == pytest.approx(plain._metrics["train"][name], rel=1e-4), name


def same_gradients(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert grads.keys() == expected.keys()
    size = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    assert size > 1e-2
    off = {name: (grads[name] - grad).norm() for name, grad in expected.items()}
    assert torch.stack(list(off.values())).norm() <= 2e-6 * size
    for name, grad in expected.items():
        assert off[name] <= 1e-5 * grad.norm() + 1e-6 * size, name


@pytest.mark.parametrize(("images", "checkpointing"), [((1, 1), False), ((2, 1), True), ((1, 0), True)], ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_it_is_the_plain_one(family: str, images: tuple[int, int], checkpointing: bool, tmp_path: Path) -> None:
    settings = {"family": family, "gradient_checkpointing": checkpointing, **WHOLE}
    same(*(trainer(tmp_path, prefix_sharing=way, **settings) for way in ("on", "off")), images)


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_recipes(recipe: str, tmp_path: Path) -> None:
    """The penalty of the released code looks at these log-probabilities too; a view for each rollout is no obstacle."""
    same(*(trainer(tmp_path, recipe=recipe, prefix_sharing=way, **WHOLE) for way in ("auto", "off")))


def test_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = trainer(tmp_path, peft_config=LORA, prefix_sharing="on", **WHOLE)
    torch.manual_seed(0)
    same(shared, trainer(tmp_path, peft_config=LORA, prefix_sharing="off", **WHOLE))


@pytest.mark.parametrize("size", [8, 4, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_ratio_to_old_logprobs_is_one(bf16: bool, size: int, tmp_path: Path) -> None:
    """Exactly, also in 16 bits: both passes have the same packs. A micro-batch holds rollouts of one prompt."""
    run = trainer(
        tmp_path, bf16=bf16, num_iterations=2, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size
    )
    fix_rollouts(run, LENGTHS)
    run.model.train()
    run.current_gradient_accumulation_steps = 8 // size
    data = [row for row in rows(2, SIZES) for _ in range(4)]
    found: list[Tensor] = []
    compute = run._packed_training_pass
    run._packed_training_pass = lambda *args: found.append(compute(*args)) or found[-1]  # type: ignore
    for number in range(8 // size):
        inputs = run._prepare_inputs(data)
        assert inputs["prompt"].tolist() == [4 * (row // 4) for row in range(number * size, number * size + size)]
        seen = tokens_of_forwards(run)
        run._compute_loss(run.model, inputs)
        assert seen == once(inputs)
        mask = inputs["completion_mask"].bool()
        assert torch.equal(found[-1][0][mask], inputs["old_per_token_logps"][mask])
        run._step += 1


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_what_is_recorded_keeps_nothing_else(sharing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of a micro-batch's responses, and no storage of the whole batch or of the prompts behind them."""
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run = trainer(tmp_path, prefix_sharing=sharing, num_iterations=2, **batches)
    fix_rollouts(run, LENGTHS)
    run.model.train()
    run.current_gradient_accumulation_steps = 2
    kept: list[Tensor] = []
    take = run._take_recorded
    monkeypatch.setattr(run, "_take_recorded", lambda output: kept.extend(run._recorded or ()) or take(output))
    run._prepare_inputs([row for row in rows(2, SIZES) for _ in range(4)])
    assert [len(hidden) for hidden in kept] == [4, 4]
    assert all(hidden.untyped_storage().nbytes() == hidden.numel() * hidden.element_size() for hidden in kept)


def of_lora(path: Path, **settings: Any) -> VPPOTrainer:
    lora = LoraConfig(r=2, target_modules=["q_proj"], **{"lora_dropout": 0.0, **settings})
    return trainer(path, peft_config=lora, **WHOLE)


# where a packed pass would be another one
PLAIN: dict[str, Callable[[Path], VPPOTrainer]] = {
    "not wanted": lambda path: trainer(path, prefix_sharing="off", **WHOLE),
    "dropout": lambda path: of_lora(path, lora_dropout=0.1),
    "layers with states": lambda path: trainer(path, family="qwen3_vl", model=linear_attention()[0], **WHOLE),
    "16 bits, a ratio, and a shuffle": lambda path: trainer(
        path, bf16=True, num_iterations=2, recipe="official", **WHOLE
    ),
    "no scores": lambda path: trainer(path, algorithm="dapo", **WHOLE),
}


@pytest.mark.parametrize("why", PLAIN)
def test_rows_pass_whole(why: str, tmp_path: Path) -> None:
    *_, seen, inputs = step(PLAIN[why](tmp_path))
    assert seen == whole(inputs)


def test_a_head_within_another(tmp_path: Path) -> None:
    *_, seen, inputs = step(of_lora(tmp_path, modules_to_save=["lm_head"]))
    assert seen == once(inputs)


def test_a_response_with_an_image_passes_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a tool may give one."""
    run = trainer(tmp_path, **WHOLE)
    inputs = step(run)[-1]
    batch, view = Batch(inputs), View(inputs["prompt"].tolist())
    assert run._passes.packs_rows(batch, view)
    batch.completion_ids[0, 0] = run.model.config.image_token_id
    assert not run._passes.packs_rows(batch, view)


def test_rows_without_a_prompt_in_common(tmp_path: Path) -> None:
    """Each is a pack of its own, and passes no token twice."""
    run = trainer(tmp_path, **WHOLE)
    loss, _, _, inputs = step(run)
    seen = tokens_of_forwards(run)
    apart = {**inputs, "prompt": torch.arange(8)}
    torch.testing.assert_close(run._compute_loss(run.model, apart), loss, rtol=1e-5, atol=1e-6)
    assert seen == once(apart)


# -- groups without a signal -------------------------------------------------------------------------------------------


def second_alone(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    return [0.5 if a == "0" else r for a, r in zip(answer, varied_reward(completions), strict=True)]


def none(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_dead_group_does_not_pass(iterations: int, tmp_path: Path) -> None:
    """Loss and gradients are those of all rows; the entropy that is logged is the live ones'."""
    settings = {"reward": second_alone, "num_iterations": iterations, **WHOLE}
    shared, plain = (trainer(tmp_path, prefix_sharing=way, **settings) for way in ("on", "off"))
    loss, grads, seen, inputs = step(shared)
    plain_loss, plain_grads, *_ = step(plain)
    live = {name: value[4:] for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    assert not inputs["advantages"][:4].any() and seen == once(live)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    same_gradients(grads, plain_grads)
    for name in ("clip_ratio/region_mean", "vppo/clip_ratio_kept"):
        assert shared._metrics["train"][name] == pytest.approx(plain._metrics["train"][name], rel=1e-4), name
    batch, view = Batch(inputs), View(inputs["prompt"].tolist())
    with torch.no_grad():
        packed = PackedRows(shared.model, batch, [[4, 5, 6, 7]], view)
        entropy = packed_logprobs(shared.model, packed)[1].sum() / batch.mask[4:].sum()
    assert shared._metrics["train"]["entropy"] == pytest.approx([entropy.item()], rel=1e-5)


def test_nothing_but_dead_groups(tmp_path: Path) -> None:
    """One prompt passes: a loss has gradients, and under FSDP every process joins each forward."""
    loss, grads, seen, inputs = step(trainer(tmp_path, reward=none, **WHOLE))
    first = {name: value[:4] for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    assert seen == once(first)
    assert loss == 0 and grads and not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize(("images", "reward"), [((1, 0), second_alone), ((0, 1), none)], ids=["one", "all"])
def test_dead_groups_with_the_only_images(images: tuple[int, int], reward: Any, tmp_path: Path) -> None:
    """The vision tower has gradients of 0 as in the plain pass: without any, an optimizer and DDP pass over it."""
    runs = (trainer(tmp_path, prefix_sharing=way, reward=reward, **WHOLE) for way in ("on", "off"))
    (loss, grads, *_), (plain_loss, plain_grads, *_) = (step(run, images) for run in runs)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == plain_grads.keys() and any("visual" in name for name in grads)
    for name, grad in plain_grads.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-5, name


@pytest.mark.parametrize("reward", [second_alone, none])
def test_rows_that_do_not_pass_are_not_compared_with_the_sampler(reward: Any, tmp_path: Path) -> None:
    """The log-probabilities that stand in for theirs are no reason for the guard to end the run."""
    run = trainer(tmp_path, reward=reward, **WHOLE)
    *_, inputs = step(run)
    packed = PackedRows(run.model, Batch(inputs), [[0, 1, 2, 3], [4, 5, 6, 7]], View(inputs["prompt"].tolist()))
    with torch.no_grad():
        own = packed_logprobs(run.model, packed)[0]
    run._compute_loss(run.model, {**inputs, "sampling_per_token_logps": own})
    assert max(run._metrics["train"]["vppo/sampler_gap_max"]) < 1e-5
    run._compare({"sampling_per_token_logps": own, "completion_mask": torch.zeros(own.shape)}, own)
    assert len(run._metrics["train"]["vppo/sampler_gap_mean"]) == 1  # nothing was sampled: no NaN
    with pytest.raises(SamplerMismatchError, match=r"of 15 tokens differ from the trainer's by 1 nats"):
        run._compute_loss(run.model, {**inputs, "sampling_per_token_logps": own - 1.0})


TERMS: list[dict[str, Any]] = [
    {"beta": 0.1, "peft_config": LORA},
    {"nll_coef": 0.1},
    {"entropy_coef": 0.1},
    {"top_entropy_quantile": 0.5},
]


@pytest.mark.parametrize("term", TERMS, ids=lambda term: next(iter(term)))
def test_what_dead_groups_pass_for(term: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for way in ("on", "off"):
        torch.manual_seed(0)  # of the adapters
        runs.append(trainer(tmp_path, reward=second_alone, prefix_sharing=way, **term, **WHOLE))
    same(*runs)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_flex_attention(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its gradients by the definition, which torch keeps from CPUs because the compiled kernels are GPUs'."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    model = families.build(family)[0]
    model.set_attn_implementation({"text_config": "flex_attention"})
    with torch.compiler.set_stance("force_eager"):
        shared = step(trainer(tmp_path, family=family, model=model, prefix_sharing="on", **WHOLE))
    loss, grads, seen, inputs = shared
    assert seen == once(inputs)
    plain_loss, plain_grads, *_ = step(trainer(tmp_path, family=family, prefix_sharing="off", **WHOLE))
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    same_gradients(grads, plain_grads)


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
