"""Plans of memory: what they are made from, that few layers tell of many, and what is advised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import families
from support.peaks import config_of
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig
from typer.testing import CliRunner

from vppo.cli import main
from vppo.errors import InputError
from vppo.plan.advice import advice
from vppo.plan.estimate import Estimate, estimate, largest_micro_batch
from vppo.plan.fake import Fake
from vppo.plan.memory import ORDER
from vppo.plan.model import Depth, period, with_depth
from vppo.plan.presets import NAMES, preset
from vppo.plan.report import Report
from vppo.plan.sampler import sampler_memory, token_bytes
from vppo.plan.settings import (
    Sampler,
    Settings,
    Sharding,
    from_config,
    image_tokens,
    model_config,
    read_accelerate,
)
from vppo.plan.simulation import simulate
from vppo.prefix_sharing import GIB

SAMPLER = Sampler(kind="vllm", share=0.3, gpus=1, sleeps=False, length=2048)


def settings(family: str = "qwen2_5_vl", **changes: Any) -> Settings:
    small: dict[str, Any] = {
        "config": with_depth(config_of(family), Depth(2, 2)),
        "gpus": 2,
        "rows": 4,
        "micro_batch": 4,
        "accumulation": 1,
        "group": 4,
        "image_tokens": 16,
        "text_tokens": 16,
        "response_tokens": 32,
        "sampler": SAMPLER,
    }
    return Settings(**{**small, **changes})


def deeper(config: Any, text: int, vision: int) -> Any:
    given = config.to_dict()
    given["text_config"].pop("layer_types", None)
    given["text_config"] |= {"num_hidden_layers": text}
    given["vision_config"] |= {"depth": vision}
    return type(config)(**given)


# -- what is simulated -------------------------------------------------------------------------------------------------


def test_small_integers_are_real_and_what_meets_weights_is_fake() -> None:
    grid = torch.tensor([[1, 4, 6]])
    with Fake():
        weight = torch.empty(5, 3)
        mask = grid[0] > 2
        assert grid.prod(-1).tolist() == [24] and not isinstance(mask, FakeTensor)
        assert weight[:, mask].shape == (5, 2)  # how many are chosen is known
        assert isinstance(weight @ grid.T.float(), FakeTensor)
        assert isinstance(torch.zeros(3), FakeTensor)
        places = torch.arange(4096)
        assert isinstance(places.unsqueeze(0) == places.unsqueeze(1), FakeTensor)  # 16 million of them


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_few_layers_tell_of_many(family: str) -> None:
    """The peak of every phase and category, operations and weights are those of the model with all of its layers."""
    config = deeper(config_of(family), 7, 7)
    plan = settings(family, config=config, gpus=2 if family == "qwen3_vl" else 1)
    whole = simulate(plan, Depth.of(config))
    found = estimate(plan)
    assert found.parameters == whole.parameters[0]
    for phase, peak in found.peaks.items():
        all_layers = max(sum(other.values()) for place, other in whole.peaks.items() if place[0] == phase)
        assert sum(peak.values()) == pytest.approx(all_layers, rel=1e-3), phase
    assert found.products["training"] == pytest.approx(whole.products["training pass"], rel=1e-9)


def test_weights_gradients_and_optimizer_are_what_arithmetic_says() -> None:
    """float32, over two GPUs: a share of the weights, as much of gradients, twice as much of the optimizer."""
    plan = settings()
    found = estimate(plan)
    share = 4 * found.parameters / 2
    peak = found.peaks["optimizer"]
    assert found.trained == found.parameters
    assert peak["weights"] == pytest.approx(share, rel=0.01)
    assert peak["gradients"] == pytest.approx(share, rel=0.01)
    assert peak["optimizer"] == pytest.approx(2 * share, rel=0.01)


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_a_phase_does_not_hold_is_not_counted_in_it(gpus: int) -> None:
    """The optimizer holds no hidden states of the scoring, and the scoring no gradients of the micro-batches."""
    found = estimate(
        settings(gpus=gpus, rows=64, accumulation=4, response_tokens=512, sharding=Sharding(sync=True), sharing="off")
    )
    share = 4 * found.parameters / gpus
    width = settings().config.get_text_config().hidden_size
    assert 64 * 512 * width * 2 > 2 * share  # hidden states of the clean view: they would hide the gradients
    assert found.peaks["optimizer"]["gradients"] == pytest.approx(share, rel=0.01)
    assert found.peaks["optimizer"]["activations"] < 0.1 * share
    assert found.peaks["scoring"]["gradients"] == 0


def test_several_draws_are_as_many_perturbed_passes() -> None:
    """The clean view's hidden states are known from another pass, so nothing but perturbed views passes."""
    one, three = (simulate(settings(gpus=1, draws=draws), Depth(1, 1)).products for draws in (1, 3))
    assert three["scoring"] == pytest.approx(3 * one["scoring"], rel=0.01)
    assert three["training pass"] == one["training pass"]


