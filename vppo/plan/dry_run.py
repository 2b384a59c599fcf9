"""`vppo train --dry-run`: what a run reads is read, one perturbed view is drawn, and the run's memory is planned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vppo.errors import InputError
from vppo.plan.settings import from_config, read_accelerate

LOOKED_AT = 32  # rows whose prompts say how long prompts are


def dry_run(config: dict[str, Any], *, gpus: int, gpu_memory: float, accelerate: Path | None = None) -> bool:
    """Builds data, processor and rewards as `vppo.train.train` does, and plans the run with its own longest prompt.

    Nothing is written, and no model is loaded.

    Args:
        config: What `vppo.train.load_config` returns.
        gpus, gpu_memory, accelerate: As `vppo.plan.run.plan` takes them.

    Returns:
        Whether the run fits.

    Raises:
        InputError: Something in the config or the data cannot be used, or this process is one of several.
    """
    from vppo.data import load_training_data
    from vppo.loading import load_processor
    from vppo.perturbations import seeded
    from vppo.plan.run import report
    from vppo.rewards.named import load_rewards
    from vppo.train import make_arguments

    script, model_args, args = make_arguments({**config, "use_cpu": True, "bf16": False, "fp16": False})
    if args.world_size > 1:
        raise InputError(
            "--dry-run: takes a single process, without accelerate launch; --gpus says how many are planned"
        )
    rewards = load_rewards(script.reward, args.reward_weights)
    processor = load_processor(
        script.model,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
        min_pixels=script.min_pixels,
        max_pixels=script.max_pixels,
    )
    dataset = load_training_data(
        script.dataset, options=script.data, bad_rows=script.bad_rows, processor=processor, skipped=[]
    )
    prompts = _prompts(processor, islice(dataset, LOOKED_AT))
    lengths = [_tokens(prompts, row) for row in range(len(prompts))]
    print(
        f"Data: {len(dataset)} rows; the longest prompt of the first {len(lengths)} has {max(map(sum, lengths))} tokens"
    )
    print(f"Rewards: {', '.join(getattr(reward, '__name__', str(reward)) for reward in rewards)}.")
    shown = next((row for row, problem in enumerate(prompts.problems) if problem.images), None)
    if args.scores_tokens and shown is not None:
        perturbation = args.make_perturbation(prompts._views.layout.patch_size)
        view = prompts.perturbed(shown, perturbation, seeded(args.seed, 0, shown))
        clean = prompts._batch.split["pixel_values"][shown]
        changed = (view != clean).float().mean().item()
        print(f"Perturbed view: {perturbation.kind}, which changes {changed:.0%} of the pixels of row {shown + 1}")
    given = read_accelerate(accelerate) if accelerate else None
    text, image = max(lengths, key=sum)
    count = max(len(problem.images) for problem in prompts.problems)
    sizes = {"text_tokens": text, "images": count, "image_tokens": -(-image // count) if count else 0}
    return report(from_config(config, gpus=gpus, accelerate=given, **sizes), gpu_memory=gpu_memory)


def _prompts(processor: Any, rows: Any) -> Any:
    from vppo.data.problems import Problem
    from vppo.data.prompts import Prompts

    problems: Sequence[Problem] = [Problem(row["prompt"], row.get("images") or [], None) for row in rows]
    return Prompts(processor, problems)


def _tokens(prompts: Any, row: int) -> tuple[int, int]:
    """Of one prompt: of its text, and of its images."""
    grids = prompts._batch.split.get("image_grid_thw")
    if grids is None or not prompts.problems[row].images:
        return prompts.lengths[row], 0
    merge = prompts._views.layout.merge_size
    image = int(grids[row].prod(-1).sum()) // merge**2
    return prompts.lengths[row] - image, image
