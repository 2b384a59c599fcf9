"""TRL's GRPO trainer whose sampler is given the trainer's prompts, and is checked to draw from the trainer's model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from vppo import vllm_engine
from vppo.checkpoints import saved_step
from vppo.config import VPPOConfig
from vppo.errors import InputError
from vppo.listening_trainer import ListeningTrainer
from vppo.processors import placeholder_tokens
from vppo.sampler_guard import Gap, SamplerGuard, tolerance
from vppo.trl_seams import engine_options
from vppo.vllm_prompts import TextOnly, Unexpanded, first_difference

RESHAPING = (  # in `generation_kwargs`
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "top_p", "top_k", "min_p"),
    *("logit_bias", "bad_words", "min_tokens", "allowed_token_ids", "structured_outputs"),
)
PATIENCE = 40.0  # seconds in which a server that has answered before must answer again


class SampledTrainer(ListeningTrainer):
    """`ListeningTrainer` with vLLM as TRL intends it; see `vppo.vllm_prompts` and `vppo.sampler_guard`.

    Raises:
        InputError: vLLM is missing, of another version than TRL supports, or its server does not answer.
    """

    processing_class: Any
    _train_logprobs: Tensor | None

    def __init__(self, model: Any, reward_funcs: Any, args: VPPOConfig, **kwargs: Any) -> None:
        options: dict[str, Any] = {}
        if args.use_vllm:
            vllm_engine.check_version()
            options = _image_options(model, args, kwargs.get("processing_class"))
        self._unexpanded = Unexpanded()
        self._difference: str | None = None  # between a prompt of the batch at hand and the one that vLLM used
        with engine_options(**options):
            super().__init__(model, reward_funcs, args, **kwargs)
        self._colocated = self.use_vllm and self.vllm_mode == "colocate"
        if self.use_vllm:
            self._set_up_vllm()
        given = self.args.sampler_tolerance
        self._guard = SamplerGuard(
            self.args.sampler_guard,
            tolerance(*self._dtypes()) if given is None else given,
            top_p=self.top_p,
            incomparable=self._incomparable(),
        )

    def _set_up_vllm(self) -> None:
        generation = self.vllm_generation
        # a sampled placeholder has no image
        bias = {**generation.generation_kwargs.get("logit_bias", {})}
        bias.update({token: -100.0 for token in placeholder_tokens(self.model.config)})
        generation.generation_kwargs = {**generation.generation_kwargs, "logit_bias": bias}
        self.hand_over(sync_weights=self._sync_weights)
        if self._colocated:
            self.hand_over(generate=self._generate_colocated)
        elif self.accelerator.is_main_process:
            vllm_engine.notice_silence(generation.vllm_client.session)

    def _sync_weights(self, sync_weights: Any) -> None:
        """TRL's; then vLLM forgets what the vision tower's last weights have made of images that come again."""
        sync_weights()
        if self._colocated:
            self.vllm_generation.llm.llm_engine.reset_encoder_cache()
        elif self.accelerator.is_main_process:
            client = self.vllm_generation.vllm_client
            client.session.post(f"{client.base_url}/reset_encoder_cache")

    def _dtypes(self) -> list[Any]:
        """Of the trainer, and of the sampler where it is another."""
        mixed = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
        dtypes = [self.model.dtype, mixed.get(self.accelerator.mixed_precision)]
        if self._colocated:
            dtypes.append(self.vllm_generation.llm.llm_engine.model_config.dtype)
        elif self.use_vllm:  # each process decides alike, and the first one alone has a client
            dtypes.append(vllm_engine.server_dtype(self.args))
        return dtypes

    def _incomparable(self) -> str | None:
        """What changes the sampler's log-probabilities and not the trainer's."""
        changes = {
            **{name: name in (self.args.generation_kwargs or {}) for name in RESHAPING},
            "repetition_penalty": self.repetition_penalty != 1.0,
            "top_k": (self.top_k or 0) > 0,  # vLLM takes -1, too, for all
            "min_p": bool(self.min_p),
            "vllm_structured_outputs_regex": self.args.vllm_structured_outputs_regex is not None,
        }
        names = [name for name, changed in changes.items() if changed]
        return f"{', '.join(names)} may change the sampler's probabilities and not the trainer's" if names else None

    def describe_sampler(self) -> str:
        """What samples, in which versions, and how it is watched."""
        versions = ["trl", "transformers", "torch"]
        found = ", ".join(f"{name} {metadata.version(name)}" for name in versions)
        if not self.use_vllm:
            return f"Sampler: the model's own generate ({found})"
        where = "in this process" if self._colocated else f"a server at {vllm_engine.server_url(self.args)}"
        guard = self._guard
        return (
            f"Sampler: vLLM {vllm_engine.installed()}, {self.vllm_mode}, {where} ({found}); sampler_guard: "
            f"{guard.guard}, at {guard.tolerance:g} nats a token"
        )

    # -- prompts -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _text_only(self) -> Iterator[None]:
        """TRL renders chat templates as they stand."""
        processor = self.processing_class
        self.processing_class = TextOnly(processor)
        try:
            yield
        finally:
            self.processing_class = processor

    def tokenize_prompts(self, prompts: list[Any]) -> Any:
        """TRL's; what vLLM is to be given instead is remembered."""
        prompt_ids, images, fields = super().tokenize_prompts(prompts)
        if self._colocated and images is not None:
            with self._text_only():
                plain, *_ = super().tokenize_prompts(prompts)
            self._unexpanded.tell_prompts(prompt_ids, plain)
        return prompt_ids, images, fields

    def get_tool_suffix_ids(self, tool_messages: list[Any]) -> list[int]:
        """TRL's; what vLLM is to be given instead is remembered."""
        ids = super().get_tool_suffix_ids(tool_messages)
        if self._colocated and self.shows_images:
            with self._text_only():
                self._unexpanded.tell_results(ids, super().get_tool_suffix_ids(tool_messages))
        return ids

    def _generate_colocated(self, generate: Any, prompts: list[Any], images: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's own call of vLLM, with one placeholder an image; and whether vLLM used the trainer's prompts."""
        shown = [None] * len(prompts) if images is None else [group or None for group in images]
        plain = [ids if group is None else self._unexpanded(ids) for ids, group in zip(prompts, shown, strict=True)]
        generated = generate(plain, None if images is None else shown, *args, **kwargs)
        for row, (used, ids) in enumerate(zip(generated[0], prompts, strict=True)):
            known = shown[row] is None or plain[row] != list(ids)  # else TRL has handed over unexpanded prompts itself
            if known and self._difference is None:
                self._difference = first_difference(row, used, ids, self.processing_class.tokenizer)
        return generated

    # -- a server that is gone ---------------------------------------------------------------------------------------

    def generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's. A server that no longer answers ends the run, with a checkpoint, where it would wait for ever."""
        if not self.use_vllm or self._colocated:
            return super().generate_single_turn(*args, **kwargs)
        url = vllm_engine.server_url(self.args)
        main = self.accelerator.is_main_process
        gone = torch.tensor([int(main and not vllm_engine.answers(url, PATIENCE))], device=self.accelerator.device)
        if self.accelerator.gather(gone).any():
            raise InputError(self._left_by_server(url))
        try:
            return super().generate_single_turn(*args, **kwargs)
        except OSError as error:  # requests' and the connection's own
            if self.accelerator.num_processes > 1:
                raise InputError(f"the vLLM server at {url} no longer answers: {error}") from error
            raise InputError(self._left_by_server(url)) from error

    def _left_by_server(self, url: str) -> str:
        """Saves a checkpoint, and says where."""
        step = self.state.global_step
        folder = f"{self.args.output_dir}/checkpoint-{step}"
        if step and saved_step(folder) is None and self.model.training:
            self.save_checkpoint(self.model, trial=None)
        kept = f"; the run can go on from {folder}" if saved_step(folder) == step else ""
        return f"the vLLM server at {url} no longer answers{kept}"

    # -- the guard ---------------------------------------------------------------------------------------------------

    def generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's; then the sampler's log-probabilities against those of TRL's pass, where it makes one here."""
        self._unexpanded.clear()
        self._difference = None
        output = super().generate_and_score_completions(inputs)
        if "old_per_token_logps" in output:
            self._compare(output, output["old_per_token_logps"])
        return output

    def compute_micro_batch_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's; the training pass is the first over these tokens where TRL has made none before it."""
        loss = super().compute_micro_batch_loss(model, inputs)
        if self.model.training and "old_per_token_logps" not in inputs and self._train_logprobs is not None:
            self._compare(inputs, self._train_logprobs.detach())
        return loss

    def _compare(self, batch: dict[str, Any], trained: Tensor) -> None:
        sampled = batch.get("sampling_per_token_logps")
        if sampled is None:  # the trainer's own model has sampled: there is no other to compare it with
            return
        mask = batch["completion_mask"].bool()
        if "tool_mask" in batch:
            mask &= batch["tool_mask"].bool()
        gap = Gap.gather(self.accelerator, sampled, trained, mask)
        difference, self._difference = self._difference, None
        log = self.metrics_of()
        if gap.tokens:  # not where every response is cut off and masked: NaN would be the mean of the whole step
            log["vppo/sampler_gap_mean"].append(gap.mean)
            log["vppo/sampler_gap_max"].append(gap.maximum)
        self._guard.check(self.accelerator, self.state.global_step, gap, difference)


def _image_options(model: Any, args: VPPOConfig, processor: Any) -> dict[str, Any]:
    """Further options of vLLM's engine; a server is asked whether it has them."""
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    limits = vllm_engine.image_options(name, processor, trust_remote_code=args.trust_remote_code)
    if args.vllm_mode == "server":
        vllm_engine.check_server(args, vllm_engine.image_limits(processor), differ=bool(limits))
        return {}
    return {"mm_processor_kwargs": limits} if limits else {}
