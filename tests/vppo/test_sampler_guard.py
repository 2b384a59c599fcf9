"""What the guard lets pass, what it does not, and that all processes agree."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from support.runs import rows, trainer

from vppo import VPPOConfig
from vppo.sampled_trainer import SampledTrainer
from vppo.sampler_guard import Gap, SamplerGuard, SamplerMismatchError, tolerance

ALONE = SimpleNamespace(num_processes=1, gather=lambda values: values)


def gap_of(sampled: list[list[float]], trained: list[list[float]], mask: list[list[int]]) -> Gap:
    return Gap.gather(ALONE, torch.tensor(sampled), torch.tensor(trained), torch.tensor(mask))


def test_the_gap_is_of_the_sampled_tokens() -> None:
    nan = math.nan
    gap = gap_of(
        [[-1.0, -2.0, nan], [-3.0, 0.0, -9.0]], [[-1.5, -2.25, -1.0], [-2.0, -8.0, -9.0]], [[1, 1, 1], [1, 0, 0]]
    )
    assert gap == Gap(mean=(0.5 + 0.25 + 1.0) / 3, maximum=1.0, tokens=3)
    nothing = gap_of([[nan]], [[-1.0]], [[1]])
    assert nothing.tokens == 0 and math.isnan(nothing.mean)


@pytest.mark.parametrize(
    ("gap", "top_p", "refused"),
    [(0.0499, 1.0, False), (0.0501, 1.0, True), (0.06, 0.99, False), (0.061, 0.99, True), (math.nan, 1.0, False)],
)
def test_the_limit(gap: float, top_p: float, refused: bool) -> None:
    """-log 0.99 = 0.01005: a nucleus makes the sampler's probabilities that much larger."""
    guard = SamplerGuard("error", 0.05, top_p)
    if not refused:
        guard.check(ALONE, 3, Gap(gap, 2.0, 10))
        return
    with pytest.raises(SamplerMismatchError, match=r"step 3: .* of 10 tokens .* by 0\.0\d+ nats on the mean and 2 at"):
        guard.check(ALONE, 3, Gap(gap, 2.0, 10))


def test_another_prompt_is_refused_however_small_the_gap() -> None:
    with pytest.raises(SamplerMismatchError, match="row 2 has 9 tokens"):
        SamplerGuard("error", 0.05).check(ALONE, 0, Gap(0.0, 0.0, 10), "the sampler's prompt of row 2 has 9 tokens")


def test_warnings_come_once(caplog: pytest.LogCaptureFixture) -> None:
    Accelerator(cpu=True)  # accelerate's loggers ask it who they are
    guard = SamplerGuard("warn", 0.05)
    for step in range(3):
        guard.check(ALONE, step, Gap(3.0, 9.0, 10))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("vppo")]
    assert len(said) == 1 and "step 0: the sampler does not draw from the model" in said[0]


def test_what_cannot_be_compared_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    Accelerator(cpu=True)
    guard = SamplerGuard("error", 0.05, incomparable="top_k may change the sampler's probabilities")
    guard.check(ALONE, 0, Gap(3.0, 9.0, 10))
    assert "top_k" in caplog.text
    with pytest.raises(SamplerMismatchError):
        guard.check(ALONE, 0, Gap(3.0, 9.0, 10), "the sampler's prompt of row 2 has 9 tokens")


@pytest.mark.parametrize(
    ("changes", "said"), [({}, None), ({"top_k": -1}, None), ({"top_k": 20}, "top_k"), ({"min_p": 0.1}, "min_p")]
)
def test_what_changes_the_samplers_probabilities(changes: dict[str, Any], said: str | None) -> None:
    """-1 is vLLM's way to take all words."""
    args = SimpleNamespace(generation_kwargs=None, vllm_structured_outputs_regex=None)
    run: Any = SimpleNamespace(args=args, **{"repetition_penalty": 1.0, "top_k": 0, "min_p": None, **changes})
    reason = SampledTrainer._incomparable(run)
    assert reason == (said and f"{said} may change the sampler's probabilities and not the trainer's")


