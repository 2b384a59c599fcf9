"""The training pass over both views: one sweep at the head gives what the loss needs of either, with its gradient.

The model runs twice through TRL's fused head, first with the perturbed images, then with its own. The first run keeps
the hidden states that predict the responses, the second compares its own with them in the head's forward. What is found
comes back in the model's own output, so that whatever shards or wraps the model sees two ordinary forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.heads import head_forward
from vppo.methods.papo import sampled_views
from vppo.trl_seams import HEAD_ARGUMENTS, exchangeable_head, exchanged_head
from vppo_kernels import linear_divergence
from vppo_kernels.statistics import DivergenceOutput

KINDS = ("kl", "k3")  # exact over the vocabulary, and the published estimate from the sampled token


class Rows(Protocol):
    """Rows of a batch as a model's forward takes them, and where in its output the responses are."""

    inputs: dict[str, Any]
    labels: Tensor

    def spread(self, values: Tensor) -> Tensor: ...

    def masked(self) -> AbstractContextManager[None]: ...


class WholeRows:
    """All rows of a batch, each with its prompt; see `vppo.packed_rows.PackedRows`."""

    def __init__(self, batch: Batch, view: View) -> None:
        rows = range(len(batch))
        self.batch, self.length = batch, batch.longest(rows)
        self.inputs = batch.whole(rows, view)
        ids, given = self.inputs["input_ids"], self.inputs["attention_mask"].bool()
        self.labels = torch.full_like(ids, -100)
        responses = slice(-self.length - 1, -1)
        self.labels[:, responses] = ids[:, -self.length :].masked_fill(~given[:, -self.length :], -100)

    def spread(self, values: Tensor) -> Tensor:
        """`[B, T]` of `[B, L]`: 0 outside the responses."""
        found = values.new_zeros(self.batch.completion_ids.shape)
        found[:, : self.length] = values[:, -self.length - 1 : -1]
        return found * self.batch.completion_mask.to(found)

    def masked(self) -> AbstractContextManager[None]:
        """Nothing: an ordinary mask is among the inputs."""
        return nullcontext()


class _PairedHead:
    """What TRL calls `.apply` of: it keeps the first view's hidden states, and compares the second one's with them."""

    def __init__(self, model: Any, kind: str) -> None:
        self.model, self.kind = model, kind
        self.perturbed: Tensor | None = None

    @torch.compiler.disable  # the exchange of a forward is not to be traced; what is inside are kernels already
    def apply(self, *args: Any) -> tuple[Tensor | None, ...]:
        given = dict(zip(HEAD_ARGUMENTS, args, strict=True))
        hidden, perturbed = given["hidden"], self.perturbed
        if perturbed is None:
            self.perturbed = hidden
            return hidden[:, 0], hidden[:, 0], None, None, None  # not read

        softcap = given["final_logit_softcapping"]

        def at_head(head: Any, hidden: Tensor) -> Tensor:
            found = linear_divergence(
                hidden,
                perturbed,
                head.weight,
                getattr(head, "bias", None),
                targets=given["targets"],
                temperature=float(given["temperature"]),
                softcap=None if softcap is None else float(softcap),
                logit_scale=float(given["logit_scale"]),
            )
            assert found.logprobs is not None and found.logprobs_perturbed is not None
            views = found if self.kind == "kl" else sampled_views(found.logprobs, found.logprobs_perturbed)
            return torch.stack([found.logprobs, found.entropy, *views[:3]], dim=-1)

        with head_forward(self.model, at_head):
            found = self.model.get_output_embeddings()(hidden)
        # TRL brings all five back to their tokens, whatever its names for the last three are
        return found.unbind(-1)


@contextmanager
def _paired_head(model: Any, kind: str) -> Iterator[None]:
    pair = _PairedHead(model, kind)
    with exchanged_head(lambda own: pair):
        yield


def refusal(gathered: bool) -> str:
    """Why there can be no pass over both views; "" if nothing speaks against it.

    Args:
        gathered: Whether the backward, too, will find the head's weight whole.
    """
    if missing := exchangeable_head():
        return f"TRL lacks {missing}"
    return "" if gathered else "ZeRO-3 does not gather the head's weight in the backward; FSDP does"


def two_view_pass(
    forward: Callable[..., Any], model: Any, rows: Callable[[View], Rows], clean: View, perturbed: View, kind: str
) -> tuple[Tensor, Tensor, DivergenceOutput]:
    """Both views of a micro-batch's responses, in the head's one sweep.

    Args:
        forward: The model, or what wraps it; TRL has given it its fused head.
        model: The same, unwrapped.
        rows: The rows as they pass under a view: the same rows and tokens in the same order under either.
        clean, perturbed: The views.
        kind: One of `KINDS`.

    Returns:
        Log-probabilities and entropies of the clean view, and both views' results as `kind` has them, without
        log-probabilities; all `[B, T]` float32 in nats, 0 outside the responses, and differentiable in all that the
        model computes of either view.
    """
    with _paired_head(model, kind):
        for view in (perturbed, clean):
            passing = rows(view)
            with passing.masked():
                output = forward(**passing.inputs, shift_labels=passing.labels, fused_lm_head=True)
    fields = output.log_probs, output.entropy, output.log_sum_sq_probs, output.mean_logits, output.is_top1
    logprobs, entropy, divergence, entropy_clean, entropy_perturbed = map(passing.spread, fields)
    return logprobs, entropy, DivergenceOutput(divergence, entropy_clean, entropy_perturbed, None, None)
