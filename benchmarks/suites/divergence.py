"""KL(clean || perturbed) of every row from hidden states, without and with gradients of both views and the weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.contest import Call, Case, Contestant, Setting, Suite, Verdict
from benchmarks.floor import head_products
from benchmarks.pair import Pair, Truth, differentiated, make_pair
from benchmarks.peers import peers, plain
from vppo_kernels import backends, linear_divergence, tensor_cores
from vppo_kernels.backends import resolve


class Divergence(Suite):
    name = "divergence"
    summary = "KL of two views from hidden states, and its gradient"

    def presets(self, device: torch.device) -> list[str]:
        return ["7b", "32b"] if device.type == "cuda" else ["cpu"]

    def rows(self, preset: str, device: torch.device) -> list[int]:
        return [1024, 4096, 16384, 32768] if device.type == "cuda" else [128 if preset == "tiny" else 512]

    def case(self, setting: Setting, peers: list[str]) -> Case:
        dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32
        pair = make_pair(setting.preset, setting.rows, setting.device, dtype, setting.backward)
        vocab, width = pair.weight.shape
        labels = {
            "preset": setting.preset,
            "rows": setting.rows,
            "vocab": vocab,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "backward": setting.backward,
        }
        case = Case(labels, contestants(pair, peers), Judge(pair))
        names = backend_names(setting.device)
        multiplying = [name for name in names if resolve(name, setting.device, dtype).product]
        return with_bfloat16(case, pair, multiplying) if multiplying else case


def contestants(pair: Pair, names: list[str]) -> list[Contestant]:
    """The floor, the named peers, and every backend of ours that takes these inputs."""

    def floor() -> Call:
        hidden, perturbed, weight = (leaf.detach() for leaf in pair.leaves)
        return head_products(torch.cat([hidden, perturbed]), weight, pair.backward)

    def peer(module: ModuleType) -> Call:
        return differentiated(pair, module.divergence(pair))

    known, available = peers("divergence"), backend_names(pair.hidden.device)
    cut = tensor_cores.multiply(*pair.leaves)
    exact = [name for name in available if cut and name == "triton"]
    return [
        Contestant("floor", "floor", floor, "matrix products alone"),
        *(Contestant(name, "peer", partial(peer, known[name]), known[name].NOTES["divergence"]) for name in names),
        *(Contestant(f"ours: {name}", "ours", partial(ours, pair, name), cut=cut) for name in available),
        *(Contestant(f"ours: {name}, exact", "ours", partial(ours, pair, name, "exact")) for name in exact),
    ]


def ours(pair: Pair, backend: str, precision: str = "default") -> Call:
    def forward() -> Tensor:
        return linear_divergence(*pair.leaves, precision=precision, backend=backend).divergence

    return differentiated(pair, forward)


def with_bfloat16(case: Case, pair: Pair, names: list[str]) -> Case:
    """The case with these backends once more, on the inputs rounded to bfloat16 and held against their truth."""
    hidden, perturbed, weight = (leaf.detach().bfloat16() for leaf in pair.leaves)
    rounded = Pair(hidden, perturbed, weight, pair.backward)
    judge, note = Judge(rounded), "bfloat16 hidden states and weight"
    added = [Contestant(f"ours: {name}, bfloat16", "ours", partial(ours, rounded, name), note) for name in names]

    def judge_all(contestant: Contestant, call: Call) -> Verdict:
        return judge(contestant, call) if contestant in added else case.judge(contestant, call)

    return Case(case.labels, [*case.contestants, *added], judge_all)


def backend_names(device: torch.device) -> list[str]:
    """Our backends on this device."""
    available: Callable[[torch.device], list[str]] | None = getattr(backends, "available", None)
    return ["torch"] if available is None else available(device)


class Judge:
    """Holds results against float64 on a sample of rows; gradients are those of the mean over the sample."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.truth = pair, Truth(pair)
        self.plain_error = 0.0
        if pair.backward:
            self.plain_error = self._plain_gradient_error()

    def _plain_gradient_error(self) -> float:
        """What the textbook formula in the inputs' dtype makes of the sample alone."""
        pair, rows = self.pair, self.truth.rows
        sample = Pair(pair.hidden[rows], pair.perturbed[rows], pair.weight, backward=True)
        gradients: list[Tensor | None] = []
        for leaf, found in zip(pair.leaves, differentiated(sample, plain.divergence(sample))().gradients, strict=True):
            assert found is not None
            gradients.append(found if leaf is pair.weight else torch.zeros_like(leaf).index_copy_(0, rows, found))
        return self.truth.gradient_error(tuple(gradients))

    def __call__(self, contestant: Contestant, call: Call) -> Verdict:
        with self.pair.only(self.truth.rows):
            result: Any = call()
        if contestant.role == "floor":
            return Verdict(right=True)
        value: Tensor = result.value
        got, truth = (value[self.truth.rows], self.truth.kl) if value.dim() else (value, self.truth.kl.mean())
        error, reason = gate.judge_divergence(contestant.role, got, truth, contestant.cut)
        gradient_error = None
        if result.gradients:
            relative = self.truth.gradient_error(result.gradients)
            gradient_error, gradient_reason = gate.judge_gradient(contestant.role, relative, self.plain_error)
            reason = "; ".join(part for part in (reason, gradient_reason) if part)
        return Verdict(not reason, error, gradient_error, reason)


SUITE = Divergence()
