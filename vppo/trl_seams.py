"""TRL's seams in one room: every private name of TRL's and of transformers' trainers that this package depends on.

These change from release to release. `SEAMS` says what is needed and what it carries, and is compared with the code of
the installed TRL when a trainer is built, before a model is loaded. What carries correctness raises a `MovedSeamError`;
what carries speed alone is done without, after one warning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from trl import GRPOTrainer

from vppo.seams import MovedSeamError, lacking
from vppo.trl_utils import TESTED

logger = get_logger(__name__)
UTILS, GRPO, VLLM = "trl.trainer.utils", "trl.trainer.grpo_trainer", "trl.generation.vllm_generation"
TRAINER = "transformers:Trainer"
HEAD_ARGUMENTS = (  # of TRL's fused head, in their order
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)


@dataclass(frozen=True)
class Seam:
    """What is needed of one function of TRL; see `vppo.seams.lacking`.

    Attributes:
        target: Where it is.
        parameters, uses: What it must take, and what its code must mention; names separated by spaces.
        carries: What hangs on it.
    """

    target: str
    parameters: str = ""
    uses: str = ""
    carries: str = "the trainer's own state"

    def lacking(self) -> list[str]:
        return lacking(self.target, self.parameters.split(), self.uses.split())


GRPO_TRAINER, HAND_OVER = f"{GRPO}:GRPOTrainer", "the vLLM hand-over"
SEAMS = (
    Seam(f"{GRPO_TRAINER}.__init__", uses="_metrics _logs _dist _step _buffered_inputs _is_vlm _entropy_bonus_enabled"),
    Seam(
        f"{GRPO_TRAINER}._generate_and_score_completions",
        "inputs",
        "_generate _calculate_rewards _get_per_token_logps_and_entropies _sync_tool_dicts _async_tool_dicts _logs "
        "prompt_ids prompt_mask completion_ids completion_mask tool_mask advantages old_per_token_logps "
        "sampling_per_token_logps num_images",
        "per-token advantages",
    ),
    Seam(f"{GRPO_TRAINER}.compute_loss", uses="_compute_loss", carries="the official penalty"),
    Seam(
        f"{GRPO_TRAINER}._compute_loss",
        "model inputs",
        "_get_per_token_logps_and_entropies advantages dim completion_mask tool_mask old_per_token_logps "
        "num_items_in_batch current_gradient_accumulation_steps _metrics clip_ratio/region_mean",
        "per-token advantages, and the official penalty",
    ),
    Seam(
        f"{GRPO_TRAINER}._get_per_token_logps_and_entropies",
        "model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "num_images",
        "fused_lm_head log_probs entropy",
        "the official penalty, and the comparison with the sampler",
    ),
    Seam(
        f"{GRPO_TRAINER}._prepare_inputs",
        "generation_batch",
        "_generate_and_score_completions _buffered_inputs _step steps_per_generation",
        "the trajectory factor of the official recipe",
    ),
    Seam(f"{GRPO_TRAINER}._calculate_rewards", "inputs", "reward_funcs", "the checks of rewards"),
    Seam(
        f"{GRPO_TRAINER}._generate",
        "prompts",
        "_tokenize_prompts _generate_single_turn _tool_call_loop",
        "the pictures of a response",
    ),
    Seam(f"{GRPO_TRAINER}._tokenize_prompts", "prompts", carries="prompts without images"),
    Seam(f"{GRPO_TRAINER}._generate_single_turn", "prompt_ids images", carries="the end of a run whose server is gone"),
    Seam(
        f"{GRPO_TRAINER}._tool_call_loop",
        "prompts multimodal_fields",
        "_get_tool_suffix_ids _sync_tool_dicts _async_tool_dicts num_images",
        "the pictures of tools",
    ),
    Seam(f"{GRPO_TRAINER}._get_tool_suffix_ids", "tool_messages", carries="the results of tools"),
    Seam(f"{GRPO_TRAINER}.log", uses="_metrics log_completions", carries="metrics and completion tables"),
    Seam(f"{GRPO_TRAINER}.create_model_card", uses="_name _paper _tag_names", carries="the model card"),
    Seam(f"{GRPO_TRAINER}._save_checkpoint", "model trial", "create_model_card", "checkpoints"),
    Seam(f"{TRAINER}._get_output_dir", "trial", carries="checkpoints"),
    Seam(f"{TRAINER}._load_best_model", carries="load_best_model_at_end"),
    Seam(f"{GRPO_TRAINER}._get_train_sampler", carries="resuming"),
    Seam(f"{GRPO_TRAINER}._load_optimizer_and_scheduler", "checkpoint", carries="resuming"),
    Seam(f"{TRAINER}._load_rng_state", "checkpoint", carries="resuming"),
    Seam(f"{TRAINER}._load_from_checkpoint", "resume_from_checkpoint model", carries="resuming"),
    Seam(
        f"{TRAINER}._init_training_state",
        "max_steps num_update_steps_per_epoch num_train_epochs",
        carries="resuming",
    ),
)
VLLM_SEAMS = (  # needed with use_vllm alone
    Seam(f"{GRPO_TRAINER}.__init__", uses="vllm_generation", carries=HAND_OVER),
    Seam(
        f"{GRPO_TRAINER}._generate_single_turn",
        uses="vllm_generation generate sync_weights _last_loaded_step",
        carries=HAND_OVER,
    ),
    Seam(f"{VLLM}:VLLMGeneration.__init__", uses="generation_kwargs", carries=HAND_OVER),
    Seam(f"{VLLM}:VLLMGeneration._init_vllm", uses="LLM llm vllm_client", carries=HAND_OVER),
    Seam(f"{VLLM}:VLLMGeneration.generate", "prompts images", carries=HAND_OVER),
    Seam(f"{VLLM}:VLLMGeneration.sync_weights", uses="llm vllm_client", carries=HAND_OVER),
)
# what carries speed alone
SHUFFLE = (Seam(f"{GRPO}:shuffle_sequence_dict"), Seam(f"{GRPO_TRAINER}._prepare_inputs", uses="shuffle_sequence_dict"))
ADD_HEAD = f"{UTILS}:add_fused_lm_head"
HEAD = (
    Seam(f"{UTILS}:_ChunkedLogProbFunction.forward", " ".join(HEAD_ARGUMENTS)),
    Seam(ADD_HEAD, uses="_ChunkedLogProbFunction"),
)
COMPACT = "_use_triton"  # TRL 1.16 asks it whether prompts and padding are left out; 1.15 always leaves them out


def check_seams(use_vllm: bool) -> None:
    """Compares what is needed of TRL with the installed one.

    Args:
        use_vllm: Whether TRL hands prompts to vLLM.

    Raises:
        MovedSeamError: Something that results depend on is not there; the message names TRL's version, all that is
            missing, and what hangs on it.
    """
    seams = (*SEAMS, *VLLM_SEAMS) if use_vllm else SEAMS
    missing = [(seam.carries, found) for seam in seams for found in seam.lacking()]
    if missing:
        what = "; ".join(f"{found} (for {carries})" for carries, found in missing)
        raise MovedSeamError(f"trl: got version {metadata.version('trl')}, which lacks {what}; takes {TESTED}")


def keeps_order() -> bool:
    """Whether TRL's shuffle of rollouts over micro-batches can be left out; if not, one warning says so."""
    missing = _missing(SHUFFLE)
    if missing:
        warn_slower(f"Rollouts of a prompt are shuffled over micro-batches, and pass apart: TRL lacks {missing}")
    return not missing


