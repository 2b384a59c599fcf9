"""What VPPO adds to a training step: scoring two views of every response, and whole steps beside GRPO's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Call, Case, Contestant, Setting, Suite, Verdict
from benchmarks.policy import POLICIES, Policy, TrainingStep, model_of, rollouts_of
from benchmarks.sharded import ShardedStep
from vppo.batch import Batch, View
from vppo.errors import InputError
from vppo.heads import logit_options
from vppo.prefix_sharing import ResponsePasses
from vppo.scoring import score

CURVES = ("prompt", "rollouts", "group")  # presets that differ in this number alone
RELATIVE, ABSOLUTE = 1e-3, 1e-7  # of a dependency in nats from float32 hidden states
RELATIVE_16_BIT = 0.25  # of the sum of all: a model's own rounding, whichever way its tokens pass


class Step(Suite):
    name = "step"
    summary = "two views scored (--no-backward), whole training steps (--backward); rows are rollouts"
    known = POLICIES

    def presets(self, device: torch.device) -> list[str]:
        return ["3b"] if device.type == "cuda" else ["demo", "small"]

    def rows(self, preset: str, device: torch.device) -> list[int]:
        prompts = {"demo": 16, "3b": 4}.get(preset, 1 if preset.split("-")[0] in CURVES else 2)
        return [prompts * POLICIES[preset].rollouts]

    def case(self, setting: Setting, peers: list[str]) -> Case:
        policy = POLICIES[setting.preset]
        return (_step if setting.backward else _scoring)(setting, policy)


def _labels(setting: Setting, policy: Policy, mode: str, batch: Batch, view: View) -> dict[str, object]:
    leaders = {view.keys[row]: row for row in range(len(batch))}.values()
    responses = sum(batch.response_lengths)
    return {
        "preset": setting.preset,
        "rows": setting.rows,
        "backward": setting.backward,
        "mode": mode,
        "prompts": len(leaders),
        "prompt": batch.prompt_lengths[0],
        "response": batch.response_lengths[0],
        "tokens_whole": sum(batch.prompt_lengths) + responses,
        "tokens_shared": sum(batch.prompt_lengths[row] for row in leaders) + responses,
        "dtype": str(policy.dtype).removeprefix("torch."),
    }


def _scoring(setting: Setting, policy: Policy) -> Case:
    model = model_of(policy, setting.device).eval()
    batch, clean, perturbed = rollouts_of(policy, model, setting.rows)
    options = logit_options(model, 1.0)

    def scored(sharing: str) -> Call:
        passes = ResponsePasses(model, sharing=sharing)
        return lambda: score(passes, batch, range(len(batch)), clean, perturbed, kind="kl", options=options)

    @torch.no_grad()
    def tokens_alone() -> Call:
        """Prompts once for each view, and responses that see themselves only."""
        leaders = list({clean.keys[row]: row for row in range(len(batch))}.values())
        prompts = [batch.prompts(leaders, view) for view in (clean, perturbed)]
        responses = {"input_ids": batch.completion_ids, "attention_mask": batch.completion_mask}
        backbone = model.base_model

        @torch.no_grad()
        def call() -> None:
            for prompt in prompts:
                backbone(**prompt, use_cache=False)
                backbone(**responses, use_cache=False)

        return call

    exact = policy.dtype == torch.float32
    truth_model = copy.deepcopy(model).double() if exact else copy.deepcopy(model).float()
    truth_passes = ResponsePasses(truth_model, sharing="off")
    truth = score(truth_passes, batch, range(len(batch)), clean, perturbed, kind="kl", options=options)
    contestants = [
        Contestant("floor", "floor", tokens_alone, "as many tokens, with nothing before them; no head"),
        Contestant("rows whole", "peer", partial(scored, "off"), "prompt and image again for each response"),
        Contestant("ours: prompts shared", "ours", partial(scored, "on")),
    ]
    labels = _labels(setting, policy, "two views scored", batch, clean)
    return Case(labels, contestants, partial(_judge_scores, truth.double(), batch.mask, exact))


def _judge_scores(truth: Tensor, mask: Tensor, exact: bool, contestant: Contestant, call: Call) -> Verdict:
    found: Tensor | None = call()
    if found is None:
        return Verdict(right=True)
    difference, truth = (found.double() - truth).abs()[mask], truth[mask]
    if exact:
        error = (difference / (RELATIVE * truth + ABSOLUTE)).max().item()
    else:
        error = (difference.sum() / truth.sum() / RELATIVE_16_BIT).item()
    return Verdict(error <= 1, error, reason="" if error <= 1 else f"error {error:.3g} x the bound")


def _step(setting: Setting, policy: Policy) -> Case:
    step: Callable[..., Call] = partial(TrainingStep, policy, setting.rows, setting.device)
    mode = "a training step"
    if policy.processes > 1:
        if setting.device.type != "cpu":
            raise InputError(f"--preset {setting.preset}: shards over processes of a CPU, not of {setting.device.type}")
        step, mode = partial(ShardedStep, policy, setting.rows), f"a step, FSDP2, {policy.processes} processes"
    model = model_of(policy, torch.device("meta") if setting.device.type == "cuda" else setting.device)
    batch, clean, _ = rollouts_of(policy, model, setting.rows)
    tokens = _StepTokens(policy, model, batch, clean)
    shared, whole = tokens.of("shared"), tokens.of("whole")
    contestants = [
        Contestant("GRPO by TRL", "floor", partial(step, stock=True), "its own trainer, its own head"),
        Contestant("GRPO here", "peer", partial(step, algorithm="grpo"), "with this library's head"),
        Contestant("VPPO, rows whole", "peer", partial(step, prefix_sharing="off"), f"{whole:,} tokens pass"),
        Contestant("ours: VPPO", "ours", partial(step, prefix_sharing="on"), f"prompts shared: {shared:,} tokens pass"),
    ]
    if policy.given or setting.preset.split("-")[0] in CURVES:
        contestants = [contestants[0], contestants[-1]]  # what the ratio is of
    grpo = tokens.of("grpo")
    passing = {"VPPO, rows whole": {whole}, "ours: VPPO": {shared, shared + tokens.compared}}
    labels = {**_labels(setting, policy, mode, batch, clean), "tokens_step": shared, "tokens_step_whole": whole}
    return Case(labels, contestants, partial(_judge_step, passing, {grpo}))


class _StepTokens:
    """How many tokens pass the language model in a step, counted from the sizes of prompts and responses.

    Attributes:
        compared: In the first step of a trainer also: two rows whole and in a pack, on every process.
    """

    def __init__(self, policy: Policy, model: Any, batch: Batch, view: View) -> None:
        rows, prompt, response = len(batch), batch.prompt_lengths[0], policy.response
        passes, own = ResponsePasses(model), rows // policy.processes
        packs = sum(len(passes.packs(batch, range(first, first + own), view)) for first in range(0, rows, own))
        self._sampling = 0 if policy.given else rows * (prompt + response - 1)  # nothing follows the last token
        self._whole = rows * (prompt + response)
        self._shared = packs * (prompt - 1) + rows * response  # each response begins with the prompt's last token
        # that are scored: where it samples in float32, that is the clean one
        self._views = 1 if policy.dtype == torch.float32 and not policy.given else 2
        self.compared = policy.processes * (2 * (prompt + response) + prompt - 1 + 2 * response)

    def of(self, way: str) -> int:
        """Of sampling, of the views that are scored, and of the pass with gradients."""
        if way == "grpo":
            return self._sampling + self._whole
        return self._sampling + (self._views + 1) * {"shared": self._shared, "whole": self._whole}[way]


def _judge_step(passing: dict[str, set[int]], grpo: set[int], contestant: Contestant, call: Any) -> Verdict:
    """A finite loss, and exactly the tokens that have to pass."""
    loss, expected = call(), passing.get(contestant.name, grpo)
    if not loss.isfinite():
        return Verdict(False, reason=f"the loss is {loss.item()}")
    right = call.tokens in expected
    wanted = " or ".join(f"{count:,}" for count in sorted(expected))
    return Verdict(right, reason="" if right else f"{call.tokens:,} tokens passed instead of {wanted}")


SUITE = Step()
