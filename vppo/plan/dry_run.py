"""`vppo train --dry-run`: what a run reads is read, one perturbed view is drawn, and the run's memory is planned."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from vppo.data import load_training_data
from vppo.data.problems import Problem
from vppo.data.prompts import Prompts
from vppo.errors import InputError
from vppo.loading import load_processor
from vppo.perturbations import seeded
from vppo.plan.run import report
from vppo.plan.settings import arguments, from_config, read_accelerate
from vppo.rewards.named import load_rewards
from vppo.views import ImageViews

LOOKED_AT = 32  # rows whose prompts say how long prompts are
GPUS, GPU_MEMORY = 1, 80.0  # of a dry run that is not told which; memory in GiB


def dry_run(
    config: dict[str, Any],
    *,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    accelerate: Path | None = None,
) -> bool:
    """Builds data, processor and rewards as `vppo.train.train` does, and plans the run with its own longest prompt.

    Nothing is written, and no model is loaded.

    Args:
        config: What `vppo.train_config.load_config` returns.
        gpus, gpu_memory, accelerate: As `vppo.plan.run.plan` takes them. Without one of the first two, `GPUS` or
            `GPU_MEMORY` is taken, and the output says so.

    Returns:
        Whether the run fits.

    Raises:
        InputError: Something in the config or the data cannot be used, or this process is one of several.
    """
    given_sizes = {f"--gpus {GPUS}": gpus, f"--gpu-memory {GPU_MEMORY:g} (GiB)": gpu_memory}
    assumed = [words for words, value in given_sizes.items() if value is None]
    gpus = GPUS if gpus is None else gpus
    gpu_memory = GPU_MEMORY if gpu_memory is None else gpu_memory
    script, model_args, args = arguments(config, gpus)
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
    layout = ImageViews.of(processor).layout
    rows = [Problem(row["prompt"], row.get("images") or [], None) for row in islice(dataset, LOOKED_AT)]
    prompts = Prompts(processor, rows)
    lengths = [_tokens(prompts, row, layout.merge_size) for row in range(len(rows))]
    longest = max(range(len(rows)), key=lambda row: sum(lengths[row]))
    text, image = lengths[longest]
    print(f"Data: {len(dataset)} rows; the longest prompt of the first {len(rows)} has {text + image} tokens")
    print(f"Rewards: {', '.join(getattr(reward, '__name__', str(reward)) for reward in rewards)}")
    shown = next((row for row, problem in enumerate(rows) if problem.images), None)
    if args.perturbs and shown is not None:
        perturbation = args.make_perturbation(layout.patch_size)
        view = prompts.perturbed(shown, perturbation, seeded(args.seed, 0, shown))
        changed = (view != prompts.join([shown], [[0]])["pixel_values"]).float().mean().item()
        print(f"Perturbed view: {perturbation.kind}, which changes {changed:.0%} of the pixels of row {shown + 1}")
    if assumed:
        print(f"Not given, so assumed: {', '.join(assumed)}")
    given = read_accelerate(accelerate) if accelerate else None
    count = len(rows[longest].images)
    sizes = {"text_tokens": text, "images": count, "image_tokens": -(-image // count) if count else 0}
    return report(from_config(config, gpus=gpus, accelerate=given, **sizes), gpu_memory=gpu_memory)


def _tokens(prompts: Prompts, row: int, merge: int) -> tuple[int, int]:
    """Of one prompt: of its text, and of its images."""
    if not prompts.problems[row].images:
        return prompts.lengths[row], 0
    grids = prompts.join([row], [[0]]).get("image_grid_thw")
    image = 0 if grids is None else int(grids.prod(-1).sum()) // merge**2
    return prompts.lengths[row] - image, image
