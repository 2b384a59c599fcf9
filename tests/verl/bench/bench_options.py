"""Reads lists of overrides from stdin and prints, as JSON, the options of each or why they are refused."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="bench_platform")

import verl  # noqa: F401  (which loads the bench, and the plug-in by its entry point)
from hydra import compose, initialize_config_module
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import omega_conf_to_dataclass, validate_config

get_trainer_cls("vppo")
from vppo.errors import InputError  # noqa: E402
from vppo.seams import MovedSeamError  # noqa: E402
from vppo.verl import seams  # noqa: E402
from vppo.verl.options import VerlOptions  # noqa: E402

answers: list[object] = []
with initialize_config_module("verl.trainer.config", version_base=None):
    for overrides in json.load(sys.stdin):
        config = compose("ppo_trainer", ["actor_rollout_ref.actor.strategy=fsdp2", *overrides])
        try:
            answers.append(asdict(VerlOptions.of(config)))
            if config.actor_rollout_ref.actor.use_dynamic_bsz:  # a whole launch file: verl's own classes check it
                for part in (config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.algorithm):
                    omega_conf_to_dataclass(part)
                validate_config(config, use_reference_policy=False, use_critic=False)
        except InputError as error:
            answers.append(f"InputError: {error}")
seams.SEAMS = {
    "verl.nowhere:Engine": (),
    f"{seams.TRAINER}:PPOTrainer._gone": (),
    f"{seams.TRAINER}:register_trainer": ("name", "mode"),
}
answers.append(seams.missing(seams.SEAMS))
try:
    seams.check_seams()
except MovedSeamError as error:
    answers.append(str(error))
print(json.dumps(answers))
