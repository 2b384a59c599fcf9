"""Exact per-token divergences, log-probabilities and shaped-advantage losses from hidden states.

Tensors in, tensors out; never a full `[rows, vocabulary]` tensor.
"""

from vppo_kernels.divergence import divergence, linear_divergence, sampled_divergence
from vppo_kernels.linear_loss import linear_vppo_loss
from vppo_kernels.logprob import linear_logprob
from vppo_kernels.loss import vppo_loss
from vppo_kernels.selection import topk_mask, topk_mask_
from vppo_kernels.shaping import TrajectoryStats, trajectory_scale, trajectory_stats, vppo_advantages
from vppo_kernels.statistics import DivergenceOutput, LogprobOutput
from vppo_kernels.tiling import workspace_limit

__all__ = [
    "DivergenceOutput",
    "LogprobOutput",
    "TrajectoryStats",
    "divergence",
    "linear_divergence",
    "linear_logprob",
    "linear_vppo_loss",
    "sampled_divergence",
    "topk_mask",
    "topk_mask_",
    "trajectory_scale",
    "trajectory_stats",
    "vppo_advantages",
    "vppo_loss",
    "workspace_limit",
]