def exchangeable_head() -> str:
    """What TRL's fused head lacks to have its function exchanged; "" for nothing."""
    asks = not lacking(ADD_HEAD, uses=[COMPACT])
    if missing := _missing((*HEAD, *([Seam(f"{UTILS}:{COMPACT}")] if asks else []))):
        return missing
    _, *arguments = inspect.signature(import_module(UTILS)._ChunkedLogProbFunction.forward).parameters  # "ctx" is first
    return "" if tuple(arguments) == HEAD_ARGUMENTS else f"the order of {', '.join(HEAD_ARGUMENTS)} in its fused head"


def _missing(seams: tuple[Seam, ...]) -> str:
    return ", ".join(found for seam in seams for found in seam.lacking())


@cache
def warn_slower(reason: str) -> None:
    """Once for each reason."""
    logger.warning(f"{reason}. Results are the same, steps slower.")


@contextmanager
def exchanged_head(function: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block TRL's fused head calls `function(own)` where it would have called `own`, and leaves prompts and
    padding out on every device.
    """
    compact = {COMPACT: lambda own: lambda device: True} if hasattr(import_module(UTILS), COMPACT) else {}
    with _exchanged(UTILS, {"_ChunkedLogProbFunction": function, **compact}):
        yield


@contextmanager
def unshuffled() -> Iterator[None]:
    """Within the block TRL leaves rollouts in their order where it would shuffle them over micro-batches."""
    with _exchanged(GRPO, {"shuffle_sequence_dict": lambda own: lambda rows: rows}):
        yield


@contextmanager
def engine_options(**options: Any) -> Iterator[None]:
    """Within the block TRL builds vLLM's engine with these options, too."""
    with _exchanged(VLLM, {"LLM": lambda own: partial(own, **options)} if options else {}):
        yield


@contextmanager
def _exchanged(module: str, replacements: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Within the block the module has other objects by these names, each made from the one that it had."""
    names = vars(import_module(module))
    before = {name: names[name] for name in replacements}
    names.update({name: replacement(names[name]) for name, replacement in replacements.items()})
    try:
        yield
    finally:
        names.update(before)


class TRLTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, of which subclasses need no private name.

    They override the methods of the first part, which are TRL's by the names without the underscore, and call them by
    `super()`. The second part is what TRL calls, the third one its state.

    Raises:
        MovedSeamError: The installed TRL is not one that this class knows; see `check_seams`.
    """

    args: Any
    model: Any

    def __init__(self, model: Any, reward_funcs: Any, args: Any, **kwargs: Any) -> None:
        check_seams(args.use_vllm)
        super().__init__(model, reward_funcs, args, **kwargs)

    # -- what subclasses override ------------------------------------------------------------------------------------

    def prepare_inputs(self, generation_batch: Any) -> Any:
        """A micro-batch; the first one of a generation batch makes all of them."""
        return super()._prepare_inputs(generation_batch)

    def generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A generation batch: rows, their responses and advantages."""
        return super()._generate_and_score_completions(inputs)

    def generate(self, prompts: list[Any]) -> Any:
        """Tokens of prompts and responses, and the images of each row."""
        return super()._generate(prompts)

    def tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Tokens, images and further fields of each prompt."""
        return super()._tokenize_prompts(prompts)

    def generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Responses to prompts of tokens."""
        return super()._generate_single_turn(*args, **kwargs)

    def tool_call_loop(self, *generated: Any) -> Any:
        """Calls the tools that responses ask for, and goes on with them."""
        return super()._tool_call_loop(*generated)

    def get_tool_suffix_ids(self, tool_messages: list[Any]) -> list[int]:
        """Tokens of the messages of tools."""
        ids: list[int] = super()._get_tool_suffix_ids(tool_messages)
        return ids

    def calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> Tensor:
        """`[B, rewards]` of the responses of all processes."""
        rewards: Tensor = super()._calculate_rewards(inputs, *args)
        return rewards

    def get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> Any:
        """`[B, T]` log-probabilities of the responses, their entropies, and a loss of the model's own."""
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, **images
        )

    def compute_micro_batch_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's `_compute_loss`, whose other name is taken."""
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, *resumed: Any) -> tuple[int, int]:
        """The epoch and the step in it that training begins with."""
        return super()._init_training_state(max_steps, steps_per_epoch, epochs, *resumed)

    def get_train_sampler(self, dataset: Any = None) -> Any:
        """The order of the rows."""
        return super()._get_train_sampler(dataset)

    def save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint, and removes old ones."""
        super()._save_checkpoint(model, trial)

    def load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Their state."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def load_rng_state(self, checkpoint: str | None) -> None:
        """The state of random numbers."""
        super()._load_rng_state(checkpoint)

    def load_best_model(self) -> None:
        """The weights of the best checkpoint, at the end."""
        super()._load_best_model()

    # -- what TRL calls ----------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return self.prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return self.generate_and_score_completions(inputs)

    def _generate(self, prompts: list[Any]) -> Any:
        return self.generate(prompts)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return self.tokenize_prompts(prompts)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return self.generate_single_turn(*args, **kwargs)

    def _tool_call_loop(self, *generated: Any) -> Any:
        return self.tool_call_loop(*generated)

    def _get_tool_suffix_ids(self, tool_messages: list[Any]) -> list[int]:
        return self.get_tool_suffix_ids(tool_messages)

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> Tensor:
        return self.calculate_rewards(inputs, *args)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return self.compute_micro_batch_loss(model, inputs)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        return self.init_training_state(*args)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return self.get_train_sampler(dataset)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self.load_best_model()

    # -- TRL's state -------------------------------------------------------------------------------------------------

    def describe_method(self, name: str, paper: dict[str, str] | None, tags: list[str]) -> None:
        """What the model card says of how a model was trained; without a paper, TRL's."""
        self._name, self._tag_names = name, tags
        self._paper = paper or self._paper

    def metrics_of(self, mode: str | None = None) -> dict[str, list[float]]:
        """What the next log holds the means of, "train" or "eval"; None is what the model is doing."""
        metrics: dict[str, list[float]] = self._metrics[mode or ("train" if self.model.training else "eval")]
        return metrics

    def take_logs(self, logs: dict[str, Any]) -> None:
        """Has TRL add each generation's completions to `logs`, and not to lists of the size of a generation."""
        self._logs = logs

    @property
    def joins_forwards(self) -> bool:
        """Whether the model is sharded, so that all processes must join each forward."""
        return bool(self._dist.is_fsdp or self._dist.is_zero3)

    def max_over_ranks(self, count: int) -> int:
        """The largest count of all processes where they must join each forward, else the one that is given."""
        if not self.joins_forwards:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    @property
    def gathers_in_backward(self) -> bool:
        """Whether the backward, too, finds the weight of the head whole; under ZeRO-3 it does not."""
        return not self._dist.is_zero3

    @property
    def shows_images(self) -> bool:
        """Whether the model is a vision-language model."""
        return bool(self._is_vlm)

    @property
    def rewards_entropy(self) -> bool:
        """Whether the loss has an entropy bonus."""
        return bool(self._entropy_bonus_enabled)

    @property
    def tools_by_name(self) -> list[dict[str, Callable[..., Any]]]:
        """Of the rows of a batch, while it is generated: the tools that they may call."""
        return [*self._sync_tool_dicts, *self._async_tool_dicts]

    def accumulated(self) -> list[dict[str, Any]]:
        """The micro-batches that the optimizer step at hand accumulates."""
        accumulation = self.args.gradient_accumulation_steps
        start = self._step % self.args.steps_per_generation // accumulation * accumulation
        assert self._buffered_inputs is not None
        return self._buffered_inputs[start : start + accumulation]

    def run_folder(self, trial: Any = None) -> Path:
        """Where checkpoints go."""
        return Path(self._get_output_dir(trial=trial))

    def hand_over(self, **functions: Callable[..., Any]) -> None:
        """Replaces "generate" or "sync_weights" of TRL's way to vLLM; each is given TRL's own before its arguments."""
        vllm = self.vllm_generation
        vars(vllm).update({name: partial(function, getattr(vllm, name)) for name, function in functions.items()})