def test_lora_trains_little() -> None:
    plan = settings(lora={"r": 4, "lora_alpha": 8, "target": "all-linear"}, dtype="bfloat16")
    found = estimate(plan)
    assert 0 < found.trained < 0.1 * found.parameters
    assert found.peaks["optimizer"]["optimizer"] == pytest.approx(8 * found.trained / 2, rel=0.05)


def test_what_settings_change() -> None:
    """Each in the category that it is about, in the direction that its user hopes for."""
    base = settings(gpus=4, rows=8, micro_batch=2, accumulation=4, response_tokens=64)
    of = {
        name: estimate(replace(base, **changes), scoring=False).peaks["training pass"]
        for name, changes in {
            "base": {},
            "sync": {"sharding": Sharding(sync=True)},
            "whole model": {"sharding": Sharding(layers=False)},
            "kept": {"sharding": Sharding(reshard=False)},
            "not again": {"checkpointing": False},
            "larger": {"micro_batch": 4, "accumulation": 2},
        }.items()
    }
    assert of["sync"]["gradients"] < of["base"]["gradients"]
    assert of["whole model"]["gathered weights"] > 2 * of["base"]["gathered weights"]
    assert of["kept"]["gathered weights"] > 1.5 * of["base"]["gathered weights"]
    assert of["not again"]["activations"] > 1.5 * of["base"]["activations"]
    assert of["larger"]["activations"] > of["base"]["activations"]


def test_the_largest_micro_batch_is_the_largest() -> None:
    plan = settings(rows=8, micro_batch=2, accumulation=4, gpus=1, sharing="off", response_tokens=64)
    peaks = {
        size: sum(estimate(plan.with_micro_batch(size), scoring=False).peaks["training pass"].values())
        for size in (1, 2, 4, 8)
    }
    assert peaks[1] < peaks[2] < peaks[4] < peaks[8]
    assert largest_micro_batch(plan, peaks[4]) == 4
    assert largest_micro_batch(plan, peaks[2] - 1) == 1
    assert largest_micro_batch(plan, peaks[1] - 1) is None


# -- where settings come from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_presets(name: str) -> None:
    """The published sizes: billions of weights as the models' cards state them, of models that are built from these."""
    billions = {
        "Qwen2.5-VL-3B": 3.75,
        "Qwen2.5-VL-7B": 8.29,
        "Qwen2.5-VL-32B": 33.5,
        "Qwen3-VL-8B": 8.77,
        "Qwen3-VL-32B": 33.4,
    }
    from transformers import AutoModelForImageTextToText

    config = model_config(f"Qwen/{name}-Instruct")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(with_depth(config, Depth(2, 4)))
    layers = [
        sum(p.numel() for p in stack[0].parameters())
        for stack in (model.model.language_model.layers, model.model.visual.blocks)
    ]
    missing = (config.get_text_config().num_hidden_layers - 2) * layers[0] + (config.vision_config.depth - 4) * layers[
        1
    ]
    assert (model.num_parameters() + missing) / 1e9 == pytest.approx(billions[name], rel=0.005)
    assert period(config) == 1


