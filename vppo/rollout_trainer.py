"""TRL's GRPO trainer for rows with images and without; it keeps the pictures that a processor was given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vppo.batch import in_rows, with_entries, without_no_images
from vppo.errors import InputError
from vppo.images import rgb_prompt, rgb_row, rgb_tool
from vppo.joined_images import JoinedImages
from vppo.processors import placeholder_tokens
from vppo.rewards.checks import checked
from vppo.sampled_trainer import SampledTrainer


class RolloutTrainer(SampledTrainer):
    """`SampledTrainer` that shows a model pictures as a person sees them (upright, on white), and checks rewards.

    A subclass finds the pictures of each row of the current batch in `_pictures`, and empties it when it needs them no
    longer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pictures: list[Any] = []
        super().__init__(*args, **kwargs)
        for policy in (self.model, self.ref_model):
            if policy is not None:
                policy = self.accelerator.unwrap_model(policy)
                policy.register_forward_pre_hook(without_no_images, with_kwargs=True)
                if self.joins_forwards:
                    JoinedImages(policy, self.processing_class, self.max_over_ranks)
        self.reward_funcs = list(map(checked, self.reward_funcs, self.reward_func_names))
        if not self.use_vllm:
            self._suppress_placeholders()

    def _suppress_placeholders(self) -> None:
        """A sampled placeholder has no image: TRL leaves out one of them, and most families have several."""
        given = self.generation_kwargs.get("suppress_tokens") or []
        tokens = sorted({*given, *placeholder_tokens(self.model.config)})
        self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = tokens or None

    def generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, of rows whose pictures are as a person sees them."""
        shown = [rgb_row(row) for row in inputs]
        self._pictures = [row["images"] or [] if "images" in row else [row.get("image")] for row in shown]
        return with_entries(super().generate_and_score_completions(shown), len(inputs))

    def generate(self, prompts: list[Any]) -> Any:
        """TRL's, which also tells the images of messages, tools and environments."""
        generated = super().generate(list(map(rgb_prompt, prompts)))  # an environment may have added pictures
        *_, images, _ = generated
        if images is not None:
            self._pictures = [group or [] for group in images]
        return generated

    def tokenize_prompts(self, prompts: list[Any]) -> Any:
        """TRL's, where a prompt without images has an empty list of them: processors refuse its None."""
        prompt_ids, images, fields = super().tokenize_prompts(prompts)
        return prompt_ids, images and [group or [] for group in images], fields

    def tool_call_loop(self, *generated: Any) -> Any:
        """TRL's, whose tools show their pictures as a person sees them, and whose rows keep their own images."""
        for tools in self.tools_by_name:
            tools.update({name: rgb_tool(tool) for name, tool in tools.items()})
        *others, fields = generated  # the first of them are the prompts
        if in_rows(fields):
            fields = {**fields, "num_images": [1] * len(others[0])}  # here TRL counts entries by this name
        return super().tool_call_loop(*others, fields)

    def calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> Tensor:
        """TRL's; see `vppo.rewards.checks` for what a reward function may return."""
        rewards = super().calculate_rewards(inputs, *args)
        if rewards.isnan().all():
            names = ", ".join(self.reward_func_names)
            raise InputError(f"reward_funcs: {names}: gave None for all {len(rewards)} responses of a batch")
        return rewards
