"""How many rows the head has multiplied, counted where the products are made.

A product is a row of hidden states times the whole weight of the head, or as much work: the gradient of a row, or its
part of the weight's gradient. A token's log-probability takes one and, if the token carries gradient, its backward
three more: its logits once more, and both gradients. Sampling is not counted: there the head multiplies every token
once, whatever is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from vppo.exchange import exchanged
from vppo.trainer import VPPOTrainer
from vppo_kernels.linear_head import LinearHead

A_TOKEN = 4  # products of the training pass, if the token carries gradient
PREFIX = "head/"


@dataclass
class HeadProducts:
    """Products of the head, and the tokens that they were made for.

    Attributes:
        scoring: Of the views that are compared, to measure dependency, or of one to measure entropy.
        forward: Of response tokens, for their log-probabilities in training.
        backward: Of tokens with gradient.
        tokens: Response tokens that were sampled.
        active: Those of them that carry gradient.
    """

    scoring: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    tokens: float = 0.0
    active: float = 0.0

    @classmethod
    def of(cls, metrics: Sequence[Mapping[str, Any]]) -> HeadProducts:
        """The sums over the steps that `CountingTrainer` has logged; all 0 where there are none."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: float(sum(row.get(PREFIX + name) or 0.0 for row in metrics)) for name in names})

    @property
    def training(self) -> float:
        """Products of the training pass."""
        return self.forward + self.backward

    @property
    def left_out(self) -> float:
        """Products that the training pass would have made besides, had every token carried gradient."""
        return A_TOKEN * self.tokens - self.training


class CountingTrainer(VPPOTrainer):
    """`VPPOTrainer` that also logs the products of its head, a step each, as `head/scoring`, `head/forward`, ...

    One process, and one update from each generation batch. What TRL's own head multiplies, where it stands in for this
    library's, is not counted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._products = HeadProducts()
        self._in_loss = False
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's: it samples, scores, and takes the gradient."""
        self._products = HeadProducts()
        with self._counting():
            loss: Tensor = super().training_step(*args, **kwargs)
        for name, value in asdict(self._products).items():
            self.metrics_of("train")[PREFIX + name].append(value)
        return loss

    def compute_micro_batch_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's."""
        mask, advantages = inputs["completion_mask"].bool(), inputs["advantages"]
        with_gradient = (advantages if advantages.dim() == 2 else advantages.unsqueeze(1)) != 0
        self._products.tokens += int(mask.sum())
        self._products.active += int((mask & with_gradient).sum())
        self._in_loss = True
        try:
            return super().compute_micro_batch_loss(model, inputs)
        finally:
            self._in_loss = False

    @contextmanager
    def _counting(self) -> Iterator[None]:
        products, make_logits, accumulate = self._products, LinearHead.logits, LinearHead.accumulate

        def share(head: LinearHead, rows: slice, columns: slice) -> float:
            return head.views * (rows.stop - rows.start) * (columns.stop - columns.start) / head.columns

        def counted_logits(head: LinearHead, rows: slice, columns: slice, out: Tensor) -> Tensor:
            done = share(head, rows, columns)
            if head.shares_columns:  # it collects the weight's gradient
                products.backward += done
            elif self._in_loss:
                products.forward += done
            else:
                products.scoring += done
            return make_logits(head, rows, columns, out)

        def counted_accumulate(
            head: LinearHead, rows: slice, columns: slice, grad: Tensor, of_columns: bool = True
        ) -> None:
            products.backward += (1 + of_columns) * share(head, rows, columns)
            accumulate(head, rows, columns, grad, of_columns)

        with exchanged(LinearHead, logits=counted_logits, accumulate=counted_accumulate):
            yield
