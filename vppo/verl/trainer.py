"""The trainer mode `vppo`: verl's trainer, whose advantages are shaped over the whole batch before the update."""

from __future__ import annotations

import logging
import math
import zlib
from collections import defaultdict
from typing import Any

import ray
import torch
import transfer_queue as tq
from torch import Tensor
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_from_nested, response_to_nested

from vppo.monitoring.measured import Measured, spread
from vppo.sight import ImageWatch
from vppo.verl.engine import ASK, DRAW, LEFT_OUT, NLL, UNSCORED
from vppo.verl.losses import MEANS, SCALES, alpha_metrics, drift_metrics
from vppo.verl.options import VerlOptions
from vppo.verl.whole_groups import rows_together, whole_groups
from vppo.verl.worker import VPPOWorker
from vppo_kernels import TrajectoryStats
from vppo_kernels.shaping import shape_advantages

logger = logging.getLogger(__name__)
TOGETHER = "force_group_size"  # verl's key for neighbours that stay in one micro-batch


class VPPOMixin:
    """What VPPO adds to one of verl's trainers: `mode` is that trainer's own name.

    Beside verl's metrics it logs, under `vppo/`, those of `vppo.VPPOTrainer` (see there): dependency_mean,
    dependency_q50, dependency_q90, dependency_q99, kept_fraction, kept_dependency_fraction, kept_unseen_fraction,
    responses_without_kept, scored_fraction, alpha_min, alpha_mean, alpha_max, alpha_std, clip_ratio_kept, from the
    second update of the same rollouts on drift_kept and drift_filtered and, with `rollout.calculate_log_probs`,
    sampler_gap_mean and sampler_gap_max. Its seconds_scoring are part of verl's `timing_s/old_log_prob`, and where
    there is one draw of a view, there is no dependency_stderr.

    Raises:
        InputError: A key under `trainer.v1.vppo` or a setting of verl's is one that VPPO cannot run with.
    """

    mode: str
    config: Any
    actor_rollout_wg: Any
    global_steps: int
    role_worker_mapping: dict[Any, Any]

    def __init__(self, config: Any) -> None:
        self.vppo = VerlOptions.of(config)
        self._tokens: tuple[float, float] | None = None  # response tokens that carry gradient, and all
        self._warned = False
        self._watch = ImageWatch(self.vppo.algorithm, logger.warning)
        config.trainer.v1.trainer_mode = self.mode  # verl asks for its own names from here on
        super().__init__(config)  # type: ignore[call-arg]

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()  # type: ignore[misc]
        for role, worker in self.role_worker_mapping.items():
            if worker.__ray_metadata__.class_name == ActorRolloutRefWorker.__name__:
                self.role_worker_mapping[role] = ray.remote(VPPOWorker)

    # -- before the pass over old log-probabilities ----------------------------------------------------------------

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """verl gives every rank as many tokens; here it also gets the rollouts of a prompt side by side."""
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)  # type: ignore[misc]
        if self._shares_prompts:
            order = whole_groups(batch.keys, _lengths(batch), self.actor_rollout_wg.world_size)
            if order is not None:
                batch.reorder(order)
        return batch

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        ask = self.vppo.ask(self.global_steps)
        if ask is not None:
            batch = _put(batch, {DRAW: self._draws(batch)})
            batch.extra_info[ASK] = ask
            rollout = self.config.actor_rollout_ref.rollout
            if self._shares_prompts and rollout.log_prob_use_dynamic_bsz:
                most = rollout.log_prob_max_token_len_per_gpu
                batch.extra_info[TOGETHER] = rows_together(batch.keys, _lengths(batch), most)
        batch = super()._compute_old_log_prob(batch, metrics)  # type: ignore[misc]
        for name in (ASK, TOGETHER):
            batch.extra_info.pop(name, None)
        if self.config.actor_rollout_ref.rollout.calculate_log_probs:
            metrics.update(_sampler_gap(batch))
        return batch

    @property
    def _shares_prompts(self) -> bool:
        actor = self.config.actor_rollout_ref.actor  # verl takes Ulysses from either key
        apart = max(actor.ulysses_sequence_parallel_size, actor.fsdp_config.ulysses_sequence_parallel_size) == 1
        return self.vppo.shares_prompts and apart

    @property
    def _scaled_later(self) -> bool:
        """Whether workers find the trajectories' factors, from their mini-batches, as the released code does."""
        return self.vppo.scores_tokens and self.vppo.tas_statistics == "micro-batch"

    def _draws(self, batch: Any) -> Tensor:
        """`[rows]` what beside seed and step a row's perturbed view is drawn by; `LEFT_OUT` where none is needed.

        It is made of the problem, for verl's own names of rows are random. Rows that verl adds to fill a batch are
        left out, and so are groups whose rewards are all alike where their advantages are then 0.
        """
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["prompts", "index", "uid", "rm_scores"]
        )
        indices, uids = data["index"], data["uid"]
        groups: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row, scores in enumerate(data["rm_scores"].unbind()):
            groups[str(uids[row])].append((row, float(scores.sum())))
        algorithm = self.config.algorithm
        dead: set[int] = set()
        if algorithm.adv_estimator == "grpo" and not algorithm.use_kl_in_reward:
            for group in groups.values():
                if len(group) > 1 and len({score for _, score in group}) == 1:
                    dead.update(row for row, _ in group)
        draws = []
        for row, (key, tag, prompt) in enumerate(zip(batch.keys, batch.tags, data["prompts"].unbind(), strict=True)):
            problem = zlib.crc32(prompt.numpy().tobytes(), zlib.crc32(str(indices[row]).encode()))
            if self.vppo.perturbation_scope == "rollout":
                problem = zlib.crc32(key.split("_", 1)[1].encode(), problem)  # behind the group's name, the rollout's
            draws.append(LEFT_OUT if row in dead or tag.get("is_padding", False) else problem)
        return torch.tensor(draws)

    # -- after it ------------------------------------------------------------------------------------------------------

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        if not self.vppo.scores_tokens:
            return batch
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["advantages", "dependency", "response_mask"],
        )
        nested = data["response_mask"]
        dependency = response_from_nested(data["dependency"], nested).to_padded_tensor(0.0)
        advantages, mask = data["advantages"].to_padded_tensor(0.0), nested.to_padded_tensor(0).bool()
        scored = ~(dependency == UNSCORED).any(1)
        stats = TrajectoryStats(0.0, 0.0, 0.0, 0) if self._scaled_later else None
        shaped = shape_advantages(advantages, dependency, mask, has_image=scored, stats=stats, **self.vppo.shaping)
        fields = {"advantages": response_to_nested(shaped.advantages, nested)}
        if self._scaled_later:  # NaN marks what enters no statistic; so 0 / 0 is right for a row without tokens
            fields[MEANS] = torch.where(scored, (dependency * mask).sum(1) / mask.sum(1), math.nan)
        batch = _put(batch, fields)
        real = _real(batch)
        measured = _measured(dependency[real], mask[real], shaped.keep[real], scored[real])
        metrics.update(measured.metrics())
        if self.vppo.method.filters:
            self._watch.kept(measured, self.vppo.keep_ratio)
        if measured.values is not None:
            self._watch.dependency(measured.values)
        factors = shaped.alpha[scored & real]
        if len(factors) and not self._scaled_later:
            metrics.update({f"vppo/alpha_{name}": value for name, value in spread(factors).items()})
        if not len(factors) and not self._warned:
            self._warned = True
            logger.warning(
                f"vppo: step {self.global_steps} has no row with both an image and rewards that differ within its "
                "group: nothing is filtered or shaped"
            )
        self._tokens = float((mask & (shaped.advantages != 0)).sum()), float(mask.sum())
        return batch

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.vppo.nll_coef:
            batch.extra_info[NLL] = float(self.vppo.nll_coef)
        if self._scaled_later:
            batch.extra_info[SCALES] = self.vppo.shaping["scale_min"], self.vppo.shaping["scale_max"]
        batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        for name in (NLL, SCALES):
            batch.extra_info.pop(name, None)
        clipped = metrics.get("actor/pg_clipfrac", math.nan)
        if self._tokens is not None and not math.isnan(clipped):  # verl counts all response tokens
            active, total = self._tokens
            metrics["vppo/clip_ratio_kept"] = clipped * total / max(active, 1.0)
        metrics.update({**drift_metrics(metrics), **alpha_metrics(metrics)})
        return batch


