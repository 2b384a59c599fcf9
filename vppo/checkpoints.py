"""Which checkpoint a run can go on from, and how its weights come back."""

from __future__ import annotations

import json
import logging
import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

from vppo import manifest
from vppo.errors import InputError
from vppo.manifest import MANIFEST_FILE

STATE_FILE = "trainer_state.json"
# what a run goes on with beside its weights: without any of it transformers goes on differently, and does not say so
STATES = {"optimizer": "optimizer*", "learning rate schedule": "scheduler.pt", "random state": "rng_state*.pth"}
WEIGHTS = ("*.safetensors", "pytorch_model*", "global_step*")  # whole or adapters; FSDP's; DeepSpeed's
logger = logging.getLogger(__name__)


def saved_step(checkpoint: str | Path) -> int | None:
    """The optimizer steps done when a checkpoint was saved, or None where its state file is missing or broken.

    Args:
        checkpoint: A folder as transformers' trainer saves it.
    """
    try:
        state = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    step = state.get("global_step") if isinstance(state, dict) else None
    return step if isinstance(step, int) else None


def fault(checkpoint: str | Path) -> str | None:
    """Why no run can go on from a checkpoint, or None if one can.

    `VPPOTrainer` writes a list of all files, with sizes and digests, when everything else is on the disk; what is not
    as listed is not whole. A checkpoint without a list, as transformers and earlier versions write it, is taken for
    whole where its state file says so (transformers writes it last) and what can be seen at the files speaks for it.

    Args:
        checkpoint: A folder as transformers' trainer saves it.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / MANIFEST_FILE).exists():
        return manifest.fault(folder)
    return f"it has no readable {STATE_FILE}" if saved_step(folder) is None else _visible_fault(folder)


def named_checkpoint(folder: str | Path) -> Path:
    """The checkpoint whose folder is named, or the newest whole one of the run whose folder is.

    Raises:
        InputError: No run can go on from it.
    """
    folder = Path(folder)
    reason = fault(folder)
    if reason is None:
        return folder
    if not checkpoints(folder):
        raise InputError(
            f"resume: {folder} is not a complete checkpoint ({reason}); takes a folder checkpoint-N, or that of a run"
        )
    newest = last_complete_checkpoint(folder)
    if newest is None:
        raise InputError(f"resume: no checkpoint in {folder} is complete")
    return newest


def _visible_fault(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if not path.stat().st_size:
            return f"its {name} is empty"
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"its {name} was cut short"
        if path.suffix == ".safetensors":
            try:
                safe_open(path, "pt")
            except (OSError, SafetensorError):
                return f"its {name} was cut short"
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        return "it has no weights"
    missing = missing_states(folder)
    return f"it has no {missing[0]}" if 0 < len(missing) < len(STATES) else None  # save_only_model leaves out all


def missing_states(checkpoint: Path) -> list[str]:
    """Which of optimizer, learning rate schedule and random state a checkpoint does not have."""
    return [name for name, pattern in STATES.items() if not any(checkpoint.glob(pattern))]


def checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The folders `checkpoint-N` of a run by their N, in order."""
    numbered = {
        int(suffix): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (suffix := path.name.removeprefix("checkpoint-")).isdecimal()
    }
    return dict(sorted(numbered.items()))


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run; of each newer one, a warning says why it is passed over.

    Args:
        output_dir: The run's folder, with `checkpoint-N` folders in it. It need not exist.

    Returns:
        The `checkpoint-N` of highest N that is whole and whose state says that N steps were done, or None.
    """
    for step, path in reversed(checkpoints(output_dir).items()):
        reason = fault(path)
        if reason is None and (done := saved_step(path)) != step:
            reason = f"its {STATE_FILE} is that of step {done}"
        if reason is None:
            return path
        logger.warning(f"{path} is passed over: {reason}")
    return None


def drop_older(newest: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints of a run beyond a limit, and before them those that are not whole.

    Args:
        newest: The checkpoint that was just saved; it stays.
        limit: How many may stay; None or 0 for all.
        best: A checkpoint that stays whatever its age.
    """
    if not limit or limit < 0:
        return
    present = list(checkpoints(newest.parent).values())
    wanted = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    kept = [path for path in present if path.resolve() in wanted]  # the best may be in the folder of an earlier run
    others = [path for path in present if path not in kept]
    others.sort(key=lambda path: saved_step(path) is not None and not manifest.is_begun(path))  # stable: then by age
    for path in others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def restore_weights(model: Any, checkpoint: str | Path) -> bool:
    """Loads a checkpoint's weights into a model, under the names that `from_pretrained` would give them.

    transformers writes many vision-language models with the names of the hub ("visual.blocks...") and on resuming looks
    for its own ("model.visual.blocks..."): it warns, restores next to nothing, and trains on from the first weights
    (huggingface/transformers#43701). `VPPOTrainer` calls this instead.

    Args:
        model: A whole `PreTrainedModel`, not yet wrapped for several devices.
        checkpoint: A folder as transformers' trainer saves it.

    Returns:
        Whether the folder holds whole weights, and they were loaded. Adapters, and what FSDP or DeepSpeed save in
        pieces, are left to their own loaders.
    """
    if not any(Path(checkpoint).glob("model*.safetensors")):
        return False
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


def updates_per_rollouts(args: Any) -> int:
    """After how many optimizer steps a run draws new rollouts: only then does a checkpoint hold all that goes on.

    Args:
        args: TRL's `GRPOConfig`.
    """
    passes = args.steps_per_generation * args.num_iterations
    return passes // math.gcd(passes, args.gradient_accumulation_steps)


def check_saving(args: Any) -> None:
    """Raises a ValueError where checkpoints would fall between two updates from the same rollouts.

    A checkpoint does not hold rollouts (they are gigabytes of pixels), so such a run would resume on other ones.

    Args:
        args: TRL's `GRPOConfig`. A `save_steps` below 1, a share of the run, is looked at on resuming alone.
    """
    updates = updates_per_rollouts(args)
    if args.save_strategy == "steps" and args.save_steps >= 1 and args.save_steps % updates:
        below = int(args.save_steps // updates * updates)
        near = f"{below} or {below + updates}" if below else f"{updates}"
        raise ValueError(
            f"save_steps: got {args.save_steps:g}, takes a multiple of {updates}, such as {near}, or save_strategy "
            f"'no': {updates} updates are made from the same rollouts, which a checkpoint between them does not hold"
        )


def check_resuming(checkpoint: str | Path, args: Any) -> None:
    """Raises an `InputError` where a checkpoint does not hold what the run needs to go on as it was.

    Args:
        checkpoint: A folder as transformers' trainer saves it.
        args: TRL's `GRPOConfig`.
    """
    missing = missing_states(Path(checkpoint))
    if missing == list(STATES):
        raise InputError(
            f"resume: {checkpoint} holds weights but no optimizer, as save_only_model leaves it: the run would go "
            "on differently; give the folder as model to begin a new run from its weights"
        )
    if missing:
        raise InputError(
            f"resume: {checkpoint} has no {' and no '.join(missing)}: the run would go on differently; resume from an "
            "earlier checkpoint, or give the folder as model to begin a new run from its weights"
        )
    updates = updates_per_rollouts(args)
    if (saved_step(checkpoint) or 0) % updates:
        raise InputError(
            f"resume: {checkpoint} was saved between two of the {updates} updates from the same rollouts, which it "
            f"does not hold; resume from one whose number is a multiple of {updates}"
        )
