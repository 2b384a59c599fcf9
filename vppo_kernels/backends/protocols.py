"""The contract: what a backend is asked for. mypy holds every module that `backends/__init__.py` hands out to it.

`TileOps` is the sweep over the vocabulary, and every backend has its own. `TokenOps` is what happens to tokens
afterwards: the top-k mask, the shaping of advantages and the clipped loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from vppo_kernels import arguments
from vppo_kernels.layout import Layout
from vppo_kernels.linear_head import LinearHead
from vppo_kernels.logits import LogitTransform


class TileOps(Protocol):
    """Operations on a tile of transformed logits, `[rows, columns]` of one view or `[2, rows, columns]` of two.

    Tiles are contiguous. `first` is the vocabulary index of a tile's first column, and `targets`, `[rows]` int64, are
    indices into the vocabulary, most of them in other tiles. Statistics are packed as `statistics.py` says.

    Attributes:
        SCRATCH: How many tiles of working space the driver hands to a fold.
        PEAK: How many tiles of one view the hungriest operation holds at a time, what the driver holds included.
    """

    SCRATCH: int
    PEAK: int

    def fold(self, tile: Tensor, targets: Tensor | None, first: int, stats: Tensor, scratch: Tensor) -> Tensor:
        """One view's packed `SoftmaxStats` with one more tile; the tile stays, `stats` may be updated in place."""
        ...

    def fold_pair(self, tile: Tensor, targets: Tensor | None, first: int, stats: Tensor, scratch: Tensor) -> Tensor:
        """Two views' packed `PairStats` with one more tile; the tile stays, `stats` may be updated in place."""
        ...

    def fold_jsd(self, tile: Tensor, pair: Tensor, jsd_terms: Tensor, beta: float) -> Tensor:
        """`KL(p || m)` and `KL(q || m)`, `[2, rows]`, with one more tile; `jsd_terms` may be updated in place.

        `pair` is a packed `Pair`, and `m = (1 - beta) p + beta q`. The Jensen-Shannon divergence is the sum of both
        terms, the one times `1 - beta`, the other times `beta`.
        """
        ...

    def gradient_(
        self,
        tile: Tensor,
        softmax: Tensor,
        targets: Tensor,
        first: int,
        grads: Tensor,
        transform: LogitTransform,
        out: Tensor,
    ) -> None:
        """Make the gradient of one view's raw logits; the tile may be overwritten.

        Args:
            tile: `[rows, columns]`.
            softmax: A packed `Softmax`.
            targets, first: See the class.
            grads: `[2, rows]`, upstream of log-probability and entropy.
            transform: From raw logits to those of the tile.
            out: `[rows, columns]`, where the gradient goes: the tile, or a contiguous matrix that is rounded to.
        """
        ...

    def gradient_pair_(
        self,
        tile: Tensor,
        pair: Tensor,
        jsd_terms: Tensor | None,
        beta: float,
        targets: Tensor | None,
        first: int,
        grads: Tensor,
        transforms: tuple[LogitTransform, ...],
        out: Tensor,
    ) -> None:
        """Make the gradient of both views' raw logits; the tile may be overwritten.

        Args:
            tile: `[2, rows, columns]`.
            pair: A packed `Pair`.
            jsd_terms: `[2, rows]` where the divergence is Jensen-Shannon's; None where it is `KL(p || q)`.
            beta: Of the Jensen-Shannon divergence, see `fold_jsd`; else it has no part in anything.
            targets, first: See the class.
            grads: `[5, rows]`, upstream of the divergence, the entropies of p and q and their log-probabilities;
                `[3, rows]` without targets.
            transforms: From raw logits to those of the tile, of each view.
            out: `[2, rows, columns]`, where the gradient goes: the tile, or one that is rounded to, whose views are
                contiguous.
        """
        ...


class FusedSweep(Protocol):
    """Forward sweeps that multiply and fold in one kernel, without a tile of logits in memory."""

    def refuses(self, source: LinearHead) -> str:
        """Why this backend takes no operation on these hidden states and this head, after its name; "" if it does."""
        ...

    def rows(self, source: LinearHead, of_tiles: int, workspace: int) -> int:
        """Rows of each view that it takes at a time, where tiles would take `of_tiles`. The same on all ranks."""
        ...

    def sweep(self, source: LinearHead, rows: slice, targets: Tensor) -> Tensor:
        """Packed `SoftmaxStats` of a block of rows over all columns that this process holds."""
        ...

    def sweep_pair(self, source: LinearHead, rows: slice, targets: Tensor | None) -> Tensor:
        """Packed `PairStats` of a block of rows over all columns that this process holds."""
        ...


