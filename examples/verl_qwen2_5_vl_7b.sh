#!/usr/bin/env bash
# Qwen2.5-VL-7B with VPPO on verl: one node of 8 GPUs. Values that are the paper's say so. Further overrides: "$@".
# Problems are parquet files as verl reads them: prompt, images, reward_model.ground_truth, extra_info.index. Answers are
# scored by what verl has for their data_source, or by the compute_score of reward.custom_reward_function.path=FILE.
set -euo pipefail

options=(
	trainer.v1.trainer_mode=vppo                                     # this package, on verl's synchronous trainer
	+trainer.v1.vppo.recipe=default                                  # exact KL, statistics of the whole batch
	+trainer.v1.vppo.keep_ratio=0.4                                  # the paper's
	+trainer.v1.vppo.seed=42                                         # of the perturbed views
	algorithm.adv_estimator=grpo                                     # the paper's group advantage
	trainer.nnodes=1                                                 # machines
	trainer.n_gpus_per_node=8                                        # GPUs of each
	data.train_files="${TRAIN_FILE:-train.parquet}"                  # problems
	data.val_files="${VAL_FILE:-val.parquet}"                        # problems that are only answered
	data.image_key=images                                            # their column of pictures
	+data.mm_processor_kwargs.min_pixels=200704                      # of a picture, the paper's: smaller ones are enlarged
	+data.mm_processor_kwargs.max_pixels=1003520                     # the paper's: larger ones are reduced
	data.filter_overlong_prompts=True                                # longer ones are left out; verl stops at one
	data.train_batch_size=384                                        # prompts of a step, the paper's
	data.max_prompt_length=2048                                      # tokens, pictures included
	data.max_response_length=2048                                    # tokens, the paper's at 7B
	data.return_raw_chat=True                                        # rollouts apply the chat template
	actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}"  # a folder, or a name on the hub
	actor_rollout_ref.model.use_remove_padding=True                  # packed rows
	actor_rollout_ref.model.enable_gradient_checkpointing=True       # activations are computed again
	actor_rollout_ref.actor.strategy=fsdp2                           # shards weights, gradients and optimizer
	actor_rollout_ref.actor.ppo_mini_batch_size=128                  # prompts of an update, the paper's
	actor_rollout_ref.actor.use_dynamic_bsz=True                     # micro-batches by tokens
	actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384          # tokens of one
	actor_rollout_ref.actor.clip_ratio_low=0.2                       # the paper's
	actor_rollout_ref.actor.clip_ratio_high=0.28                     # the paper's
	actor_rollout_ref.actor.loss_agg_mode=token-mean                 # over all response tokens
	actor_rollout_ref.actor.optim.lr=1e-6                            # the paper's, constant
	actor_rollout_ref.actor.optim.weight_decay=0.01                  # the paper's
	actor_rollout_ref.actor.use_kl_loss=False                        # no reference model
	actor_rollout_ref.rollout.name=vllm                              # or sglang
	actor_rollout_ref.rollout.n=8                                    # rollouts of a prompt, the paper's
	actor_rollout_ref.rollout.temperature=1.0                        # the paper's
	actor_rollout_ref.rollout.top_p=0.99                             # the paper's
	actor_rollout_ref.rollout.tensor_model_parallel_size=1           # GPUs of one inference engine
	actor_rollout_ref.rollout.gpu_memory_utilization=0.6             # of a GPU, while it generates
	actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True          # as the update
	actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=16384   # tokens of a scoring micro-batch
	trainer.total_epochs=2                                           # the paper's
	trainer.save_freq=20                                             # steps between checkpoints
	trainer.test_freq=-1                                             # no evaluation on the way
	trainer.logger='["console","tensorboard"]'                       # or wandb, mlflow, swanlab, file
)
exec python -m verl.trainer.main_ppo "${options[@]}" "$@"
