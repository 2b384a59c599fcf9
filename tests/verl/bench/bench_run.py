"""verl's own trainer on this machine, with tiny sizes: `bench_run.py NODES WORKERS_A_NODE FOLDER [override ...]`.

Several nodes are raylets of their own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
os.environ.update(
    VERL_PLATFORM="cpu",
    VERL_USE_EXTERNAL_MODULES=",".join(["bench_platform", *filter(None, [os.environ.get("BENCH_MODULES")])]),
    PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # what is tested here is all that runs
    OMP_NUM_THREADS="1",
)
nodes, workers, folder, *overrides = sys.argv[1:]
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
OVERRIDES = [
    "algorithm.adv_estimator=grpo",
    "trainer.device=cpu",
    f"trainer.nnodes={nodes}",
    f"trainer.n_gpus_per_node={workers}",
    f"data.train_files={folder}/problems.parquet",
    f"data.val_files={folder}/problems.parquet",
    "data.shuffle=False",
    "data.train_batch_size=4",
    "data.max_prompt_length=64",
    "data.max_response_length=12",
    "data.return_raw_chat=True",
    "data.image_key=images",
    "data.dataloader_num_workers=0",
    "data.filter_overlong_prompts=False",
    f"{MODEL}.path={folder}",
    f"{MODEL}.use_remove_padding=False",
    f"{MODEL}.enable_gradient_checkpointing=False",
    f"+{MODEL}.override_config.attn_implementation=sdpa",
    f"{ACTOR}.strategy=fsdp2",
    f"{ACTOR}.fsdp_config.strategy=fsdp2",
    f"{ACTOR}.fsdp_config.use_torch_compile=False",
    f"+{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp32",
    f"{ACTOR}.use_torch_compile=False",
    f"{ACTOR}.ppo_mini_batch_size=4",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
    f"{ACTOR}.optim.lr=1e-3",
    f"{ROLLOUT}.name=hf",
    f"{ROLLOUT}.n=4",
    f"{ROLLOUT}.tensor_model_parallel_size={int(nodes) * int(workers)}",  # one server, whose answers count its calls
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4",
    f"{ROLLOUT}.calculate_log_probs=True",
    f"{ROLLOUT}.agent.num_workers=1",
    f"{ROLLOUT}.n_gpus_per_node={workers}",
    "reward.num_workers=1",
    f"reward.custom_reward_function.path={HERE}/bench_reward.py",
    "trainer.logger=[file]",
    "trainer.val_before_train=False",
    "trainer.save_freq=-1",
    "trainer.test_freq=-1",
    "trainer.total_training_steps=2",
    "trainer.resume_mode=disable",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
]


def have_patience() -> None:
    """Ray gives a node 30 seconds to start, which a busy machine does not."""
    import time

    from ray._private import services

    own = services.get_node

    def get_node(*args: object) -> object:
        for _ in range(240):
            try:
                return own(*args)
            except RuntimeError:
                time.sleep(1)
        return own(*args)

    services.get_node = get_node


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster
    from verl.trainer.main_ppo import main as train

    have_patience()
    slots = {"num_cpus": 16, "num_gpus": int(workers)}
    cluster = Cluster(initialize_head=True, head_node_args={**slots, "include_dashboard": False})
    for _ in range(int(nodes) - 1):
        cluster.add_node(**slots)
    address = [f"+ray_kwargs.ray_init.address={cluster.address}", "ray_kwargs.ray_init.num_cpus=null"]
    sys.argv = [sys.argv[0], *OVERRIDES, *address, *overrides]
    try:
        train()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
