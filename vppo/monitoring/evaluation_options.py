"""When and on what `vppo train` evaluates, where a config leaves it open."""

from __future__ import annotations

import math
from typing import Any

from vppo.errors import InputError

Config = dict[str, Any]
ASKING = ("eval_strategy", "eval_steps", "eval_on_start", "do_eval")
BATCH, GENERATIONS = 8, 8  # defaults of transformers' per_device_eval_batch_size and of TRL's num_generations


def evaluation_defaults(config: Config) -> Config:
    """What a config that has an `eval_dataset` does not say of its evaluations.

    Without `eval_strategy` there is one before the first step and one after each tenth of the run; with `eval_strategy:
    steps` alone also the latter. (transformers would evaluate never, and at every logged step.) An evaluation batch
    holds whole groups of `num_generations_eval` completions, which TRL insists on.

    Args:
        config: Checked keys and values.

    Returns:
        Further keys and values; none where nothing is evaluated.

    Raises:
        InputError: It asks for evaluations and has no `eval_dataset`, or `eval_steps` is not above 0.
    """
    strategy = _name(config.get("eval_strategy"))
    if config.get("eval_dataset") is None:
        for key in ASKING:
            value = config.get(key)
            if value and _name(value) != "no":
                raise InputError(
                    f"config: {key}: got {_name(value)!r} without eval_dataset; give eval_dataset: a file, a folder or "
                    "a dataset on the hub"
                )
        if config.get("load_best_model_at_end"):
            raise InputError(
                "config: load_best_model_at_end: got true without eval_dataset, by which the best is chosen; give "
                "eval_dataset: a file, a folder or a dataset on the hub"
            )
        return {}
    if strategy == "no" and not config.get("eval_on_start"):
        return {}
    every = config.get("eval_steps")
    if every is not None and not 0 < every < math.inf:
        raise InputError(f"config: eval_steps: got {every!r}, takes a number of steps, or a part of the run below 1")
    group = config.get("num_generations_eval") or config.get("num_generations") or GENERATIONS
    defaults: Config = {"per_device_eval_batch_size": group * math.ceil(BATCH / group)}
    if strategy is None:
        defaults["eval_strategy"] = "steps"
        if config.get("eval_steps") is None:
            defaults["eval_on_start"] = True
    if strategy in (None, "steps") and config.get("eval_steps") is None:
        defaults["eval_steps"] = 0.1
    return defaults


def _name(strategy: Any) -> Any:
    """A strategy may be transformers' own enumeration where the config comes from Python."""
    return getattr(strategy, "value", strategy)