def _lengths(batch: Any) -> list[int]:
    return [tag["seq_len"] for tag in batch.tags]


def _put(batch: Any, fields: dict[str, Tensor]) -> Any:
    """The batch with further fields; a batch names those that workers fetch, where it has been put before."""
    put = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=tu.get_tensordict(fields))
    put.extra_info.update(batch.extra_info)
    return put


def _real(batch: Any) -> Tensor:
    """`[rows]` bool, those that verl has not added to fill the batch."""
    return torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])


def _sampler_gap(batch: Any) -> dict[str, float]:
    """|log-probability by the sampler - by the trainer| over the sampled tokens, in nats."""
    names = ["rollout_log_probs", "old_log_probs", "response_mask"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    sampled, trained, mask = (data[name].to_padded_tensor(0) for name in names)
    gap = (sampled.double() - trained.double()).abs()[mask.bool() & _real(batch).unsqueeze(1)]
    gap = gap[~gap.isnan()]
    if not len(gap):
        return {}
    return {"vppo/sampler_gap_mean": gap.mean().item(), "vppo/sampler_gap_max": gap.max().item()}


def _measured(dependency: Tensor, mask: Tensor, keep: Tensor, scored: Tensor) -> Measured:
    tokens = mask & scored.unsqueeze(1)
    return Measured(dependency[tokens], keep.float()[tokens], tokens.sum(1).tolist(), scored.tolist())


@register_trainer("vppo")
class VPPOTrainerSync(VPPOMixin, PPOTrainerSync):
    """`trainer.v1.trainer_mode=vppo`: verl's synchronous trainer with VPPO."""

    mode = "sync"


@register_trainer("vppo_colocate_async")
class VPPOTrainerColocateAsync(VPPOMixin, PPOTrainerColocateAsync):
    """`trainer.v1.trainer_mode=vppo_colocate_async`: the one whose rollouts go on from step to step.

    The dependency is that of the policy that is trained, as verl's old log-probabilities are.
    """

    mode = "colocate_async"