class TrajectoryStats(NamedTuple):
    """Statistics of the trajectories' mean dependencies; each a scalar tensor, or a number.

    Attributes:
        minimum: Smallest mean.
        maximum: Largest mean.
        mean: Mean of the means.
        trajectories: How many they were taken over; below 2 nothing is shaped.
    """

    minimum: Tensor | float
    maximum: Tensor | float
    mean: Tensor | float
    trajectories: Tensor | float = 2


@dataclass(frozen=True)
class LossInputs:
    """The tokens of a loss, `[rows, columns]` each. What stands where `mask` is 0, NaN included, takes part in nothing.

    Attributes:
        logprobs: Under the policy being trained; differentiable.
        old_logprobs: Under the policy that sampled.
        advantages: Shaped: 0 where nothing is to be learned.
        keep: Bool, the tokens that the top-k mask kept.
        mask: Bool, the response tokens.
        entropy: Of the policy being trained; differentiable.
        ref_logprobs: Under the reference policy.
        is_weights: Factors on the surrogate.
        dependency: Of each token on the image, for its mean.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    keep: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    is_weights: Tensor | None = None
    dependency: Tensor | None = None


@dataclass(frozen=True)
class LossOptions:
    """The numbers of a loss; `vppo_loss` says what they mean.

    Raises:
        ValueError: A number is out of its range.
    """

    clip_low: float
    clip_high: float
    clip_dual: float | None
    nll_coef: float
    entropy_coef: float
    kl_coef: float

    def __post_init__(self) -> None:
        arguments.non_negative("clip_low", self.clip_low)
        arguments.non_negative("clip_high", self.clip_high)
        if self.clip_low > 1:
            raise ValueError(f"clip_low: got {self.clip_low!r}, takes a number from 0 to 1")
        if self.clip_dual is not None and not (isinstance(self.clip_dual, int | float) and self.clip_dual > 1):
            raise ValueError(f"clip_dual: got {self.clip_dual!r}, takes None or a number above 1")
        for name in ("nll_coef", "entropy_coef", "kl_coef"):
            arguments.finite(name, getattr(self, name))

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """What the ratio is clipped to."""
        return 1 - self.clip_low, 1 + self.clip_high

    @property
    def every_token(self) -> bool:
        """Whether a term beside the surrogate asks for the log-probability of every response token."""
        return any(coefficient != 0 for coefficient in (self.nll_coef, self.entropy_coef, self.kl_coef))


LOG_RATIO_LIMIT = 20.0  # what log-ratios are held within, so that their exponentials stay finite

# The sums over a row's tokens that `clipped_loss` returns, in this order: of its response tokens ...
PER_TOKEN = ("tokens", "kept_fraction", "active_fraction", "entropy_mean")
# ... and of the active ones, whose shaped advantage is not 0.
PER_ACTIVE = ("ratio_mean", "approx_kl", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual")
SUMS = (*PER_TOKEN, *PER_ACTIVE, "ref_kl", "dependency", "loss")


class TokenOps(Protocol):
    """Operations on tokens, `[B, T]` or, packed, `[total]`; arguments are checked, and may lie in memory in any way."""

    def topk(
        self, scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout
    ) -> Tensor:
        """Bool mask of the `ceil(keep_ratio * n)` highest of each trajectory's n valid scores, of which only those
        above the threshold are kept where there is one; see `topk_mask`.
        """
        ...

    def topk_(
        self, scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout
    ) -> Tensor:
        """The same written over `scores`, which are returned."""
        ...

    def row_means(self, scores: Tensor, valid: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Mean of each trajectory's valid scores, `[B]` at least float32, and which trajectories have any."""
        ...

    def trajectory_scale(
        self,
        means: Tensor,
        present: Tensor,
        stats: TrajectoryStats | None,
        scale_min: float,
        scale_max: float | None,
    ) -> Tensor:
        """Factor of each trajectory, `[B]`, from what `row_means` returned; `shaping.trajectory_scale` says which.

        `stats` are those of a larger batch, None for those of these means.
        """
        ...

    def shape(self, advantages: Tensor, alpha: Tensor, keep: Tensor, layout: Layout) -> Tensor:
        """`advantages * alpha` at the kept tokens, 0 elsewhere; advantages are `[B]` or like `keep`."""
        ...

    def clipped_loss(self, inputs: LossInputs, options: LossOptions, per_token: bool) -> tuple[Tensor, Tensor]:
        """The loss before anything is averaged, float32 (float64 where an input is).

        Returns:
            The sum of each row, `[rows]`, or with `per_token` the loss of every token, `[rows, columns]`;
            differentiable in log-probabilities and entropies. And `SUMS` of each row, `[12, rows]`.
        """
        ...