def test_a_model_is_a_folder_a_file_or_a_preset(tmp_path: Path) -> None:
    config_of("qwen3_vl").save_pretrained(tmp_path)
    for given in (str(tmp_path), str(tmp_path / "config.json")):
        assert model_config(given).text_config.hidden_size == 192
    assert preset("some/Other-7B") is None
    assert image_tokens(model_config("Qwen2.5-VL-7B"), 1280 * 28 * 28) == 1280
    assert image_tokens(model_config("Qwen3-VL-8B"), 1280 * 32 * 32) == 1280


def test_a_model_without_patches_is_refused(tmp_path: Path) -> None:
    families.build("gemma3")[0].config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="of type 'gemma3'; a plan takes models whose images are cut"):
        model_config(str(tmp_path))
    AutoConfig.for_model("llama").save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match="of type 'llama'"):
        model_config(str(tmp_path / "text"))
    with pytest.raises(InputError, match=r"no configuration could be loaded.*Qwen3-VL-32B"):
        model_config(str(tmp_path / "nothing"))


CONFIG = {"model": "Qwen2.5-VL-7B", "dataset": "none", "output_dir": "runs/none", "max_pixels": 1003520}


def test_settings_of_a_config() -> None:
    given = {
        **CONFIG,
        "num_generations": 8,
        "generation_batch_size": 3072,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 32,
        "max_completion_length": 2048,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "scoring_memory": 2.0,
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }
    plan = from_config(given, gpus=8)
    assert (plan.rows, plan.updates, plan.group, plan.micro_batch, plan.accumulation) == (384, 3, 8, 4, 32)
    assert (plan.image_tokens, plan.prompt_tokens, plan.response_tokens) == (1280, 1280 + 512, 2048)
    assert (plan.dtype, plan.precision, plan.optimizer) == ("float32", "bf16", "adamw_torch_fused")
    assert plan.checkpointing and plan.old_pass and plan.sharding == Sharding(sync=True)
    assert plan.scoring_memory == 2 * GIB and plan.divergence == "kl" and plan.sampler.kind == "vllm"
    assert from_config({**given, "algorithm": "grpo"}, gpus=8).divergence is None
    assert from_config({**given, "draws": 4}, gpus=8).draws == 4
    with pytest.raises(InputError, match="algorithm: got 'papo', which trains on two views"):
        from_config({**given, "algorithm": "papo"}, gpus=8)
    with pytest.raises(InputError, match=r"generation_batch_size: got 3072.* 4 x 5"):
        from_config(given, gpus=5)


