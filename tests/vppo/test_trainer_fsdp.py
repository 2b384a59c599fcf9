"""Training a model that FSDP2 shards over processes: what one process does with the whole batch; saved and resumed."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from peft import LoraConfig
from support import families, flash
from support.runs import FAMILY, fix_rollouts, rows, trainer
from support.shards import shard_over_cpus
from torch import Tensor
from torch.distributed.tensor import DTensor

from vppo import VPPOTrainer
from vppo.train import load_config, train

EXAMPLE = Path(__file__).parents[2] / "examples" / "qwen2_5_vl_7b.yaml"
ROWS, GROUP = 12, 4  # of a generation: a group lies across two processes
LENGTHS = (6, 3, 5, 1, 4, 6, 2, 5, 3, 3, 1, 6)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "init_lora_weights": False}
CASES: dict[str, dict[str, Any]] = {
    "whole model": {},
    "tied head": {"family": "qwen2_vl"},
    "LoRA": {"lora": True},
    "rows whole": {"prefix_sharing": "off"},
    "old log-probabilities": {"num_iterations": 2, "max_steps": 4},
    "two micro-batches": {"gradient_accumulation_steps": 2},
    "a threshold": {"keep_ratio": 1.0, "keep_threshold": 0.6},
    "a threshold, two micro-batches": {"keep_ratio": 1.0, "keep_threshold": 0.6, "gradient_accumulation_steps": 2},
    "several draws": {"draws": 3},
    "a process with text alone": {"images": (1, 0, 0), "shuffle_dataset": False},
    "text alone, rows whole": {"images": (1, 0, 0), "shuffle_dataset": False, "prefix_sharing": "off"},
    "flash-attention": {"by_flash": True},
    # a clip that no ratio meets: on which side of it one lies would be rounding's choice
    "16 bits": {
        **{"bf16": True, "num_iterations": 2, "max_steps": 2, "learning_rate": 0.01},
        **{"epsilon": 0.99, "epsilon_high": 99.0},
    },
}


def run_of(
    path: Path,
    world: int,
    lora: bool = False,
    images: tuple[int, ...] = (1,),
    by_flash: bool = False,
    **changes: Any,
) -> VPPOTrainer:
    """A trainer of two steps with the settings of a large run; the same rollouts however many processes there are.

    `by_flash` is for several processes: one has the dense mask that they are compared with.
    """
    if by_flash and world > 1:
        flash.install(pytest.MonkeyPatch())
        changes["model"] = flash.by_flash(families.build(FAMILY)[0])
    torch.manual_seed(0)  # of adapters
    size = ROWS // world // changes.get("gradient_accumulation_steps", 1)
    settings = {
        "per_device_train_batch_size": size, "num_generations": GROUP, "gradient_checkpointing": True,
        "prefix_sharing": "on", "optim": "sgd", "learning_rate": 0.1, **changes,
    }  # fmt: skip
    run = trainer(path, rows(8, images=images), peft_config=LoraConfig(**LORA) if lora else None, **settings)
    fix_rollouts(run, LENGTHS)
    return run


def whole(weight: Tensor) -> Tensor:
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


def trained(path: Path, case: dict[str, Any], world: int) -> dict[str, Any]:
    run = run_of(path, world, **case)
    ratios: list[float] = []
    active: list[int] = []  # tokens with gradient in each micro-batch
    compute = run._packed_training_pass

    def listening(model: Any, inputs: dict[str, Any]) -> Any:
        found = compute(model, inputs)
        old, mask = inputs.get("old_per_token_logps", found[0]), inputs["completion_mask"].bool()
        ratios.append((found[0] - old)[mask].abs().max().item())
        active.append(int((inputs["advantages"] != 0)[mask].sum()))
        return found

    run._packed_training_pass = listening  # type: ignore[method-assign]
    run.train()
    assert bool(flash.calls) == (case.get("by_flash", False) and world > 1)
    flash.calls.clear()
    steps = [log for log in run.state.log_history if "loss" in log]
    weights = dict(run.model.named_parameters())
    return {
        "weights": {name: whole(weight) for name, weight in weights.items()},
        "losses": [log["loss"] for log in steps],
        "norms": [log["grad_norm"] for log in steps],
        "sharded": all(isinstance(weight, DTensor) for weight in weights.values()),
        "ratios": ratios,
        "active": active,
        "without_kept": [log.get("vppo/responses_without_kept") for log in steps],
    }


SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}


def saved(path: Path, world: int) -> dict[str, Tensor]:
    """Weights after four steps at once, with a checkpoint after each second."""
    run = run_of(path / "at once", world, **SAVED)
    run.train()
    return {name: whole(weight) for name, weight in run.model.named_parameters()}


def resumed(path: Path, world: int) -> dict[str, Tensor]:
    """Weights after the last two of them, from the checkpoint."""
    run = run_of(path / f"resumed by {world}", world, **SAVED)
    run.train(resume_from_checkpoint=str(path / "at once" / "checkpoint-2"))
    assert all(isinstance(weight, DTensor) for weight in run.model.parameters())
    return {name: whole(weight) for name, weight in run.model.named_parameters()}


def by_config(path: Path) -> list[list[dict[str, Any]]]:
    """Metrics of `vppo train` with the example for large runs, cut to this machine; and resumed after half of it."""
    config = load_config(path / "config.yaml")
    found = []
    for name in ("run", "killed"):
        if name == "killed" and dist.get_rank() == 0:
            left_out = shutil.ignore_patterns("model", "checkpoint-4")
            shutil.copytree(path / "run", path / "killed", ignore=left_out)
        dist.barrier()
        train({**config, "output_dir": str(path / name), "resume": name == "killed"})
        dist.barrier()
        found.append([json.loads(line) for line in (path / name / "metrics.jsonl").read_text().splitlines()])
    return found


def write_config(path: Path) -> None:
    """The 7B example, whose model, data and sizes alone are others."""
    from vppo.demo.model import build_model, build_processor

    processor = build_processor()
    build_model(processor, seed=0).save_pretrained(path / "start")
    processor.save_pretrained(path / "start")
    lines = []
    for number, row in enumerate(rows(8, ((84, 28),))):
        row["images"][0].save(path / f"{number}.png")
        lines.append(json.dumps({"problem": f"{number}+1?", "answer": number, "images": [f"{number}.png"]}))
    (path / "train.jsonl").write_text("\n".join(lines))
    forbidden = sorted(set(processor.tokenizer.all_special_ids) - {processor.tokenizer.eos_token_id})
    config = {key: value for key, value in load_config(EXAMPLE).items() if "vllm" not in key}
    config |= {
        "model": str(path / "start"), "dataset": str(path / "train.jsonl"), "output_dir": str(path / "run"),
        "reward": "test_trainer_fsdp:length_reward", "attn_implementation": "sdpa", "use_cpu": True,
        "instruction": "", "min_pixels": 784, "max_pixels": 7840, "generation_batch_size": 16,
        "gradient_accumulation_steps": 2, "max_completion_length": 6, "max_steps": 4,
        "generation_kwargs": {"suppress_tokens": forbidden},
        "save_steps": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config))


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    return [len(completion[0]["content"]) + index % 3 for index, completion in enumerate(completions)]


def two(rank: int, port: int, path: Path) -> None:
    """Everything that two processes do, in one start: importing is what takes the time."""
    shard_over_cpus(rank, 2, port)
    results: dict[str, Any] = {name: trained(path / "run", case, 2) for name, case in CASES.items()}
    results["saved"], results["resumed"] = saved(path, 2), resumed(path, 2)
    results["by config"] = by_config(path)
    torch.save(results, path / f"{rank}.pt")
    dist.destroy_process_group()


def three(rank: int, port: int, path: Path) -> None:
    """What three processes make of the checkpoint of two."""
    shard_over_cpus(rank, 3, port)
    results = resumed(path, 3)
    torch.save(results, path / f"{rank}.pt")
    dist.destroy_process_group()


def launch(work: Any, world: int, path: Path) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, path), nprocs=world)
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ranks(path: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    write_config(path)
    return launch(two, 2, path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """The same losses, gradient norms and weights, with the whole batch in one process. In 16 bits nearly."""
    alone, exact = trained(tmp_path, CASES[case], 1), case != "16 bits"
    start = dict(run_of(tmp_path, 1, **CASES[case]).model.named_parameters())
    assert max((weight - start[name]).abs().max() for name, weight in alone["weights"].items()) > 1e-3
    for found in (rank[case] for rank in ranks):
        assert found["sharded"] and not alone["sharded"]
        # a log-probability in 16 bits is off by up to 2^-8, and with it a mean of ratios
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-6 if exact else 2**-8)
        assert found["without_kept"] == alone["without_kept"]
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-5 if exact else 0.05)
        for name, weight in alone["weights"].items():
            assert torch.equal(found["weights"][name], ranks[0][case]["weights"][name])
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-6 if exact else 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if "threshold" in case])
def test_a_process_whose_responses_exceed_no_threshold_joins_the_others(case: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[case]["active"] for rank in ranks)
    assert any((mine == 0) != (other == 0) for mine, other in zip(first, second, strict=True))
    assert sum(ranks[0][case]["without_kept"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["old log-probabilities", "16 bits"])
def test_the_ratio_to_old_logprobs_is_one(case: str, ranks: list[dict[str, Any]]) -> None:
    """Exactly, until the first update. Under bf16 accelerate would round log-probabilities, and so later ratios."""
    for rank in ranks:
        before, after, *_ = rank[case]["ratios"]
        assert before == 0 and after > 0.1
        assert after != torch.tensor(after).bfloat16().item()


@pytest.mark.slow
def test_shards_are_saved_and_resumed(ranks: list[dict[str, Any]], path: Path) -> None:
    files = (path / "at once" / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp")
    assert sorted(file.name for file in files) == ["__0_0.distcp", "__1_0.distcp"]
    for rank in ranks:
        for name, weight in rank["saved"].items():
            assert torch.equal(rank["resumed"][name], weight), name


@pytest.mark.slow
def test_another_number_of_processes_goes_on(ranks: list[dict[str, Any]], path: Path) -> None:
    for found in launch(three, 3, path):
        for name, weight in ranks[0]["saved"].items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_example_for_large_runs(ranks: list[dict[str, Any]], path: Path) -> None:
    assert len(list((path / "run" / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    for rank in ranks:
        run, killed = rank["by config"]
        assert [line["step"] for line in run] == [1, 2, 3, 4] and run == killed
        assert all(line["grad_norm"] > 0 and line["vppo/dependency_mean"] > 0 for line in run)
