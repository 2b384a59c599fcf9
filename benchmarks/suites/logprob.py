"""Log-probabilities of sampled tokens from hidden states, of all rows, and the gradient through the active ones."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.contest import Call, Case, Contestant, Setting, Suite, Verdict
from benchmarks.floor import head_products
from benchmarks.gradient_truth import GradientJudge
from benchmarks.pair import differentiated
from benchmarks.peers import peers
from benchmarks.rollout import Rollouts, make_rollouts
from vppo_kernels import backends, linear_logprob, tensor_cores


class Logprob(Suite):
    name = "logprob"
    summary = "log-probabilities of sampled tokens from hidden states, and the gradient through 40 % of them"

    def presets(self, device: torch.device) -> list[str]:
        return ["7b", "32b"] if device.type == "cuda" else ["small"]

    def rows(self, preset: str, device: torch.device) -> list[int]:
        return [8192, 16384] if device.type == "cuda" else [128 if preset == "tiny" else 1024]

    def case(self, setting: Setting, peers: list[str]) -> Case:
        dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32
        rollouts = make_rollouts(setting.preset, setting.rows, setting.device, dtype, setting.backward)
        return Case(rollouts.labels(setting.preset), contestants(rollouts, peers), Judge(rollouts))


def contestants(rollouts: Rollouts, names: list[str]) -> list[Contestant]:
    """The floor, the named peers, and every backend of ours that takes these inputs."""

    def floor() -> Call:
        hidden = rollouts.hidden.detach().flatten(0, 1)
        return head_products(hidden, rollouts.weight.detach(), rollouts.backward, hidden[rollouts.active])

    def peer(module: ModuleType) -> Call:
        return differentiated(rollouts, module.logprob(rollouts))

    def ours(backend: str, precision: str = "default") -> Call:
        inputs = (rollouts.hidden, rollouts.weight, rollouts.targets)

        def forward() -> Tensor:
            return linear_logprob(*inputs, precision=precision, backend=backend).logprobs

        return differentiated(rollouts, forward)

    known = peers("logprob")
    available = backends.available(rollouts.weight.device, rollouts.weight.dtype)
    cut = tensor_cores.multiply(rollouts.hidden, rollouts.weight)
    exact = [name for name in available if cut and name == "triton"]
    return [
        Contestant("floor", "floor", floor, "matrix products alone; the gradient's over the active rows"),
        *(Contestant(name, "peer", partial(peer, known[name]), known[name].NOTES["logprob"]) for name in names),
        *(Contestant(f"ours: {name}", "ours", partial(ours, name), cut=cut) for name in available),
        *(Contestant(f"ours: {name}, exact", "ours", partial(ours, name, "exact")) for name in exact),
    ]


class Judge:
    """Holds all log-probabilities, and the gradient through the active ones, against float64."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts
        self.gradients = GradientJudge(rollouts, self._objective) if rollouts.backward else None

    def _objective(self, logprobs: Tensor, rows: Tensor) -> Tensor:
        return (logprobs * self.rollouts.upstream.flatten()[rows]).sum()

    def __call__(self, contestant: Contestant, call: Call) -> Verdict:
        result: Any = call()
        if contestant.role == "floor":
            return Verdict(right=True)
        exact, size = self.rollouts.exact, self.rollouts.size
        error, reason = gate.judge_logprob(contestant.role, result.value, exact, size, contestant.cut)
        gradient_error = None
        if self.gradients is not None:
            gradient_error, gradient_reason = self.gradients(contestant.role, result.gradients)
            reason = "; ".join(part for part in (reason, gradient_reason) if part)
        return Verdict(not reason, error, gradient_error, reason)


SUITE = Logprob()
