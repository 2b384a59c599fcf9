#!/usr/bin/env bash
# Qwen2.5-VL-32B with VPPO on verl: four nodes of 8 GPUs, as in the paper; what differs from 7B. Further overrides: "$@".
# First on one node: ray start --head; on the others: ray start --address=HEAD:6379. Then this, on the head.
set -euo pipefail

export MODEL="${MODEL:-Qwen/Qwen2.5-VL-32B-Instruct}"
options=(
	trainer.nnodes=4                                                 # the paper's 32 GPUs
	data.max_response_length=4096                                    # tokens, the paper's at 32B
	actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192           # tokens of a micro-batch
	actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=8192    # and of a scoring one
	actor_rollout_ref.rollout.tensor_model_parallel_size=4           # GPUs of one inference engine
)
exec "$(dirname "$0")/verl_qwen2_5_vl_7b.sh" "${options[@]}" "$@"
