"""One step of a run, simulated: the trainer's own passes on a model that has shapes and no values."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import _sharding_prop

from vppo.batch import Batch, View
from vppo.exchange import exchanged
from vppo.fused_head import fused_head
from vppo.logprobs import packed_logprobs
from vppo.packed_rows import PackedRows, refusal
from vppo.plan.fake import Fake, fake_processes
from vppo.plan.memory import Peak, ShardedMemory, WholeMemory
from vppo.plan.model import PRECISIONS, Depth, build, kernels_of_attention, shard, stacks
from vppo.plan.rollouts import generation
from vppo.plan.settings import Settings
from vppo.prefix_sharing import ResponsePasses, quiet
from vppo.scoring import score

PHASES = ("scoring", "training pass", "optimizer")
Place = tuple[Any, ...]  # the phase, then which layer is at work in which direction
EDGE = 2  # layers at either end of a stack that are places of their own; those between lie between them


@dataclass(frozen=True)
class Simulated:
    """What a step needs.

    Attributes:
        peaks: Bytes by category, of each place.
        products: Floating-point operations on one GPU: "scoring" of a generation, "training pass" of a micro-batch.
        parameters: Of the whole model, and those that are trained.
    """

    peaks: dict[Place, Peak]
    products: dict[str, float]
    parameters: tuple[float, float]


def simulate(settings: Settings, depth: Depth, scoring: bool = True) -> Simulated:
    """One step with the settings, of a model with so many layers; on wish without what precedes its training.

    Raises:
        InputError: This process belongs to a group of processes.
    """
    mode = Fake()
    with ExitStack() as held:
        held.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        held.enter_context(kernels_of_attention())
        # DTensor makes whole tensors to know shapes; in a fake mode of their own the tracker leaves them out
        held.enter_context(exchanged(_sharding_prop, detect_fake_mode=lambda: None))
        if settings.gpus > 1:
            held.enter_context(fake_processes(settings.gpus))
        return _Step(settings, depth, mode).run(scoring)


class _Step:
    def __init__(self, settings: Settings, depth: Depth, mode: Fake) -> None:
        self.settings, self.mode = settings, mode
        self.model = build(settings, depth, mode)
        counts = [(p.numel(), p.numel() * p.requires_grad) for p in self.model.parameters()]
        self.parameters = float(sum(a for a, _ in counts)), float(sum(b for _, b in counts))
        self.stacks = stacks(self.model)
        self.sharded = settings.gpus > 1
        if self.sharded:
            self.model = shard(self.model, settings.sharding, settings.precision, mode)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(settings.optimizer, trained)
        self.tracker: Any = (ShardedMemory if self.sharded else WholeMemory)(self.model, self.optimizer)

    def run(self, scoring: bool) -> Simulated:
        settings, tracker = self.settings, self.tracker
        inputs = generation(settings, settings.rows, self.mode)
        with self.mode, tracker:
            self._watch()
            for value in inputs.values():
                if isinstance(value, Tensor):
                    tracker.mark(value, "Inputs" if self.sharded else "Other")
            self._at("optimizer")
            self._fill_gradients()
            self._update()
            self.optimizer.zero_grad()
            if scoring and settings.divergence is not None and settings.images:
                self._score(inputs)
            self._train(inputs)
            self._at("optimizer")
            self._update()
        return Simulated(tracker.peaks, tracker.products, self.parameters)

    # -- phases ------------------------------------------------------------------------------------------------------

    def _score(self, inputs: dict[str, Any]) -> None:
        settings, batch = self.settings, Batch(inputs)
        self._at("scoring")
        rows = list(range(len(batch)))
        firsts = [row // settings.group * settings.group for row in rows]
        clean = View(firsts)
        one = rows if settings.own_views else firsts
        keys = [draw * len(batch) + key for draw in range(settings.draws) for key in one]
        passes = self._passes()
        known: Tensor | None = None
        if settings.old_pass:  # whose hidden states are kept; the pass itself holds less than the training pass
            width = settings.config.get_text_config().hidden_size
            dtype = PRECISIONS.get(settings.precision, getattr(torch, settings.dtype))
            known = torch.empty(len(rows), settings.response_tokens, width, dtype=dtype)
        pixels = {key: torch.empty_like(batch.split["pixel_values"][key % len(batch)]) for key in keys}
        perturbed = View(keys, pixels)
        portions = passes.portions(batch, rows, clean)
        with quiet(self.model), self._autocast():
            score(
                passes,
                batch,
                portions[0],
                clean,
                perturbed,
                kind=str(settings.divergence),
                options={"temperature": 1.0, "logit_scale": 1.0, "softcap": None},
                hidden_clean=known,
            )
        self.tracker.products["scoring"] *= len(rows) / len(portions[0])

    def _train(self, inputs: dict[str, Any]) -> None:
        settings = self.settings
        self._at("training pass")
        size = settings.micro_batch
        count = -(-size // settings.group) * settings.group  # as many rows as make whole prompts
        batch = Batch({name: _first(value, count, len(inputs["prompt_ids"])) for name, value in inputs.items()})
        rows = list(range(size))
        view = View([row // settings.group * settings.group for row in range(len(batch))])
        passes = self._passes()
        several = settings.accumulation > 1
        whole = self.sharded and several and not settings.sharding.sync
        if whole:  # the first micro-batches leave whole gradients behind, which the last one reduces
            self.model.set_requires_gradient_sync(False)
            self._micro_batch(batch, passes, rows, view)
            self.model.set_requires_gradient_sync(True)
            self.tracker.products["training pass"] = 0.0
        elif several:
            self._fill_gradients()
        self._at("training pass")
        self._micro_batch(batch, passes, rows, view)

    def _micro_batch(self, batch: Batch, passes: ResponsePasses, rows: list[int], view: View) -> None:
        with self._autocast():
            logprobs = self._logprobs(batch, passes, rows, view)
        (-logprobs.sum()).backward()

    def _logprobs(self, batch: Batch, passes: ResponsePasses, rows: list[int], view: View) -> Tensor:
        """As the trainer computes them: of packed rows where the model takes these, else of whole ones."""
        with fused_head(self.model, gathered=True):
            if self._packs:
                packed = PackedRows(self.model, batch, passes.packs(batch, rows, view), view)
                return packed_logprobs(self.model, packed)[0]
            given = batch.whole(rows, view)
            labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
            labels[:, : -batch.longest(rows)] = -100
            found: Tensor = self.model(**given, labels=labels, fused_lm_head=True).log_probs
            return found

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()

    # -- pieces ------------------------------------------------------------------------------------------------------

    @property
    def _packs(self) -> bool:
        """Whether rows of a prompt pass as one: of a generation that has several, all do."""
        several = min(self.settings.group, self.settings.rows) > 1
        return self.settings.divergence is not None and self.settings.sharing != "off" and several and not self._refusal

    @property
    def _refusal(self) -> str:
        return refusal(self.model)

    def _passes(self) -> ResponsePasses:
        """Which compare nothing: there are no values."""
        passes = ResponsePasses(self.model, sharing=self.settings.sharing, memory=self.settings.scoring_memory)
        passes._tried = True
        if self._refusal:
            del passes._ways[:1]
        return passes

    def _autocast(self) -> Any:
        dtype = PRECISIONS.get(self.settings.precision)
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)

    def _fill_gradients(self) -> None:
        """Gradients as an earlier micro-batch leaves them."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                self.tracker.mark(parameter.grad, "Sharded Grad" if self.sharded else "Gradient")

    def _at(self, *place: Any) -> None:
        self.tracker.place = place
        self.tracker.look()

    def _watch(self) -> None:
        """Tells the tracker which layer is at work."""
        for name, layers in self.stacks.items():
            for index, layer in enumerate(layers):
                near = index if index < EDGE else index - len(layers) if index >= len(layers) - EDGE else "between"
                layer.register_forward_pre_hook(partial(self._before, (name, near)))
                layer.register_forward_hook(partial(self._after, (name, near)))
        if self.sharded:
            self.model.register_forward_pre_hook(lambda *_: self.tracker.reset_mod_stats(), prepend=True)

    def _before(self, layer: Place, *_: Any) -> None:
        self._at(self.tracker.place[0], *layer, "backward" if self.tracker._mod_tracker.is_bw else "forward")

    def _after(self, layer: Place, module: Any, args: Any, output: Any) -> None:
        phase, bw = self.tracker.place[0], self.tracker._mod_tracker.is_bw
        self._at(phase, *layer, "backward" if bw else "after")
        hidden = output if isinstance(output, Tensor) else output[0]
        if not bw and hidden.requires_grad:
            hidden.register_hook(lambda _: self._at(phase, *layer, "backward"))


def _optimizer(name: str, parameters: list[Any]) -> Any:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3)
    return torch.optim.AdamW(
        parameters, lr=1e-3, fused=name == "adamw_torch_fused", foreach=name == "adamw_torch" or None
    )


def _first(value: Any, count: int, rows: int) -> Any:
    """The part of a batch's entry that belongs to its first rows."""
    if isinstance(value, Tensor):
        return value[: len(value) * count // rows]
    return value[:count]