def test_off_is_off() -> None:
    SamplerGuard("off", 0.05).check(ALONE, 0, Gap(3.0, 9.0, 10), "another prompt")


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32, None, torch.float32), 0.05),
        ((torch.float32, torch.bfloat16, torch.float32), 0.3),
        ((torch.float32, None, "torch.bfloat16"), 0.3),
        ((torch.float16,), 0.3),
    ],
)
def test_the_tolerance_goes_with_the_precision(dtypes: tuple[Any, ...], expected: float) -> None:
    assert tolerance(*dtypes) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler_guard": "on"}, r"sampler_guard: got 'on', takes one of \['error', 'warn', 'off'\]"),
        ({"sampler_tolerance": 0.0}, "sampler_tolerance: got 0.0, takes a finite number above 0"),
        ({"sampler_tolerance": math.inf}, "sampler_tolerance: got inf, takes a finite number above 0"),
    ],
)
def test_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VPPOConfig(bf16=False, use_cpu=True, **changes)


def one_rank_alone(rank: int, port: int, found: Any) -> None:
    """The gap of two processes, of which the second has 9 tokens that are 1 nat off and the first 3 that are right."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    sampled, mask = torch.zeros(1, 9), torch.arange(9).unsqueeze(0) < (9 if rank else 3)
    gap = Gap.gather(accelerator, sampled, sampled - rank, mask)
    said = []
    for difference in (None, "the prompt of row 7" if rank else None):
        try:
            SamplerGuard("error", 0.7).check(accelerator, 0, gap if not said else Gap(0.0, 0.0, 12), difference)
        except SamplerMismatchError as error:
            said.append(str(error))
    found[rank] = (gap, said)


def test_all_processes_raise_where_one_alone_exceeds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(one_rank_alone, (port, found), nprocs=2)
        (first, said), (second, also) = found[0], found[1]
    assert first == second == Gap(mean=0.75, maximum=1.0, tokens=12)
    assert said == also and len(said) == 2
    assert "0.75 nats" in said[0] and "row 7" in said[1]


@pytest.mark.parametrize("correction", [True, False])
def test_a_sampler_of_ones_own_is_watched(correction: bool, tmp_path: Path) -> None:
    """`rollout_func` tells log-probabilities: those of the trainer, and then some that are not."""
    off = [0.0]

    def rollout(prompts: list[Any], run: Any) -> dict[str, Any]:
        ids = run.processing_class.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        answers = [run.processing_class.tokenizer.encode(f"{'abcd'[i % 4]}<eos>") for i in range(len(prompts))]
        logprobs = [own(run, x, a) for x, a in zip(ids["input_ids"], answers, strict=True)]
        return {"prompt_ids": ids["input_ids"], "completion_ids": answers, "logprobs": logprobs}

    @torch.no_grad()
    def own(run: Any, ids: list[int], answer: list[int]) -> list[float]:
        logits = run.model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, -len(answer) - 1 : -1]
        scores = logits.log_softmax(-1)[torch.arange(len(answer)), answer] + off[0]
        return scores.tolist()

    # with two updates from the same rollouts TRL makes a pass of its own over them, else the training pass is the first
    repeated = {"num_iterations": 2, "steps_per_generation": 1} if correction else {}
    run = trainer(tmp_path, rows(4, images=(0,)), rollout_func=rollout, algorithm="dapo", **repeated)
    run.train()
    gaps = [entry["vppo/sampler_gap_mean"] for entry in run.state.log_history if "vppo/sampler_gap_mean" in entry]
    assert len(gaps) == (1 if correction else 2) and max(gaps) < 1e-5
    off[0] = 0.1
    run = trainer(tmp_path, rows(4, images=(0,)), rollout_func=rollout, algorithm="dapo", **repeated)
    with pytest.raises(SamplerMismatchError, match=r"by 0\.1 nats on the mean and 0\.1 at most"):
        run.train()
