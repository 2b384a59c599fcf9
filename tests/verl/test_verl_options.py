"""Keys under `trainer.v1.vppo`, settings that are refused, and seams of verl that moved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent / "bench"
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("verl_*.sh"))
ACTOR = "actor_rollout_ref.actor"
REFUSED = {
    "+trainer.v1.vppo.keep_ratio=0": "trainer.v1.vppo.keep_ratio: got 0, takes a number above 0 and at most 1",
    "+trainer.v1.vppo.keep_ratio=much": "trainer.v1.vppo.keep_ratio: got 'much', takes a number",
    "+trainer.v1.vppo.divergence=k9": "trainer.v1.vppo.divergence: got 'k9', takes one of",
    "+trainer.v1.vppo.keep_threshold=-1": "trainer.v1.vppo.keep_threshold: got -1, takes None or a finite number of at",
    "+trainer.v1.vppo.draws=2": "trainer.v1.vppo.draws: got 2, takes 1 with verl, whose workers draw one view",
    "+trainer.v1.vppo.algorithm=random": "trainer.v1.vppo.algorithm: got 'random', takes one of ['vppo', 'tas', 'tgf'",
    "+trainer.v1.vppo.keep=1": "trainer.v1.vppo: got an unknown key 'keep', takes ['algorithm'",
    "+trainer.v1.vppo.seed=-1": "trainer.v1.vppo.seed: got -1, takes a whole number from 0",
    "+trainer.v1.vppo.tas_statistics=rank": "trainer.v1.vppo.tas_statistics: got 'rank', takes one of ['batch',",
    "+trainer.v1.vppo.recipe=paper": f"{ACTOR}.loss_agg_mode: got 'token-mean', takes one of ['seq-mean-token-mean']",
    "+trainer.v1.vppo.prefix_sharing=on": "trainer.v1.vppo.prefix_sharing: got 'on', takes one of ['auto', 'off']",
    f"{ACTOR}.strategy=megatron": f"{ACTOR}.strategy: got 'megatron', takes one of ['fsdp', 'fsdp2'] with vppo",
    f"{ACTOR}.policy_loss.loss_mode=kl_cov": f"{ACTOR}.policy_loss.loss_mode: got 'kl_cov', takes one of",
    f"{ACTOR}.calculate_sum_pi_squared=True": f"{ACTOR}.calculate_sum_pi_squared: got True, takes False with vppo",
    "actor_rollout_ref.model.use_fused_kernels=True": "actor_rollout_ref.model.use_fused_kernels: got True",
    "algorithm.rollout_correction.bypass_mode=True": "algorithm.rollout_correction.bypass_mode: got True",
    "actor_rollout_ref.model.mtp.enable=True": "actor_rollout_ref.model.mtp.enable: got True, takes False with vppo",
    f"{ACTOR}.use_prefix_grouper=True": f"{ACTOR}.use_prefix_grouper: got True, takes False with vppo",
    "distillation.enabled=True": "distillation.enabled: got True, takes False with vppo",
}
TAKEN = {
    "+trainer.v1.vppo.keep_threshold=0.1": {"keep_threshold": 0.1, "keep_ratio": 0.4},
    "+trainer.v1.vppo.keep_ratio=1": {"keep_ratio": 1, "divergence": "kl", "nll_coef": 0.0},
    "+trainer.v1.vppo.recipe=official": {"divergence": "k3", "nll_coef": 0.06, "tas_statistics": "micro-batch"},
    "+trainer.v1.vppo={recipe: official, tas_statistics: batch}": {"divergence": "k3", "tas_statistics": "batch"},
    f"+trainer.v1.vppo.recipe=paper {ACTOR}.loss_agg_mode=seq-mean-token-mean": {"divergence": "kl"},
}


def overrides_of(example: Path, folder: Path) -> list[str]:
    """What a launch file hands to verl, told by what it runs as `python`."""
    told = folder / "python"
    told.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    told.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([example], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    option, module, *overrides = done.stdout.splitlines()
    assert (option, module) == ("-m", "verl.trainer.main_ppo")
    return overrides


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `bench_options.py` says of every set of overrides: options, or an error; verl is imported once."""
    asked = [[one] for one in REFUSED]
    for one in TAKEN:
        first, found, second = one.partition(f" {ACTOR}")
        asked.append([first, f"{ACTOR}{second}"] if found else [first])
    asked += [overrides_of(example, tmp_path_factory.mktemp("bin")) for example in EXAMPLES]
    done = subprocess.run(
        [sys.executable, BENCH / "bench_options.py"],
        input=json.dumps(asked),
        env={**os.environ, "PYTHONPATH": f"{BENCH}{os.pathsep}{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(zip([*REFUSED, *TAKEN, *EXAMPLES, "seams", "moved", "said"], [*found, done.stderr], strict=True))


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(override: str, answers: Any) -> None:
    assert answers[override].startswith(f"InputError: {REFUSED[override]}")


@pytest.mark.parametrize("override", TAKEN)
def test_recipes_fill_what_is_not_given(override: str, answers: Any) -> None:
    assert TAKEN[override].items() <= answers[override].items()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_launch_files_are_what_verl_and_vppo_take(example: Path, answers: Any) -> None:
    assert answers[example]["keep_ratio"] == 0.4, answers[example]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_key_of_a_launch_file_has_a_comment(example: Path) -> None:
    keys = [line for line in example.read_text().splitlines() if line.startswith("\t")]
    assert len(keys) > 4
    assert not [line for line in keys if not line.partition("  # ")[2]]


def test_a_seam_that_moved_is_named(answers: Any) -> None:
    assert answers["seams"] == [
        "verl.nowhere",
        "verl.trainer.ppo.v1.trainer_base:PPOTrainer._gone",
        "parameter 'mode' of verl.trainer.ppo.v1.trainer_base:register_trainer",
    ]


def test_a_moved_seam_is_an_error_with_the_version(answers: Any) -> None:
    said = answers["moved"]
    assert said.startswith(f"verl: got version {version('verl')}, which lacks verl.nowhere, verl.trainer.ppo.v1")
    assert said.endswith("takes verl>=0.9,<0.10")


def test_it_says_loudly_that_it_could_not_be_loaded() -> None:
    """verl logs what goes wrong in a plug-in where nobody looks."""
    script = "import sys; sys.modules['transfer_queue'] = None; import bench_torchvision, verl"
    bench = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES")  # which itself needs what is missing here
    own = {name: value for name, value in os.environ.items() if name not in bench}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**own, "PYTHONPATH": f"{BENCH}{os.pathsep}{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = "vppo-kernels is not loaded into verl: MissingExtraError: this part of vppo needs 'transfer_queue'"
    assert said in done.stderr and "pip install 'vppo-kernels[verl]'" in done.stderr


def test_it_says_that_it_is_loaded(answers: Any) -> None:
    assert "is loaded into verl" in answers["said"]
