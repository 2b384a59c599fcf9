"""verl's FSDP engine with a head that never makes logits, and that measures dependency in the same forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.transformers_compat import unpack_visual_output
from verl.utils.ulysses import get_ulysses_sequence_parallel_rank
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from vppo.errors import InputError
from vppo.heads import head_forward, logit_options
from vppo.options import SAMPLED
from vppo.perturbations import Perturbation, PixelLayout, perturb, seeded
from vppo.verl.losses import MEANS, SCALES, with_drift, with_micro_batch_scale, with_penalty
from vppo.verl.shared_prompts import SharedPrompts, groups_alike
from vppo_kernels import linear_divergence, linear_logprob, sampled_divergence

VENDOR = "vppo"
MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ASK, NLL, DRAW = "vppo_ask", "vppo_nll_coef", "vppo_draw"  # what the trainer tells its workers
LEFT_OUT = -1  # the draw of a row that is not to be scored
UNSCORED = -2.0  # the dependency of its tokens: a fall of a probability is at least -1, and a NaN stays an error


@dataclass(frozen=True)
class Ask:
    """What a pass over old log-probabilities is to measure beside them.

    Attributes:
        divergence: "kl", "reverse_kl", "jsd", "k3" or "prob_drop".
        perturbation: What the perturbed view does to an image; its patches are the model's own where `own_patches`.
        own_patches: Whether no patch size was given.
        seed, step: Of the draw, beside each row's own.
        check: Compare a sample of every divergence with its float64 definition.
        share: Pass a prompt of several rows once.
    """

    divergence: str
    perturbation: Perturbation
    own_patches: bool
    seed: int
    step: int
    check: bool
    share: bool


@dataclass(frozen=True)
class Places:
    """Where a micro-batch predicts response tokens, among the hidden states that this rank brings to the head.

    Attributes:
        wanted: `[tokens]` bool, of the rank's slice of the packed tokens.
        rows: `[wanted tokens]`, whose each of them is.
        targets: `[wanted tokens]` the predicted tokens.
        inside: `[rows, longest]` bool where the model was given padded rows, else None.
    """

    wanted: Tensor
    rows: Tensor
    targets: Tensor
    inside: Tensor | None

    @classmethod
    def of(cls, micro_batch: Any, output_args: dict[str, Any], rank: int, ranks: int) -> Places:
        """Of what `prepare_model_inputs` returned, for one of the ranks that share a sequence."""
        offsets = micro_batch["input_ids"].offsets()
        ends, lengths, responses = offsets[1:], offsets.diff(), micro_batch["responses"].offsets().diff()
        place = torch.arange(int(ends[-1]), device=ends.device)
        rows = torch.bucketize(place, ends, right=True)
        wanted = (place >= ends[rows] - responses[rows] - 1) & (place < ends[rows] - 1)
        padding = (0, output_args.get("pad_size", 0))  # behind the last row, where sequences are cut for ranks
        wanted, rows = (torch.nn.functional.pad(part, padding).chunk(ranks)[rank] for part in (wanted, rows))
        inside = None
        if not tu.get_non_tensor_data(micro_batch, "use_remove_padding", True):
            inside = torch.arange(int(lengths.max()), device=ends.device) < lengths[:, None]
        return cls(wanted, rows[wanted], output_args["input_ids_rmpad_rolled"][wanted], inside)

    def take(self, hidden: Tensor) -> Tensor:
        """`[wanted tokens, D]` of what the model hands to its head."""
        return (hidden[0] if self.inside is None else hidden[self.inside])[self.wanted]

    def put(self, values: Tensor) -> Tensor:
        """`[tokens, ...]` of `[wanted tokens, ...]`, 0 elsewhere."""
        return values.new_zeros(len(self.wanted), *values.shape[1:]).index_put((self.wanted,), values)


@EngineRegistry.register("language_model", backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"], vendor=VENDOR)
class VPPOEngine(FSDPEngineWithLMHead):
    """verl's engine. Its log-probabilities and entropies are those of response tokens, 0 at all others.

    Where the trainer asks for it (`ASK` in a micro-batch), a pass without gradients returns `dependency` too: a second
    forward of the rows with an image whose `DRAW` is not `LEFT_OUT`, with that image perturbed; `UNSCORED` at the
    tokens of all other rows. All ranks join that forward if one of them has such a row.

    Raises:
        InputError: The model is of a family whose images are not known to be perturbed rightly, or its head is not a
            linear layer, as with LoRA on it.
    """

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        family = model_config.hf_config.model_type
        if family not in MODELS:
            raise InputError(
                f"actor_rollout_ref.model.path: got a model of type {family!r}, takes one of {list(MODELS)} with verl"
            )
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self._updates = 0  # since log-probabilities were last asked for

    def _build_lora_module(self, module: Any) -> Any:
        module = super()._build_lora_module(module)
        head = module.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise InputError(
                f"actor_rollout_ref.model.target_modules: got a head of type {type(head).__name__}, takes modules "
                "other than the head with vppo, which reads its weight"
            )
        return module

    # -- verl's step ---------------------------------------------------------------------------------------------------

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        self._ask: Ask | None = tu.get_non_tensor_data(micro_batch, ASK, None) if forward_only else None
        if forward_only:
            self._updates = 0
        else:
            loss_function = self._training_loss(micro_batch, loss_function)
        with head_forward(self.module, self._at_head), self._text_alone(micro_batch):
            return super().forward_step(micro_batch, loss_function, forward_only)

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        self._window = data.get(MEANS, None)  # of a mini-batch
        return super().forward_backward_batch(data, loss_function, forward_only)

    def optimizer_step(self) -> Any:
        self._updates += 1
        return super().optimizer_step()

    def _training_loss(self, micro_batch: Any, loss_function: Callable[..., Any]) -> Callable[..., Any]:
        scales = tu.get_non_tensor_data(micro_batch, SCALES, None)
        if scales is not None:
            loss_function = with_micro_batch_scale(loss_function, self._window, *scales)
        coefficient = tu.get_non_tensor_data(micro_batch, NLL, 0.0)
        if coefficient:
            loss_function = with_penalty(loss_function, coefficient)
        return with_drift(loss_function) if self._updates else loss_function  # the first update finds none

    def prepare_model_inputs(self, micro_batch: Any) -> Any:
        inputs, output_args, self._places = self._prepare(micro_batch)
        self._options = logit_options(self.module, _temperature(micro_batch["temperature"]))
        return inputs, output_args

    def prepare_model_outputs(self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any) -> Any:
        columns = dict(zip(("log_probs", "entropy"), output.logits.unbind(-1), strict=True))
        if not tu.get_non_tensor_data(micro_batch, "calculate_entropy", False):
            del columns["entropy"]
        if self._ask is not None:
            columns["dependency"] = self._places.put(self._dependency(micro_batch, self._ask))
            del self._clean
        offsets, padding = micro_batch["input_ids"].offsets(), output_args.get("pad_size", 0)
        whole = {name: self._gather_and_unpad_packed(values, padding) for name, values in columns.items()}
        return {name: torch.nested.nested_tensor_from_jagged(values, offsets) for name, values in whole.items()}

    def _prepare(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any], Places]:
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        rank, ranks = 0, 1
        if self.use_ulysses_sp:
            rank, ranks = get_ulysses_sequence_parallel_rank(), self.ulysses_sequence_parallel_size
        return inputs, output_args, Places.of(micro_batch, output_args, rank, ranks)

    def _at_head(self, head: Any, hidden: Tensor) -> Tensor:
        """`[tokens, 2]` log-probability and entropy, in place of logits, where sharding looks for gradients."""
        rows = self._places.take(hidden)
        values = linear_logprob(rows, head.weight, self._places.targets, _bias(head), **self._options)
        if self._ask is not None:
            self._clean = rows, values.logprobs
        return self._places.put(torch.stack([values.logprobs, values.entropy], -1))

    @contextmanager
    def _text_alone(self, micro_batch: Any) -> Iterator[None]:
        """verl passes an empty image beside text alone, so that all ranks join; Qwen2.5-VL's breaks in verl 0.9.

        It takes the mean of what the vision tower returns, which transformers 5 has made an object.
        """
        family = self.model_config.hf_config.model_type
        if family == "qwen3_vl" or any("pixel_values" in inputs for inputs in _images(micro_batch)):
            yield  # verl unpacks what Qwen3-VL's returns
            return
        tower = next(module for name, module in self.module.named_modules() if name.rpartition(".")[2] == "visual")
        handle = tower.register_forward_hook(lambda *args: unpack_visual_output(args[-1])[0])
        try:
            yield
        finally:
            handle.remove()

    # -- the perturbed view --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _dependency(self, micro_batch: Any, ask: Ask) -> Tensor:
        """`[wanted tokens]` float32 in nats; `UNSCORED` at those of rows that are not scored."""
        hidden, logprobs = self._clean
        dependency = torch.full_like(logprobs, UNSCORED)
        images, draws = _images(micro_batch), micro_batch[DRAW].tolist()
        scored = [row for row, draw in enumerate(draws) if draw != LEFT_OUT and "pixel_values" in images[row]]
        if not self._anywhere(bool(scored)):
            return dependency
        with ExitStack() as stack:
            groups = [[row] for row in scored]
            if ask.share and not self.use_ulysses_sp:
                groups = self._groups(micro_batch, scored, draws, images)
            if len(groups) < len(scored):
                passed = scored
                shown = [self._perturbed(images[group[0]], draws[group[0]], ask) for group in groups]
                shared = SharedPrompts(self.module, micro_batch, groups, shown)
                inputs, take = shared.inputs, shared.take
                stack.enter_context(shared.attending())
            else:
                passed = scored or [int(micro_batch["input_ids"].offsets().diff().argmin())]  # the least that joins
                if self.use_ulysses_sp:
                    passed = list(range(len(draws)))  # ranks share sequences as they were cut for the clean view
                view = tu.index_select_tensor_dict(micro_batch, passed)
                perturbed = [
                    self._perturbed(images[row], draws[row], ask) if row in scored else images[row] for row in passed
                ]
                tu.assign_non_tensor_stack(view, "multi_modal_inputs", perturbed)
                inputs, _, places = self._prepare(view)
                take = places.take
                stack.enter_context(self._text_alone(view))
            same = torch.isin(self._places.rows, torch.tensor(passed, device=hidden.device))
            found: list[Tensor] = []

            def at_head(head: Any, perturbed: Tensor) -> None:
                rows, weight, bias = take(perturbed), head.weight, _bias(head)
                if ask.divergence in SAMPLED:
                    targets = self._places.targets[same]
                    after = linear_logprob(rows, weight, targets, bias, check=ask.check, **self._options).logprobs
                    found.append(sampled_divergence(logprobs[same], after, kind=ask.divergence))
                else:
                    values = linear_divergence(
                        hidden[same], rows, weight, bias, kind=ask.divergence, check=ask.check, **self._options
                    )
                    found.append(values.divergence)

            stack.enter_context(head_forward(self.module, at_head))
            self.module(**inputs, use_cache=False)
        dependency[same] = found[0].to(dependency)
        left_out = ~torch.isin(self._places.rows, torch.tensor(scored, dtype=torch.long, device=hidden.device))
        return dependency.masked_fill(left_out, UNSCORED)

    def _groups(
        self, micro_batch: Any, rows: list[int], draws: list[int], images: Sequence[dict[str, Any]]
    ) -> list[list[int]]:
        """Rows in groups whose prompt and perturbed images are the same; each by itself where nothing can be shared."""
        image = self.model_config.hf_config.image_token_id
        counts = micro_batch["responses"].offsets().diff().tolist()
        prompts = []
        for tokens, count in zip(micro_batch["input_ids"].unbind(), counts, strict=True):
            if (tokens[-count - 1 :] == image).any():  # a tool has shown another one
                return [[row] for row in rows]
            prompts.append(tokens[:-count])
        return groups_alike(rows, draws, prompts, images)

    def _anywhere(self, wanted: bool) -> bool:
        """Whether it is wanted on any rank; the weights' shards make every forward one of all ranks."""
        flag = torch.tensor(float(wanted), device=self._places.wanted.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _perturbed(self, inputs: dict[str, Any], draw: int, ask: Ask) -> dict[str, Any]:
        perturbation = ask.perturbation
        if ask.own_patches:
            perturbation = Perturbation(**{**vars(perturbation), "patch_size": self._layout.patch_size})
        generator = seeded(ask.seed, ask.step, draw)
        pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
        return {**inputs, "pixel_values": perturb(pixels, self._layout, perturbation, generator, grid=grid)}

    @cached_property
    def _layout(self) -> PixelLayout:
        return PixelLayout.of(self.model_config.get_processor().image_processor)


def _images(micro_batch: Any) -> Sequence[dict[str, Any]]:
    """What each row's processor made of its images; empty for text alone."""
    entries = micro_batch.get("multi_modal_inputs", None)
    if entries is None:
        return [{}] * len(micro_batch)
    return [getattr(entry, "data", entry) or {} for entry in entries]


def _bias(head: Any) -> Tensor | None:
    return getattr(head, "bias", None)


def _temperature(given: Any) -> float:
    """One for the whole micro-batch.

    Raises:
        InputError: Rows differ in theirs.
    """
    if isinstance(given, Tensor):
        values = given.unique().tolist()
        if len(values) != 1:
            raise InputError(f"temperature: got {values} in one micro-batch, takes one for all of its rows with vppo")
        return float(values[0])
    return float(given)
