"""TRL's GRPO trainer that keeps the hidden states of the clean view from passes which TRL makes anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vppo.saved_trainer import SavedTrainer


class ListeningTrainer(SavedTrainer):
    """`SavedTrainer` that saves the clean view a pass of its own where TRL has made one.

    A subclass turns this on for a generation batch by setting `_recorded` to an empty list (it is None otherwise), asks
    `_take_recorded` for what was kept, and empties both lists afterwards.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded: list[Tensor] | None = None  # while TRL scores
        self._generated: list[Tensor] = []  # while it generates
        super().__init__(*args, **kwargs)
        self._has_dropout = _has_dropout(self.model)

    def generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's. The hidden states that the head is given while sampling are those of the clean view, and are kept.

        Only in float32, where decoding token by token and passing a whole response differ in the last digits alone.
        """
        exact = self.model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        if self._recorded is None or self._has_dropout or self.joins_forwards or not exact:
            return super().generate_single_turn(*args, **kwargs)
        steps: list[Tensor] = []
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, inputs: steps.append(inputs[0][:, -1:].clone()))
        try:
            result = super().generate_single_turn(*args, **kwargs)
        finally:
            hook.remove()
        if len({len(step) for step in steps}) == 1:
            self._generated.append(torch.cat(steps, dim=1))
        return result

    @contextmanager
    def _recording(self, keep: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Keeps the hidden states that predict the responses' tokens, from the first pass within the block.

        Args:
            keep: Takes them out of the last layer's `[B, T, D]`; they are copied, so that the rest is freed.
        """
        recorded = self._recorded
        if recorded is None or recorded or self._has_dropout:
            yield
            return

        model = self.accelerator.unwrap_model(self.model)
        base = getattr(model, "get_base_model", lambda: model)().base_model

        def copy(module: Any, args: Any, output: Any) -> None:
            recorded.append(keep(output.last_hidden_state).clone())

        hook = base.register_forward_hook(copy)
        try:
            yield
        finally:
            hook.remove()

    def _take_recorded(self, output: dict[str, Any]) -> Tensor | None:
        """`[B, T, D]` hidden states of the clean view, if a pass of TRL's has given them for every token."""
        shape = output["completion_ids"].shape
        # without old log-probabilities it was the reference policy's pass
        if self._recorded and "old_per_token_logps" in output and sum(map(len, self._recorded)) == shape[0]:
            return torch.cat(self._recorded)
        whole = not self.tools and self.rollout_func is None  # those put more into a response than one sampling
        if whole and len(self._generated) == 1 and self._generated[0].shape[:2] == shape:
            return self._generated[0]
        return None


def _has_dropout(model: Any) -> bool:
    """Whether a pass in training mode may be random: by a module, or by a rate that attention reads from the config."""

    def rates(config: dict[str, Any]) -> Iterator[float]:
        for name, value in config.items():
            if isinstance(value, dict):
                yield from rates(value)
            elif "drop" in str(name) and isinstance(value, (int, float)):
                yield value

    return any(rate > 0 for rate in rates(model.config.to_dict())) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )
