"""What of verl is overridden or called, by name and parameters, checked before anything is registered."""

from __future__ import annotations

import verl

from vppo.seams import MovedSeamError, lacking

FSDP = "verl.workers.engine.fsdp.transformer_impl"
TRAINER = "verl.trainer.ppo.v1.trainer_base"
TENSORDICT = "verl.utils.tensordict_utils"
SEAMS = {
    f"{FSDP}:FSDPEngineWithLMHead.__init__": ("model_config", "engine_config", "optimizer_config", "checkpoint_config"),
    f"{FSDP}:FSDPEngineWithLMHead._build_lora_module": ("module",),
    f"{FSDP}:FSDPEngineWithLMHead.forward_backward_batch": ("data", "loss_function", "forward_only"),
    f"{FSDP}:FSDPEngineWithLMHead.forward_step": ("micro_batch", "loss_function", "forward_only"),
    f"{FSDP}:FSDPEngineWithLMHead.prepare_model_inputs": ("micro_batch",),
    f"{FSDP}:FSDPEngineWithLMHead.prepare_model_outputs": (
        "output", "output_args", "micro_batch", "logits_processor_func",
    ),
    f"{FSDP}:FSDPEngineWithLMHead._gather_and_unpad_packed": ("tensor", "pad_size"),
    f"{FSDP}:FSDPEngineWithLMHead.optimizer_step": (),
    "verl.workers.engine:EngineRegistry.register": ("model_type", "backend", "device", "vendor"),
    "verl.workers.engine:EngineRegistry.get_engine_cls": ("model_type", "backend"),
    "verl.workers.engine_workers:ActorRolloutRefWorker.__init__": ("config", "role"),
    f"{TRAINER}:register_trainer": ("name",),
    f"{TRAINER}:PPOTrainer.__init__": ("config",),
    f"{TRAINER}:PPOTrainer._init_resource_pool_mgr": (),
    f"{TRAINER}:PPOTrainer._balance_batch": ("batch", "metrics"),
    f"{TRAINER}:PPOTrainer._compute_old_log_prob": ("batch", "metrics"),
    f"{TRAINER}:PPOTrainer._compute_advantage": ("batch", "metrics"),
    f"{TRAINER}:PPOTrainer._update_actor": ("batch", "metrics"),
    "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync": ("config",),
    "verl.trainer.ppo.v1.trainer_colocate_async:PPOTrainerColocateAsync": ("config",),
    "verl.workers.utils.padding:response_from_nested": ("tensor", "response_mask"),
    "verl.workers.utils.padding:response_to_nested": ("tensor", "response_mask"),
    "verl.workers.utils.padding:no_padding_2_padding": ("tensor", "data"),
    "verl.utils.metric:Metric.from_dict": ("data", "aggregation"),
    "verl.utils.model:extract_multi_modal_inputs": ("batch_data",),
    "verl.utils.seqlen_balancing:calculate_workload": ("seqlen_list",),
    "verl.utils.seqlen_balancing:get_seqlen_balanced_partitions": ("seqlen_list", "k_partitions", "equal_size"),
    "verl.utils.seqlen_balancing:rearrange_micro_batches": ("force_group_size",),
    "verl.utils.transformers_compat:unpack_visual_output": ("visual_output",),
    "verl.utils.ulysses:get_ulysses_sequence_parallel_rank": ("group",),
    f"{TENSORDICT}:get_non_tensor_data": ("data", "key", "default"),
    f"{TENSORDICT}:assign_non_tensor_stack": ("tensor_dict", "key", "val"),
    f"{TENSORDICT}:index_select_tensor_dict": ("batch", "indices"),
    f"{TENSORDICT}:get_tensordict": ("tensor_dict",),
}  # fmt: skip


def missing(seams: dict[str, tuple[str, ...]]) -> list[str]:
    """What of the seams, `"module:object"` to the parameters that it must take, the installed verl lacks."""
    return [found for target, parameters in seams.items() for found in lacking(target, parameters)]


def check_seams() -> None:
    """Raises a `MovedSeamError` that names verl's version and what it lacks."""
    if found := missing(SEAMS):
        raise MovedSeamError(
            f"verl: got version {verl.__version__}, which lacks {', '.join(found)}; takes verl>=0.9,<0.10"
        )
