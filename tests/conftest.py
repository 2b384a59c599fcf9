"""Settings of every test: one thread, the same hypothesis examples on every run, and who runs what."""

import os
from pathlib import PurePosixPath
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU

torch.set_num_threads(1)  # two busy threads on a contended machine are slower than one on tensors of this size

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("suite")

# files whose tests share what takes long to make: two workers would make it twice
SHARING = {
    *("test_analysis", "test_analysis_comparison", "test_analysis_report", "test_demo_report", "test_demo_run"),
    *("test_emulated_cuda", "test_faults", "test_rewards_equality", "test_train", "test_trainer_distributed"),
    *(
        "test_trainer_fsdp",
        "test_trainer_mixed",
        "test_vllm_prompts",
        "test_eval_run",
        "test_eval_report",
        "test_plan_measured",
    ),
    *("test_distill_fsdp", "test_methods_sharded", "test_study_report", "test_study_run", "test_study_warmup"),
    *("test_command_line", "test_contest", "test_rollout", "test_step"),  # of the benchmarks
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go to whichever worker is free, but those of a file in `SHARING` to one. (`--dist loadgroup` is for that,
    and pytest-xdist 3.8 does not find its groups under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if PurePosixPath(file).stem in SHARING else nodeid

    return Scheduling(config, log)
