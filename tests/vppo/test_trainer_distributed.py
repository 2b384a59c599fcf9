"""Two processes do what one does with the whole batch; a sharded model scores as the whole one does."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from support import families
from support.runs import FAMILY, batch_inputs, fix_rollouts, rows, trainer, varied_reward
from test_training_pass import tokens_of_forwards
from torch import Tensor

from vppo.batch import Batch, View
from vppo.heads import logit_options
from vppo.perturbations import Perturbation, PixelLayout, seeded
from vppo.prefix_sharing import ResponsePasses
from vppo.scoring import score

WORLD = 2
LENGTHS = (6, 3, 5, 1, 4, 6, 2, 5)
CLOCK = "vppo/seconds_scoring"


def nothing_to_learn(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def second_prompt_only(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    return [0.5 if a == "0" else r for a, r in zip(answer, varied_reward(completions), strict=True)]


# what the trainer is given; per_device_train_batch_size is that of one process with the whole batch
CASES: dict[str, dict[str, Any]] = {
    "a group on each process": {},
    "a group across processes": {"num_generations": 8},
    "a view for every rollout": {"perturbation_scope": "rollout"},
    "a process without scored rows": {"reward": second_prompt_only},
    "no scored row anywhere": {"reward": nothing_to_learn},
    "reused clean pass": {"num_iterations": 2},
    "prompts not shared": {"prefix_sharing": "off"},
    "a threshold that only one process exceeds": {"keep_ratio": 1.0, "keep_threshold": 0.7},
    "several draws": {"draws": 3},
    "several draws in little memory": {"draws": 3, "scoring_memory": 1e-7},
    "several draws, and a process without scored rows": {"draws": 3, "reward": second_prompt_only},
}


def folded(path: Path, case: dict[str, Any], world: int, rank: int) -> tuple[list[Tensor], dict[str, float]]:
    """This rank's advantages, row by row without padding, and the metrics of folding."""
    run = trainer(path, **{"per_device_train_batch_size": 8 // world, **case})
    fix_rollouts(run, LENGTHS)
    data = [row for row in rows(8 // run.num_generations) for _ in range(run.num_generations)]
    part = len(data) // world
    run.model.train()
    batch = run._generate_and_score_completions(data[rank * part : (rank + 1) * part])
    advantages = [a[m.bool()] for a, m in zip(batch["advantages"], batch["completion_mask"], strict=True)]
    names = run._metrics["train"]
    return advantages, {name: names[name][0] for name in names if name.startswith("vppo/") and name != CLOCK}


def evaluated(path: Path, world: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and table of an evaluation of three problems, two completions each: two batches, the last half full."""
    run = trainer(
        path, eval_data=rows(3, images=(1, 0)), num_generations_eval=2, per_device_eval_batch_size=4 // world,
        eval_strategy="steps",
    )  # fmt: skip
    fix_rollouts(run, LENGTHS)
    found = run.evaluate()
    whole = ("eval_reward", "eval_rewards/", "eval_vppo/")
    table = run._completions["eval"].table(0).drop(columns="prompt").to_dict("records")
    return {name: found[name] for name in found if name.startswith(whole) and not name.endswith(CLOCK)}, table


def trained_in_pairs(path: Path, sharing: str) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Weights after four steps on two rows each, of one prompt; and the tokens of the forwards of each step's loss."""
    run = trainer(
        path, rows(8), per_device_train_batch_size=2, num_generations=2, steps_per_generation=2, max_steps=4,
        num_iterations=1, gradient_accumulation_steps=2, prefix_sharing=sharing, optim="sgd", learning_rate=0.1,
    )  # fmt: skip
    fix_rollouts(run, LENGTHS)
    forwards: list[list[int]] = []
    seen, compute_loss = tokens_of_forwards(run), run._compute_loss

    def counting(*args: Any) -> Tensor:
        before = len(seen)
        loss = compute_loss(*args)
        forwards.append(seen[before:])
        return loss

    run._compute_loss = counting  # type: ignore[method-assign]
    run.train()
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters()}, forwards


# family, whether the head is a unit of its own or belongs to the root, and whether prompts are shared
HEADS = {
    "own unit": (FAMILY, True, "on"),
    "root unit": (FAMILY, False, "auto"),
    "tied, root unit": ("qwen2_vl", False, "on"),
    "own unit, prompts not shared": (FAMILY, True, "off"),
}


def sharded_dependency(rank: int, family: str, own_head: bool, sharing: str) -> Tensor:
    """Scores with a model of which every process holds a part; this rank's rows differ in number from the other's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, processor = families.build(family)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    if own_head:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return score_some(
        model, processor, range(6) if rank == 0 else range(1), sharing=sharing, memory=1, max_over_ranks=_most
    )


def _most(count: int) -> int:
    everyone = torch.tensor(count)
    torch.distributed.all_reduce(everyone, torch.distributed.ReduceOp.MAX)
    return int(everyone)


def score_some(model: Any, processor: Any, chosen: range, **settings: Any) -> Tensor:
    """Dependency of the chosen rows of a fixed batch of two prompts with three rollouts each."""
    responses = [families.VOCABULARY[c] for c in "3+5=8"]
    prompts = [row for row in rows(2) for _ in range(3)]
    data = [{**row, "response_ids": responses[: 5 - i % 2]} for i, row in enumerate(prompts)]
    batch = Batch(batch_inputs(model, processor, data))
    layout, keys = PixelLayout.of(processor.image_processor), [0, 0, 0, 1, 1, 1]
    pixels = {key: batch.perturbed_pixels(3 * key, layout, Perturbation(), seeded(0, key)) for key in (0, 1)}
    passes = ResponsePasses(model, **settings)
    options = logit_options(model, 1.0)
    return score(passes, batch, chosen, View(keys), View(keys, pixels), kind="kl", options=options)


def process(rank: int, port: int, path: Path) -> None:
    """Everything that two processes do, in one start: importing is what takes the time."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    results: dict[str, Any] = {name: folded(path / "run", case, WORLD, rank) for name, case in CASES.items()}
    results["evaluated"] = evaluated(path / "run", WORLD)
    run = trainer(path / "run", per_device_train_batch_size=4)
    run.train()
    results["trained"] = {name: weight.detach() for name, weight in run.model.named_parameters()}
    results["logged"] = run.state.log_history
    for sharing in ("on", "off"):
        results[f"sharing {sharing}"] = trained_in_pairs(path / "run", sharing)
    results |= {head: sharded_dependency(rank, *arguments) for head, arguments in HEADS.items()}
    torch.save(results, path / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(port, path), nprocs=WORLD)
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_fold_as_one(case: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone, metrics = folded(tmp_path, CASES[case], 1, 0)
    together = [row for rank in ranks for row in rank[case][0]]
    assert len(together) == len(alone) == 8
    for row, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)
    for rank in ranks:
        assert rank[case][1] == pytest.approx(metrics, rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_responses_without_kept_are_those_of_all_processes(ranks: list[dict[str, Any]]) -> None:
    found = [rank["a threshold that only one process exceeds"] for rank in ranks]
    assert [any(row.any() for row in advantages) for advantages, _ in found] == [True, False]
    assert [metrics["vppo/responses_without_kept"] for _, metrics in found] == [4, 4]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """The rows that fill up the last batches of two processes count in neither metrics nor table."""
    metrics, table = evaluated(tmp_path, 1)
    assert len(table) == 6 and metrics["eval_vppo/scored_fraction"] == pytest.approx(2 / 3)
    for rank in ranks:
        assert rank["evaluated"][0] == pytest.approx(metrics, rel=1e-4)
        for row, expected in zip(rank["evaluated"][1], table, strict=True):
            assert row.pop("completion") == expected["completion"]
            numbers = {name: value for name, value in expected.items() if name != "completion"}
            assert row == pytest.approx(numbers, rel=1e-3, nan_ok=True)


@pytest.mark.slow
def test_two_processes_train(ranks: list[dict[str, Any]]) -> None:
    for name, weight in ranks[0]["trained"].items():
        assert torch.equal(weight, ranks[1]["trained"][name]), name
    assert all(log["vppo/dependency_mean"] > 1e-3 for log in ranks[0]["logged"][:2])


@pytest.mark.slow
def test_shared_training_passes(ranks: list[dict[str, Any]]) -> None:
    before = dict(families.build(FAMILY)[0].named_parameters())
    assert max((w - before[name]).abs().max() for name, w in ranks[0]["sharing off"][0].items()) > 1e-3
    for rank in ranks:
        (weights, shared), (expected, plain) = rank["sharing on"], rank["sharing off"]
        assert len(shared) == len(plain) == 8
        assert all(len(a) == len(b) == 1 and a < b for a, b in zip(shared, plain, strict=True))
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
            assert torch.equal(weights[name], ranks[0]["sharing on"][0][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_sharded_model(head: str, ranks: list[dict[str, Any]]) -> None:
    model, processor = families.build(HEADS[head][0])
    whole = score_some(model, processor, range(6), sharing="off")
    assert whole.max() > 1e-2
    first, second = (rank[head] for rank in ranks)
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(second[0], whole[0], rtol=1e-5, atol=1e-8)
    assert not second[1:].any()