def test_a_prompt_may_lie_across_gpus() -> None:
    """8 responses of 2 GPUs with 4 each; in one process these would be half a prompt."""
    given = {**CONFIG, "num_generations": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert from_config(given, gpus=2).rows == 4
    with pytest.raises(InputError, match=r"generation_batch_size: got 4"):
        from_config(given, gpus=1)


def test_old_passes_are_those_that_the_trainer_makes() -> None:
    """Where a generation is used for one update alone, and none samples but the model, there is nothing to compare."""
    given = {**CONFIG, "num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert not from_config(given, gpus=1).old_pass
    assert from_config({**given, "num_iterations": 2}, gpus=1).old_pass
    assert from_config({**given, "steps_per_generation": 4}, gpus=1).old_pass


def test_accelerate(tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    told = {
        "distributed_type": "FSDP",
        "num_processes": 4,
        "mixed_precision": "bf16",
        "fsdp_config": {"fsdp_version": 2},
    }
    path.write_text(yaml.safe_dump(told))
    assert read_accelerate(path) == {"gpus": 4, "precision": "bf16", "sharding": Sharding(layers=False)}
    told["fsdp_config"] |= {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": False}
    path.write_text(yaml.safe_dump(told))
    assert read_accelerate(path)["sharding"] == Sharding(reshard=False)
    with pytest.raises(InputError, match="--gpus: got 8, the file for accelerate has num_processes: 4"):
        from_config({**CONFIG, "num_generations": 8}, gpus=8, accelerate=read_accelerate(path))
    for wrong, said in (({"fsdp_version": 1}, "FSDP with fsdp_version 1"), (None, "FSDP with fsdp_version 1")):
        path.write_text(yaml.safe_dump({**told, "fsdp_config": wrong}))
        with pytest.raises(InputError, match=said):
            read_accelerate(path)
    for key, value in (("num_processes", "eight"), ("num_processes", 0), ("fsdp_config", 3)):
        path.write_text(yaml.safe_dump({**told, key: value}))
        with pytest.raises(InputError, match=f"{key}: got {value!r}, takes"):
            read_accelerate(path)
    path.write_text("distributed_type: MULTI_GPU")
    with pytest.raises(InputError, match="got MULTI_GPU, a plan takes FSDP with fsdp_version: 2"):
        read_accelerate(path)
    with pytest.raises(InputError, match="cannot be read as accelerate's config"):
        read_accelerate(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 0}, "gpus: got 0"),
        ({"optimizer": "adafactor"}, "optim: got 'adafactor', a plan takes one of"),
        ({"images": -1}, "images: got -1"),
        ({"response_tokens": 0}, "response_tokens: got 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings(**changes)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_sampler() -> None:
    """7 billion weights in 16 bits; 28 layers of 4 pairs of 128: 57,344 bytes a token."""
    plan = settings(config=model_config("Qwen2.5-VL-7B"))
    assert token_bytes(plan) == 2 * 2 * 28 * 4 * 128
    found = sampler_memory(plan, 8e9, 80 * GIB)
    assert found.held == 0.3 * 80 * GIB and found.cache == 0.3 * 80 * GIB - 16e9
    assert found.tokens == pytest.approx(found.cache / 57344) and found.responses == found.tokens / 2048
    assert not sampler_memory(plan, 33e9, 80 * GIB).fits
    server = replace(plan, sampler=replace(SAMPLER, kind="server"))
    spread = sampler_memory(server, 33e9, 80 * GIB)
    assert spread.gpus == 1 and spread.held == 0 and spread.fits
    assert sampler_memory(server, 73e9, 80 * GIB).gpus == 2  # which have 144 GiB to give; the weights take 136
    assert sampler_memory(replace(plan, sampler=replace(SAMPLER, sleeps=True)), 8e9, 80 * GIB).held == 0


def made_up(plan: Settings, **of_training: float) -> Estimate:
    peak = {name: of_training.get(name, 0.0) * GIB for name in ORDER}
    return Estimate(plan, {"scoring": peak, "training pass": peak}, {"scoring": 1e15, "training": 4e15}, 8e9, 8e9)


def test_advice() -> None:
    plan = settings(micro_batch=4, accumulation=8, rows=32, checkpointing=False)
    sampler = sampler_memory(plan, 8e9, 80 * GIB)
    found = made_up(plan, weights=10, gradients=30, optimizer=10, activations=20, rollouts=8)
    said = advice(found, sampler, 50 * GIB, 2)
    assert said[0] == "It does not fit: the scoring takes 78.0 GiB, and has 50.0 GiB."
    text = " ".join(said)
    for part in (
        "whole gradients over micro-batches, 30.0 GiB; accelerator_config:",
        "gradient_checkpointing: true",
        "per_device_train_batch_size: 4 -> 2 and gradient_accumulation_steps: 8 -> 16",
        "scoring_memory: 2 scores fewer rows",
        "rollouts' images take 8.0 GiB",
        "vllm_enable_sleep_mode: true gives training the 24.0 GiB",
    ):
        assert part in text
    fits = advice(found, sampler, 100 * GIB, 8)
    assert fits == [
        "It fits: 78.0 GiB of 100.0 GiB in the scoring, and would with per_device_train_batch_size: 4 -> 8 and "
        "gradient_accumulation_steps: 8 -> 4."
    ]
    whole = advice(
        made_up(replace(plan, sharding=Sharding(layers=False)), **{"gathered weights": 60}), sampler, GIB, None
    )
    assert "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP gathers a layer at a time" in " ".join(whole)


def test_the_report_is_saved(tmp_path: Path) -> None:
    plan = settings()
    found = made_up(plan, weights=10, activations=20)
    made = Report(found, sampler_memory(plan, 8e9, 80 * GIB), 80 * GIB, 8 * GIB, 4, 1000.0)
    assert made.room == (80 - 8 - 24) * GIB and made.fits
    assert made.seconds == {"scoring": (2.0, 5.0), "training": (8.0, 20.0)}
    made.save(tmp_path)
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["fits"] and saved["peaks"]["scoring"]["activations"] == 20 * GIB
    assert "10 to 25 s" in " ".join(saved["sentences"])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "scoring 30.0 GiB" in made.picture().alt


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    config_of("qwen2_5_vl").save_pretrained(tmp_path / "model")
    given = {
        "model": str(tmp_path / "model"),
        "dataset": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_pixels": 12544,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 16,
        "gradient_accumulation_steps": 1,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    return tmp_path / "config.yaml"


def test_the_command(config: Path, tmp_path: Path) -> None:
    """From a configuration alone: nothing else is in the folder."""
    words = [
        "plan",
        str(config),
        "--gpus",
        "1",
        "--gpu-memory",
        "1",
        "--text-tokens",
        "16",
        "--out",
        str(tmp_path / "out"),
    ]
    fits = CliRunner().invoke(main, words)
    assert fits.exit_code == 0, fits.output
    assert (
        "It fits" in fits.output and "training pass" in fits.output and "Largest micro-batch that fits" in fits.output
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "plan.png"}
    words[5] = "0.001"
    words += ["--max_completion_length", "64"]
    small = CliRunner().invoke(main, words)
    assert small.exit_code == 1 and "It does not fit" in small.output
    assert not (tmp_path / "run").exists()


def test_wrong_words(config: Path) -> None:
    missing = str(config.parent / "nothing")
    for words, said in (
        (["--gpus", "1", "--gpu-memory", "0"], "--gpu-memory: got 0, takes a number above 0"),
        (["--gpus", "1", "--gpu-memory", "8", "--tflops", "-1"], "--tflops: got -1"),
        (["--gpus", "1", "--gpu-memory", "8", "--gpus_memory", "8"], "unknown key 'gpus_memory'"),
        (
            ["--gpus", "1", "--gpu-memory", "8", "--model", missing],
            "no configuration could be loaded",
        ),
    ):
        found = CliRunner().invoke(main, ["plan", str(config), *words])
        assert found.exit_code == 2 and said in " ".join(found.output.split()), found.output


@pytest.mark.parametrize(
    "words", [["--gpus", "8"], ["--gpu-memory", "40.0"], ["--accelerate", "two.yaml"]], ids=lambda words: words[0]
)
def test_sizes_of_a_dry_run_do_not_pass_unheard_in_training(config: Path, words: list[str]) -> None:
    found = CliRunner().invoke(main, ["train", str(config), *words])
    assert found.exit_code == 2
    assert f"{words[0]}: got {words[1]}, takes --dry-run beside it" in " ".join(found.output.split())


def test_a_dry_run(tmp_path: Path, config: Path) -> None:
    """Data, processor, rewards and a perturbed view are made; no folder, no model."""
    model, processor = families.build("qwen2_5_vl")
    model.config.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    families.picture(1, (56, 56)).save(tmp_path / "one.png")
    row = {"problem": "How many?", "answer": "1", "images": ["one.png"]}
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    words = ["train", str(config), "--dry-run", "--system_prompt", "", "--max_pixels", "3136"]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    for part in ("Data: 4 rows", "Rewards: accuracy", "Perturbed view: patch, which changes", "It fits"):
        assert part in found.output
    assert "Not given, so assumed: --gpus 1, --gpu-memory 80 (GiB)" in found.output
    assert not (tmp_path / "run").exists()
    (tmp_path / "one.png").unlink()
    broken = CliRunner().invoke(main, words)
    assert broken.exit_code == 2 and "one.png" in broken.output
