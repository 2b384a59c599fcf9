"""Which tokens are kept, and the advantages that follow, from scores `[B, T]` of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.contest import Call, Case, Contestant, Setting, Suite, Verdict
from benchmarks.peers import peers
from benchmarks.scores import Scores, make_scores
from vppo_kernels import backends, topk_mask_, vppo_advantages

LENGTHS = {"tiny": 64, "512": 512, "2k": 2048, "16k": 16384}  # T by preset
TRAJECTORIES = {"tiny": 16, "16k": 32}
SHAPED_BOUND = 1e-5  # of a shaped advantage; which tokens have one is exact


class Selection(Suite):
    name = "selection"
    summary = "the tokens kept of each row, and shaped advantages; rows are trajectories, presets their length"
    modes = (False,)
    known = LENGTHS

    def presets(self, device: torch.device) -> list[str]:
        return ["2k", "16k"] if device.type == "cuda" else ["512"]

    def rows(self, preset: str, device: torch.device) -> list[int]:
        return [TRAJECTORIES.get(preset, 128)]

    def case(self, setting: Setting, peers: list[str]) -> Case:
        scores = make_scores(setting.rows, LENGTHS[setting.preset], setting.device)
        labels = {
            "preset": setting.preset,
            "rows": setting.rows,
            "length": scores.values.shape[1],
            "dtype": str(scores.values.dtype).removeprefix("torch."),
            "backward": False,
        }
        return Case(labels, contestants(scores, peers), partial(judge, scores))


def contestants(scores: Scores, names: list[str]) -> list[Contestant]:
    """The floor, then everybody's mask, then everybody's advantages, which need the mask."""
    known = peers("selection")
    # both of Triton's backends have the same kernels for tokens
    available = [name for name in backends.available(scores.values.device) if not name.endswith("_fused")]

    def floor() -> Call:
        out = torch.empty_like(scores.values)
        return lambda: out.copy_(scores.values)

    def mask(backend: str) -> Call:
        out = torch.empty_like(scores.values)
        return lambda: topk_mask_(out.copy_(scores.values), scores.mask, scores.keep_ratio, backend=backend)

    def advantages(backend: str) -> Call:
        inputs = (scores.advantages, scores.values, scores.mask)
        return lambda: vppo_advantages(*inputs, keep_ratio=scores.keep_ratio, backend=backend)

    def ours(prepare: Callable[[str], Call], kind: str, note: str = "") -> list[Contestant]:
        return [Contestant(f"{kind}: {name}", "ours", partial(prepare, name), note) for name in available]

    def peer(module: ModuleType, what: str) -> Call:
        call: Call = getattr(module, what)(scores)
        return call

    def peers_of(what: str, kind: str) -> list[Contestant]:
        notes = [known[name].NOTES["selection"] for name in names]
        prepare = [partial(peer, known[name], what) for name in names]
        return [Contestant(f"{kind}: {name}", "peer", p, n) for name, p, n in zip(names, prepare, notes, strict=True)]

    return [
        Contestant("floor", "floor", floor, "one read and one write of the scores"),
        *peers_of("selection", "mask"),
        *ours(mask, "our mask", "with a copy of the scores, which it overwrites"),
        *peers_of("advantages", "advantages"),
        *ours(advantages, "our advantages"),
    ]


def judge(scores: Scores, contestant: Contestant, call: Call) -> Verdict:
    """Everybody's gate: exactly the kept tokens, and their advantages to within the last digits."""
    result: Tensor = call()
    if contestant.role == "floor":
        return Verdict(right=True)
    got = result.cpu()
    different = int(((got != 0) != scores.keep).sum())
    if different:
        return Verdict(False, reason=f"{different} tokens differ from the definition")
    if contestant.name.startswith(("mask", "our mask")):
        return Verdict(bool((got[scores.keep] == 1).all()), 0.0)
    error = ((got.double() - scores.shaped).abs() / scores.shaped.abs())[scores.keep].max().item() / SHAPED_BOUND
    return Verdict(error <= 1, error, reason="" if error <= 1 else f"error {error:.3g} x the bound")


SUITE = Selection()
