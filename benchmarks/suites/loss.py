"""The VPPO loss of a batch of rollouts from hidden states, and its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.contest import Call, Case, Contestant, Setting, Suite, Verdict
from benchmarks.floor import head_products
from benchmarks.gradient_truth import GradientJudge
from benchmarks.inputs import PRESETS
from benchmarks.pair import differentiated
from benchmarks.peers import peers
from benchmarks.rollout import Rollouts, make_rollouts
from vppo.errors import InputError
from vppo_kernels import backends, linear_vppo_loss, reference

SHARES = {f"active-{percent}": percent / 100 for percent in (100, 40, 20, 6, 2)}  # of the rows under the head "small"


class Loss(Suite):
    name = "loss"
    summary = "the VPPO loss from hidden states and its gradient; 40 % of the rows active, or the share of active-N"
    modes = (True,)
    known: Mapping[str, Any] = {**PRESETS, **SHARES}

    def presets(self, device: torch.device) -> list[str]:
        return ["7b", "32b"] if device.type == "cuda" else list(SHARES)

    def rows(self, preset: str, device: torch.device) -> list[int]:
        return [8192, 16384] if device.type == "cuda" else [128 if preset == "tiny" else 1024]

    def case(self, setting: Setting, peers: list[str]) -> Case:
        if not setting.backward:
            raise InputError("--no-backward: the loss is measured with its gradient")
        dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32
        share, given = SHARES.get(setting.preset), (setting.rows, setting.device, dtype, setting.backward)
        if share is None:
            rollouts = make_rollouts(setting.preset, *given)
        else:
            rollouts = make_rollouts("small", *given, active=share, padded=False)
        return Case(rollouts.labels(setting.preset), contestants(rollouts, peers), Judge(rollouts))


def contestants(rollouts: Rollouts, names: list[str]) -> list[Contestant]:
    """The floor, the named peers, and every backend of ours that takes these inputs."""

    def floor() -> Call:
        active = rollouts.hidden.detach().flatten(0, 1)[rollouts.active]
        return head_products(active, rollouts.weight.detach(), backward=True)

    def peer(module: ModuleType) -> Call:
        return differentiated(rollouts, module.loss(rollouts))

    def ours(backend: str) -> Call:
        plan = rollouts.plan
        inputs = (rollouts.hidden, rollouts.weight, rollouts.targets, rollouts.old_logprobs, *plan.arguments)
        return differentiated(rollouts, lambda: linear_vppo_loss(*inputs, **plan.options, backend=backend)[0])

    known = peers("loss")
    available = backends.available(rollouts.weight.device, rollouts.weight.dtype)
    return [
        Contestant("floor", "floor", floor, "three matrix products over the active rows"),
        *(Contestant(name, "peer", partial(peer, known[name]), known[name].NOTES["loss"]) for name in names),
        *(Contestant(f"ours: {name}", "ours", partial(ours, name)) for name in available),
    ]


class Judge:
    """Holds the loss and its gradients against the definition in float64, on all rows."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts
        self.gradients = GradientJudge(rollouts, self._objective)
        self.size = self._size(self.gradients.truth.rows)
        sample = self.gradients.plain
        self.plain_error = float((self.gradients.plain_value - sample.value).abs() / self._size(sample.rows))

    def _size(self, rows: Tensor) -> Tensor:
        return self._terms(self.rollouts.exact.flatten()[rows], rows).abs().sum()

    def _terms(self, logprobs: Tensor, rows: Tensor) -> Tensor:
        """The summands of the loss, in the dtype of the log-probabilities."""
        given = (self.rollouts.old_logprobs, self.rollouts.plan.shaped)
        old, shaped = (values.flatten()[rows].to(logprobs.dtype) for values in given)
        return reference.clipped_loss(logprobs, old, shaped, clip_high=0.28) / self.rollouts.plan.mask.sum()

    def _objective(self, logprobs: Tensor, rows: Tensor) -> Tensor:
        return self._terms(logprobs, rows).sum()

    def __call__(self, contestant: Contestant, call: Call) -> Verdict:
        result: Any = call()
        if contestant.role == "floor":
            return Verdict(right=True)
        distance = float((result.value.double() - self.gradients.truth.value).abs() / self.size)
        error, reason = gate.judge_loss(contestant.role, distance, self.plain_error)
        gradient_error, gradient_reason = self.gradients(contestant.role, result.gradients)
        reason = "; ".join(part for part in (reason, gradient_reason) if part)
        return Verdict(not reason, error, gradient_error, reason)


SUITE = Loss()
